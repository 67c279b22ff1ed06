//! The DSDT: the machine's devices and what to do about events, as AML.
//!
//! ```text
//! \_S5            sleep type of "off"
//! \_SB.C000 …     a processor per vCPU
//! \_SB.MBRD       what nobody else may use: ECAM, our ports
//! \_SB.PCI0       the host bridge: windows, slots, hotplug
//!      PCNT       reads the hotplug registers, notifies slots
//!      S001.._EJ0 lets go of a device
//! \_SB.PWRB       power button
//! \_SB.RTC0, COM1 the clock, the serial port
//! \_SB.GED        reads what is pending, calls PCNT or notifies PWRB
//! ```

use acpi_tables::aml::{
    Acquire, AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local,
    Memory32Fixed, Method, MethodCall, Mutex, Name, Notify, OpRegion, OpRegionSpace, Package, Path,
    Release, ResourceTemplate, Scope, ShiftLeft, Store, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use devices::acpi::{GED_PORTS, S5_SLEEP_TYPE, SLEEP_PORTS, event};
use devices::legacy::{CMOS_PORTS, PM_TIMER_PORTS, SERIAL_PORTS};
use devices::pci::hotplug::HOTPLUG_PORTS;

use super::{Machine, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout;

/// Slots a device can be plugged into; slot 0 is the host bridge.
const SLOTS: std::ops::Range<u8> = 1..32;

/// Values of `Notify` (ACPI 6.5 §5.6.6).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
const BUTTON_PRESSED: u8 = 0x80;

const FOREVER: u16 = 0xffff;

/// AML that is bytes already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn raw(aml: &dyn Aml) -> Raw {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    Raw(bytes)
}

fn refs(items: &[Raw]) -> Vec<&dyn Aml> {
    items.iter().map(|item| item as &dyn Aml).collect()
}

fn hid(id: &str) -> Name {
    Name::new("_HID".into(), &EISAName::new(id))
}

fn uid(id: u8) -> Name {
    Name::new("_UID".into(), &id)
}

fn crs(resources: Vec<&dyn Aml>) -> Name {
    Name::new("_CRS".into(), &ResourceTemplate::new(resources))
}

/// `len` ports; the layout's constants are all small.
fn ports(base: u64, len: u64) -> IO {
    IO::new(base as u16, base as u16, 1, len as u8)
}

/// An edge-triggered, active-high interrupt of a device's own.
fn edge_interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// The whole table.
pub(super) fn dsdt(machine: &Machine<'_>) -> Vec<u8> {
    let mut devices: Vec<Raw> = (0..)
        .zip(machine.apic_ids)
        .map(|(uid, _)| processor(uid))
        .collect();
    devices.extend([motherboard(), pci_bridge(), power_button(), clock()]);
    if machine.serial {
        devices.push(serial_port());
    }
    devices.push(event_device());
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let s5 = Package::new(vec![&S5_SLEEP_TYPE]);
    table.append_slice(&raw(&Name::new("_S5_".into(), &s5)).0);
    table.append_slice(&raw(&Scope::new("_SB_".into(), refs(&devices))).0);
    table.as_slice().to_vec()
}

/// A vCPU; its `_UID` is what the MADT knows it by.
fn processor(index: u8) -> Raw {
    raw(&Device::new(
        format!("C{index:03}").as_str().into(),
        vec![&Name::new("_HID".into(), &"ACPI0007"), &uid(index)],
    ))
}

/// Keeps the operating system from putting anything else where we are. Without it Linux would not
/// believe the MCFG.
fn motherboard() -> Raw {
    raw(&Device::new(
        "MBRD".into(),
        vec![
            &hid("PNP0C02"),
            &uid(0),
            &crs(vec![
                &Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_SIZE as u32),
                &ports(layout::ACPI_SLEEP_PORT, SLEEP_PORTS),
                &ports(layout::PM_TIMER_PORT, PM_TIMER_PORTS),
                &ports(layout::GED_PORT, GED_PORTS),
                &ports(layout::HOTPLUG_PORT, HOTPLUG_PORTS),
            ]),
        ],
    ))
}

/// The PCI Express host bridge. It has no `_OSC`: the guest leaves native hotplug alone, which is
/// what makes it use ours.
fn pci_bridge() -> Raw {
    let window_end = layout::PCI_WINDOW + (layout::PCI_WINDOW_SIZE - 1);
    let mut children = vec![
        raw(&hid("PNP0A08")),
        raw(&Name::new("_CID".into(), &EISAName::new("PNP0A03"))),
        raw(&uid(0)),
        raw(&Name::new("_SEG".into(), &0u8)),
        raw(&Name::new("_BBN".into(), &0u8)),
        raw(&crs(vec![
            &AddressSpace::new_bus_number(0u16, 0),
            &ports(layout::PCI_CONFIG_PORT, 8),
            &AddressSpace::new_io(0u16, layout::PCI_CONFIG_PORT as u16 - 1, None),
            &AddressSpace::new_io(layout::PCI_CONFIG_PORT as u16 + 8, 0xffff, None),
            &AddressSpace::new_memory(
                AddressSpaceCacheable::NotCacheable,
                true,
                layout::PCI_WINDOW as u32,
                window_end as u32,
                None,
            ),
        ])),
        raw(&Mutex::new("BLCK".into(), 0)),
        raw(&OpRegion::new(
            "PCST".into(),
            OpRegionSpace::SystemIO,
            &layout::HOTPLUG_PORT,
            &HOTPLUG_PORTS,
        )),
        raw(&Field::new(
            "PCST".into(),
            FieldAccessType::DWord,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            vec![
                FieldEntry::Named(*b"PCIU", 32),
                FieldEntry::Named(*b"PCID", 32),
                FieldEntry::Named(*b"B0EJ", 32),
            ],
        )),
    ];
    children.extend(SLOTS.map(slot));
    children.extend([eject_method(), notify_method(), news_method()]);
    raw(&Device::new("PCI0".into(), refs(&children)))
}

fn slot_path(slot: u8) -> Path {
    format!("S{slot:03}").as_str().into()
}

fn slot(slot: u8) -> Raw {
    raw(&Device::new(
        slot_path(slot),
        vec![
            &Name::new("_ADR".into(), &(u32::from(slot) << 16)),
            &Name::new("_SUN".into(), &slot),
            &Method::new(
                "_EJ0".into(),
                1,
                true,
                vec![&MethodCall::new("PCEJ".into(), vec![&slot])],
            ),
        ],
    ))
}

/// `PCEJ(slot)`: lets go of the device in a slot.
fn eject_method() -> Raw {
    raw(&Method::new(
        "PCEJ".into(),
        1,
        true,
        vec![
            &Acquire::new("BLCK".into(), FOREVER),
            &ShiftLeft::new(&Path::new("B0EJ"), &1u8, &Arg(0)),
            &Release::new("BLCK".into()),
        ],
    ))
}

/// `DVNT(slots, value)`: notifies each slot whose bit is set.
fn notify_method() -> Raw {
    let steps: Vec<Raw> = SLOTS
        .map(|slot| {
            raw(&If::new(
                &And::new(&ZERO, &Arg(0), &(1u32 << slot)),
                vec![&Notify::new(&slot_path(slot), &Arg(1))],
            ))
        })
        .collect();
    raw(&Method::new("DVNT".into(), 2, true, refs(&steps)))
}

/// `PCNT()`: asks the hotplug registers for news. Each is read once, into a local, because reading
/// clears it.
fn news_method() -> Raw {
    let notify = |slots, value| MethodCall::new("DVNT".into(), vec![slots, value]);
    raw(&Method::new(
        "PCNT".into(),
        0,
        true,
        vec![
            &Acquire::new("BLCK".into(), FOREVER),
            &Store::new(&Local(0), &Path::new("PCIU")),
            &Store::new(&Local(1), &Path::new("PCID")),
            &Release::new("BLCK".into()),
            &notify(&Local(0), &DEVICE_CHECK),
            &notify(&Local(1), &EJECT_REQUEST),
        ],
    ))
}

fn power_button() -> Raw {
    raw(&Device::new("PWRB".into(), vec![&hid("PNP0C0C"), &uid(0)]))
}

/// The real-time clock, without the interrupt it does not raise.
fn clock() -> Raw {
    raw(&Device::new(
        "RTC0".into(),
        vec![
            &hid("PNP0B00"),
            &uid(0),
            &crs(vec![&ports(layout::CMOS_PORT, CMOS_PORTS)]),
        ],
    ))
}

fn serial_port() -> Raw {
    raw(&Device::new(
        "COM1".into(),
        vec![
            &hid("PNP0501"),
            &uid(0),
            &Name::new("_DDN".into(), &"COM1"),
            &crs(vec![
                &edge_interrupt(layout::SERIAL_GSI),
                &ports(layout::SERIAL_PORT, SERIAL_PORTS),
            ]),
        ],
    ))
}

/// The Generic Event Device. Its one register is read once per interrupt, which clears it.
fn event_device() -> Raw {
    raw(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &uid(0),
            &crs(vec![&edge_interrupt(layout::GED_GSI)]),
            &OpRegion::new(
                "GDST".into(),
                OpRegionSpace::SystemIO,
                &layout::GED_PORT,
                &GED_PORTS,
            ),
            &Field::new(
                "GDST".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"GDAT", 8)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &Path::new("GDAT")),
                    &If::new(
                        &And::new(&ZERO, &Local(0), &event::POWER_BUTTON),
                        vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &BUTTON_PRESSED)],
                    ),
                    &If::new(
                        &And::new(&ZERO, &Local(0), &event::PCI),
                        vec![&MethodCall::new("\\_SB_.PCI0.PCNT".into(), vec![])],
                    ),
                ],
            ),
        ],
    ))
}

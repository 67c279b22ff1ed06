//! Every device here against accesses of every width at every offset.

use std::sync::Arc;
use std::time::Instant;

use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::bus::BusDevice;
use crate::config::BuildContext;
use crate::event::Reporter;
use crate::guest_memory::discard::inhibit::Inhibitor;
use crate::sandbox::SeccompMode;
use crate::signals::GuestSignals;

fn devices(signals: Arc<GuestSignals>) -> Vec<Arc<dyn BusDevice>> {
    let context = BuildContext {
        reporter: Reporter::silent(),
        seccomp: SeccompMode::Enforce,
        discards: Inhibitor::default(),
    };
    let backend = ConsoleBackend::open(&ConsoleConfig::default(), context).unwrap();
    vec![
        SerialDevice::attach(&backend, EventFd::new(EFD_NONBLOCK).unwrap()),
        Arc::new(DebugConsole::new(&backend)),
        Arc::new(DebugPort::new(Instant::now(), Arc::new(|_, _| {}))),
        Arc::new(I8042::new(signals)),
        Arc::new(Cmos::new(1 << 30, 0)),
        Arc::new(PmTimer::default()),
    ]
}

proptest! {
    #[test]
    fn accesses_of_every_width_and_offset_do_no_harm(
        accesses in prop::collection::vec(
            (prop_oneof![0..16u64, any::<u64>()], prop::collection::vec(any::<u8>(), 0..17)),
            1..64,
        ),
    ) {
        for device in devices(Arc::new(GuestSignals::new(|| {}))) {
            for (offset, data) in &accesses {
                device.write(*offset, data);
                device.read(*offset, &mut data.clone());
            }
        }
    }
}

#[test]
fn the_keyboard_controller_resets_the_machine_on_command_0xfe_only() {
    let signals = Arc::new(GuestSignals::new(|| {}));
    let device = I8042::new(signals.clone());
    device.write(4, &[0xaa]);
    device.write(0, &[0xfe]);
    assert!(!signals.take().reset);
    device.write(4, &[0xfe]);
    assert!(signals.take().reset);
}

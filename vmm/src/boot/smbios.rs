//! The SMBIOS tables (DSP0134 3.2): who made the machine, its serial number and UUID.
//!
//! Guests look for the entry point, `_SM3_` at a multiple of 16, between 0xF0000 and 0xFFFFF. The
//! structures follow it: firmware (0), system (1), chassis (3), OEM strings (11), end (127).

use devices::config::Invalid;
use devices::guest_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::config::PlatformConfig;
use crate::error::Error;
use crate::layout;

const ENTRY_POINT_BYTES: usize = 24;
/// The structures begin here, from the entry point.
const STRUCTURES_OFFSET: u64 = 32;
/// From the structures' start to what stands at the end of the first MiB.
const STRUCTURES_MAX_BYTES: usize =
    (layout::RESET_VECTOR.0 - layout::SMBIOS.0 - STRUCTURES_OFFSET) as usize;

const MANUFACTURER: &str = "ballast";
const PRODUCT: &str = "ballast";

/// Writes entry point and structures into guest memory. Called on the VMM thread for each boot.
pub fn write_tables(ram: &GuestRam, platform: &PlatformConfig) -> Result<(), Error> {
    let structures = structures(platform)?;
    let address = GuestAddress(layout::SMBIOS.0 + STRUCTURES_OFFSET);
    let entry_point = entry_point(structures.len() as u32, address);
    ram.write_slice(&entry_point, layout::SMBIOS)
        .and_then(|()| ram.write_slice(&structures, address))
        .map_err(|e| Error::host("writing SMBIOS tables", e))
}

/// Checks that the strings fit into the tables, for `vm.create`.
pub fn check(platform: &PlatformConfig) -> Result<(), Invalid> {
    structures(platform).map(drop)
}

/// The 64-bit entry point (§5.2.2).
fn entry_point(structures_bytes: u32, structures: GuestAddress) -> [u8; ENTRY_POINT_BYTES] {
    let mut entry = [0; ENTRY_POINT_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| {
        for (slot, byte) in entry.iter_mut().skip(offset).zip(bytes) {
            *slot = *byte;
        }
    };
    put(0, b"_SM3_");
    put(6, &[ENTRY_POINT_BYTES as u8, 3, 2, 0, 1]);
    put(12, &structures_bytes.to_le_bytes());
    put(16, &structures.0.to_le_bytes());
    let sum = entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = entry.get_mut(5) {
        *checksum = sum.wrapping_neg();
    }
    entry
}

fn structures(platform: &PlatformConfig) -> Result<Vec<u8>, Invalid> {
    let mut table = Table::default();
    let or = |string: &Option<String>, default: &str| {
        Some(string.clone().unwrap_or_else(|| default.to_owned()))
    };

    // Firmware (§7.1): vendor, version, segment, date, size, characteristics and their extension:
    // of all there is to say only "virtual machine".
    table.begin(0);
    table.string(Some(MANUFACTURER.into()));
    table.string(Some(env!("CARGO_PKG_VERSION").into()));
    table.bytes(&0xe800u16.to_le_bytes());
    table.string(Some("01/01/2026".into()));
    table.bytes(&[0]);
    table.bytes(&(1u64 << 3).to_le_bytes());
    table.bytes(&[0, 1 << 4]);
    table.bytes(&[0, 0, 0xff, 0xff]);
    table.bytes(&[0, 0]);
    table.end();

    // System (§7.2).
    table.begin(1);
    table.string(or(&platform.system_manufacturer, MANUFACTURER));
    table.string(or(&platform.system_product_name, PRODUCT));
    table.string(platform.system_version.clone());
    table.string(platform.system_serial_number.clone());
    table.bytes(&uuid(platform));
    const POWER_SWITCH: u8 = 6;
    table.bytes(&[POWER_SWITCH]);
    table.string(platform.system_sku_number.clone());
    table.string(platform.system_family.clone());
    table.end();

    // Chassis (§7.4): type, version, serial number, asset tag, states, OEM data, height, cords,
    // elements and their length, SKU.
    table.begin(3);
    table.string(or(&platform.system_manufacturer, MANUFACTURER));
    const OTHER: u8 = 1;
    table.bytes(&[OTHER]);
    table.string(None);
    table.string(None);
    table.string(platform.chassis_asset_tag.clone());
    const SAFE: u8 = 3;
    const UNKNOWN: u8 = 2;
    table.bytes(&[SAFE, SAFE, SAFE, UNKNOWN]);
    table.bytes(&[0; 8]);
    table.string(None);
    table.end();

    if let Some(strings) = platform.oem_strings.as_deref().filter(|s| !s.is_empty()) {
        table.begin(11);
        // At most 255, by the configuration's validation.
        table.bytes(&[u8::try_from(strings.len()).unwrap_or(u8::MAX)]);
        for string in strings.iter().take(u8::MAX.into()) {
            table.just_string(string);
        }
        table.end();
    }

    table.begin(127);
    table.end();
    if table.finished.len() > STRUCTURES_MAX_BYTES {
        return Err(Invalid::new(
            "platform",
            format!(
                "its strings take {} bytes of SMBIOS tables, and {STRUCTURES_MAX_BYTES} is all there is room for",
                table.finished.len()
            ),
        ));
    }
    Ok(table.finished)
}

/// The UUID as SMBIOS wants it (§7.2.1): the first three fields little-endian, all zeroes when
/// there is none.
fn uuid(platform: &PlatformConfig) -> [u8; 16] {
    let mut uuid = platform.uuid_bytes().unwrap_or_default();
    uuid[0..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    uuid
}

/// Structures under construction: formatted area first, then its strings, then an empty one
/// (§6.1.3).
#[derive(Default)]
struct Table {
    finished: Vec<u8>,
    handle: u16,
    formatted: Vec<u8>,
    strings: Vec<u8>,
    count: u8,
}

impl Table {
    fn begin(&mut self, kind: u8) {
        self.formatted = vec![kind, 0];
        self.formatted.extend(self.handle.to_le_bytes());
        self.handle += 1;
        self.strings.clear();
        self.count = 0;
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.formatted.extend(bytes);
    }

    /// A reference to a string, 0 for none.
    fn string(&mut self, string: Option<String>) {
        match string {
            Some(string) => {
                self.just_string(&string);
                self.formatted.push(self.count);
            }
            None => self.formatted.push(0),
        }
    }

    /// A string that nothing in the formatted area refers to.
    fn just_string(&mut self, string: &str) {
        self.strings.extend(string.as_bytes());
        self.strings.push(0);
        self.count = self.count.saturating_add(1);
    }

    fn end(&mut self) {
        // No formatted area of ours has more than 0x1b bytes.
        let len = self.formatted.len() as u8;
        if let Some(length) = self.formatted.get_mut(1) {
            *length = len;
        }
        self.finished.append(&mut self.formatted);
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        self.finished.append(&mut self.strings);
        self.finished.push(0);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::GuestMemoryMmap;

    use super::*;

    /// Type, formatted area and strings of each structure, read as a guest does.
    fn read(platform: &PlatformConfig) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let ram: GuestRam =
            Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap());
        write_tables(&ram, platform).unwrap();
        let mut area = vec![0; 0x10000];
        ram.read_slice(&mut area, GuestAddress(0xf0000)).unwrap();
        let entry = (0..area.len())
            .step_by(16)
            .find(|at| area[*at..].starts_with(b"_SM3_"))
            .map(|at| &area[at..at + ENTRY_POINT_BYTES])
            .unwrap();
        assert_eq!(entry[6] as usize, ENTRY_POINT_BYTES);
        assert_eq!(entry.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
        let len = u32::from_le_bytes(entry[12..16].try_into().unwrap()) as usize;
        let at = u64::from_le_bytes(entry[16..24].try_into().unwrap()) as usize - 0xf0000;
        let mut rest = &area[at..at + len];
        let mut structures = Vec::new();
        while !rest.is_empty() {
            let (formatted, tail) = rest.split_at(rest[1].into());
            let end = tail.windows(2).position(|w| w == [0, 0]).unwrap();
            let strings = tail[..end]
                .split(|byte| *byte == 0)
                .map(|s| String::from_utf8(s.to_vec()).unwrap())
                .collect();
            structures.push((formatted[0], formatted.to_vec(), strings));
            rest = &tail[end + 2..];
        }
        structures
    }

    #[test]
    fn the_defaults_name_us_and_nothing_else() {
        let structures = read(&PlatformConfig::default());
        let kinds: Vec<u8> = structures.iter().map(|s| s.0).collect();
        assert_eq!(kinds, [0, 1, 3, 127]);
        let lengths: Vec<usize> = structures.iter().map(|s| s.1.len()).collect();
        assert_eq!(lengths, [0x1a, 0x1b, 0x16, 4]);
        assert_eq!(structures[1].2, ["ballast", "ballast"]);
        assert_eq!(structures[1].1[8..24], [0; 16]);
    }

    #[test]
    fn every_field_of_the_platform_is_where_the_guest_looks_for_it() {
        let platform = PlatformConfig {
            system_uuid: Some("00112233-4455-6677-8899-aabbccddeeff".into()),
            system_serial_number: Some("serial".into()),
            system_manufacturer: Some("maker".into()),
            system_product_name: Some("product".into()),
            system_version: Some("version".into()),
            system_family: Some("family".into()),
            system_sku_number: Some("sku".into()),
            chassis_asset_tag: Some("tag".into()),
            oem_strings: Some(vec!["first".into(), "second=ü".into()]),
            ..PlatformConfig::default()
        };
        let structures = read(&platform);
        let (_, system, strings) = &structures[1];
        let field = |offset: usize| strings[usize::from(system[offset]) - 1].as_str();
        assert_eq!(
            [4, 5, 6, 7, 0x19, 0x1a].map(field),
            ["maker", "product", "version", "serial", "sku", "family"]
        );
        assert_eq!(
            system[8..24],
            [
                0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd,
                0xee, 0xff
            ]
        );
        let (_, chassis, strings) = &structures[2];
        assert_eq!(strings[usize::from(chassis[8]) - 1], "tag");
        let (kind, oem, strings) = &structures[3];
        assert_eq!((*kind, oem[4]), (11, 2));
        assert_eq!(strings, &["first", "second=ü"]);
    }

    #[test]
    fn more_strings_than_fit_below_1_mib_are_refused() {
        let platform = PlatformConfig {
            oem_strings: Some(vec!["x".repeat(256); 255]),
            ..PlatformConfig::default()
        };
        assert_eq!(check(&platform).unwrap_err().field, "platform");
        let platform = PlatformConfig {
            oem_strings: Some(vec!["x".repeat(250); 255]),
            ..PlatformConfig::default()
        };
        check(&platform).unwrap();
        assert_eq!(read(&platform)[3].2.len(), 255);
    }
}

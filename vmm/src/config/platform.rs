//! What the guest reads about the machine in its SMBIOS tables.

use devices::config::Invalid;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Identity of the machine (SMBIOS 3.2: types 1, 3 and 11).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlatformConfig {
    /// PCI segments; there is one.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 1)]
    pub num_pci_segments: u16,
    /// System serial number.
    #[serde(
        default,
        alias = "serial_number",
        skip_serializing_if = "Option::is_none"
    )]
    pub system_serial_number: Option<String>,
    /// System UUID.
    #[serde(default, alias = "uuid", skip_serializing_if = "Option::is_none")]
    #[schema(example = "00112233-4455-6677-8899-aabbccddeeff")]
    pub system_uuid: Option<String>,
    /// OEM strings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oem_strings: Option<Vec<String>>,
    /// System manufacturer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_manufacturer: Option<String>,
    /// System product name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_product_name: Option<String>,
    /// System version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_version: Option<String>,
    /// System family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_family: Option<String>,
    /// System SKU number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_sku_number: Option<String>,
    /// Chassis asset tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chassis_asset_tag: Option<String>,
}

fn one() -> u16 {
    1
}

impl Default for PlatformConfig {
    fn default() -> Self {
        Self {
            num_pci_segments: 1,
            system_serial_number: None,
            system_uuid: None,
            oem_strings: None,
            system_manufacturer: None,
            system_product_name: None,
            system_version: None,
            system_family: None,
            system_sku_number: None,
            chassis_asset_tag: None,
        }
    }
}

/// Longest string we put into a table; SMBIOS knows no limit, guests do.
const STRING_MAX_BYTES: usize = 256;
/// Most OEM strings; the table counts them in a byte.
const OEM_STRINGS_MAX: usize = 255;

impl PlatformConfig {
    /// The UUID's bytes in the order of its text.
    pub fn uuid_bytes(&self) -> Option<[u8; 16]> {
        parse_uuid(self.system_uuid.as_deref()?)
    }

    pub(super) fn validate(&self) -> Result<(), Invalid> {
        if self.num_pci_segments != 1 {
            return Err(Invalid::new(
                "num_pci_segments",
                "not supported yet: there is only one segment",
            ));
        }
        if self.system_uuid.is_some() && self.uuid_bytes().is_none() {
            return Err(Invalid::new(
                "system_uuid",
                "must look like 00112233-4455-6677-8899-aabbccddeeff",
            ));
        }
        let strings = [
            ("system_serial_number", &self.system_serial_number),
            ("system_manufacturer", &self.system_manufacturer),
            ("system_product_name", &self.system_product_name),
            ("system_version", &self.system_version),
            ("system_family", &self.system_family),
            ("system_sku_number", &self.system_sku_number),
            ("chassis_asset_tag", &self.chassis_asset_tag),
        ];
        for (field, string) in strings {
            if let Some(string) = string {
                check_string(field, string)?;
            }
        }
        if let Some(oem) = &self.oem_strings {
            if oem.len() > OEM_STRINGS_MAX {
                return Err(Invalid::new("oem_strings", "must be at most 255"));
            }
            for (index, string) in oem.iter().enumerate() {
                check_string(&format!("oem_strings[{index}]"), string)?;
            }
        }
        Ok(())
    }
}

fn check_string(field: &str, string: &str) -> Result<(), Invalid> {
    if string.is_empty() || string.len() > STRING_MAX_BYTES || string.contains('\0') {
        return Err(Invalid::new(
            field,
            "must have 1 to 256 bytes, none of them NUL",
        ));
    }
    Ok(())
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let groups: Vec<&str> = text.split('-').collect();
    if groups.iter().map(|g| g.len()).ne([8, 4, 4, 4, 12]) {
        return None;
    }
    let digits = groups.concat();
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks(2)) {
        let pair = std::str::from_utf8(pair).ok()?;
        if !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(bytes)
}

//! A balloon's configuration.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::pages::{PAGE, REACH};
use crate::config::{Invalid, PciCommon};

/// A virtio balloon: memory that the guest is asked to leave to the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BalloonConfig {
    #[serde(flatten)]
    #[allow(missing_docs)]
    pub common: PciCommon,
    /// Bytes the guest is asked to give up: a multiple of 4096; with those of the other balloons
    /// less than its RAM.
    #[schema(example = 268435456)]
    pub size: u64,
    /// Let the guest take pages back by itself rather than kill a process for lack of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Have the guest tell, all the time, which pages it does not use, and give them back to the
    /// host. Only one balloon of a VM can, as Linux accepts but one.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// Let the balloon be inflated although `memory.prefault` has just filled all memory. Each
    /// undoes the other, so without this it is refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub inflate_prefaulted: bool,
}

impl BalloonConfig {
    /// Checks all that can be known without looking at the VM.
    pub fn validate(&self) -> Result<(), Invalid> {
        validate_size(self.size).map_err(|reason| Invalid::new("size", reason))
    }
}

/// Checks a target by itself; what is wrong with it.
pub fn validate_size(bytes: u64) -> Result<(), String> {
    if !bytes.is_multiple_of(PAGE) {
        return Err(format!("{bytes} is not a multiple of {PAGE} bytes"));
    }
    // Its number of pages has 32 bits.
    if bytes >= REACH {
        return Err("must be less than 16 TiB".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_whole_pages_that_32_bits_can_count() {
        for bytes in [0, 4096, REACH - PAGE] {
            validate_size(bytes).unwrap();
        }
        for bytes in [1, 4095, 4097, REACH, u64::MAX] {
            validate_size(bytes).unwrap_err();
        }
    }
}

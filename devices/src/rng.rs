//! The virtio entropy device (virtio 1.3 §5.4).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::{BuildContext, BuildError, Invalid, PciCommon};
use crate::virtio::VirtioDevice;
use crate::worker::Worker;

/// A virtio entropy device and where its bytes come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RngConfig {
    #[serde(flatten)]
    #[allow(missing_docs)]
    pub common: PciCommon,
    /// A character device or file to read from.
    #[schema(value_type = String)]
    pub src: PathBuf,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            common: PciCommon::default(),
            src: "/dev/urandom".into(),
        }
    }
}

impl RngConfig {
    /// Checks all that can be known without looking at the host.
    pub fn validate(&self) -> Result<(), Invalid> {
        if self.src.as_os_str().is_empty() {
            return Err(Invalid::new("src", "must not be empty"));
        }
        Ok(())
    }
}

/// A virtio entropy device.
pub struct Rng {}

impl Rng {
    /// Opens the source and starts the thread.
    pub fn new(_config: &RngConfig, _context: BuildContext) -> Result<Self, BuildError> {
        todo!()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        4
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn write_config(&self, _offset: u64, _data: &[u8]) {}
    fn workers(&self) -> &[Worker] {
        todo!()
    }
}

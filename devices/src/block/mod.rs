//! The virtio block device (virtio 1.3 §5.2).

mod config;

pub use config::{DiskConfig, ImageType, LockGranularity};

use crate::config::{BuildContext, BuildError};
use crate::virtio::VirtioDevice;
use crate::worker::Worker;

/// A virtio block device.
pub struct Block {}

impl Block {
    /// Opens the image and starts a thread per queue.
    pub fn new(_config: &DiskConfig, _context: BuildContext) -> Result<Self, BuildError> {
        todo!()
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u16 {
        2
    }
    fn features(&self) -> u64 {
        todo!()
    }
    fn queue_sizes(&self) -> &[u16] {
        todo!()
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {
        todo!()
    }
    fn write_config(&self, _offset: u64, _data: &[u8]) {
        todo!()
    }
    fn workers(&self) -> &[Worker] {
        todo!()
    }
}

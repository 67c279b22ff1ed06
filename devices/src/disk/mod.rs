//! Disk image engines: they know nothing of virtio.

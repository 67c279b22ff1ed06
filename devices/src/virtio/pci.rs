//! The virtio PCI transport, modern only (virtio 1.3 §4.1).

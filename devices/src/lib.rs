//! Guest-visible hardware: virtio and PCI devices, legacy devices, the ACPI event devices and the
//! disk engines, each worker on its own sandboxed thread.
//!
//! This crate knows nothing of KVM, HTTP or any async runtime. What a device needs of the machine
//! it is plugged into stands in [`machine`]; `vmm` implements that over KVM, tests in memory.
//!
//! A device is two things: one shared object that the guest (through registers) and the host both
//! touch, made of atomics; and one or more [`worker::Worker`]s, each a sandboxed thread that owns
//! the device's queues while the driver is running.

pub mod acpi;
pub mod balloon;
pub mod block;
pub mod bus;
pub mod config;
pub mod disk;
pub mod event;
pub mod guest_memory;
pub mod legacy;
pub mod machine;
pub mod pci;
pub mod rate_limiter;
pub mod rng;
pub mod sandbox;
pub mod signals;
pub mod throttle;
pub mod timer;
pub mod virtio;
pub mod worker;

//! One virtual machine, driven by one thread. Every KVM descriptor lives in this crate; it knows
//! nothing of HTTP or JSON.
//!
//! Whatever can change the VM is a [`command::Message`] in one inbox, read by the VMM thread
//! ([`vmm`]). State is published: [`status`] and [`event`] can be read without asking that thread.

pub mod acpi;
pub mod balloons;
pub mod boot;
pub mod command;
pub mod config;
pub mod consoles;
pub mod cpuid;
pub mod created;
pub mod device_manager;
pub mod disks;
pub mod error;
pub mod event;
pub mod interrupts;
pub mod ioctls;
pub mod jobs;
pub mod layout;
pub mod memory;
pub mod overcommit;
pub mod state;
pub mod status;
pub mod syscalls;
pub mod vcpu;
pub mod vm;
pub mod vmm;

pub use command::{Command, Handle};
pub use error::Error;

//! From files to a machine about to run its first instruction.
//!
//! ```text
//! vm.create:  Payload::open   the files exist, are what they should be, and fit
//! vm.boot:    open_kvm, create_vm   an empty machine
//!             load            kernel and initramfs into RAM, boot structures beside them
//!             vcpu            the boot CPU at the entry point, the others waiting
//! ```

mod entry;
mod image;
mod kvm;
mod load;
mod map;
mod payload;
pub mod reset_vector;
pub mod smbios;
#[cfg(test)]
pub(crate) mod test_payload;

pub use entry::{Entry, Protocol};
pub(crate) use entry::{registers, special_registers};
pub use kvm::{create_vm, open_kvm};
pub use load::load;
pub use payload::Payload;

/// What the functions of this module call beyond [`devices::sandbox::COMMON`].
pub const SYSCALLS: &[&[devices::sandbox::Allow]] = &[kvm::SYSCALLS, payload::SYSCALLS];

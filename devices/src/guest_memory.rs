//! The guest's RAM as devices see it.
//!
//! All access goes through `vm-memory`, which checks every guest address against the regions and
//! treats the bytes as volatile: the guest may change them at any moment.

use std::sync::Arc;

pub mod discard;

/// Guest RAM: cheap to clone, checked on every access.
pub type GuestRam = Arc<vm_memory::GuestMemoryMmap>;

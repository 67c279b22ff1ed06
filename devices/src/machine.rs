//! What a PCI device needs of the machine it is plugged into.
//!
//! `vmm` implements these over KVM (irqfd, GSI routing, ioeventfd); tests implement them in
//! memory.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// One message-signalled interrupt: an eventfd that, once routed, interrupts the guest.
///
/// The route is given back when the last reference is dropped.
pub trait MsiVector: Send + Sync {
    /// Sets the message (PCI local bus specification 3.0 §6.8.1) that [`MsiVector::trigger`]
    /// delivers. Called on vCPU threads.
    fn route(&self, address: u64, data: u32) -> io::Result<()>;
    /// Delivers the interrupt. Called on any thread; one `write` system call.
    fn trigger(&self) -> io::Result<()>;
}

/// The machine as a PCI device sees it.
pub trait Machine: Send + Sync {
    /// Makes `count` interrupt vectors, unrouted. Called on the VMM thread.
    fn allocate_msi(&self, count: u16) -> io::Result<Vec<Arc<dyn MsiVector>>>;
    /// From now on a guest write to the physical `address`, of any width, signals `doorbell`
    /// instead of reaching the bus. Called on vCPU threads, when the guest places a BAR.
    fn bind_doorbell(&self, address: u64, doorbell: &EventFd) -> io::Result<()>;
    /// Undoes [`Machine::bind_doorbell`].
    fn unbind_doorbell(&self, address: u64, doorbell: &EventFd) -> io::Result<()>;
}

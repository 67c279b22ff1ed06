//! Memory overcommit inside one VM: who decides how large its balloon is, and from what;
//! and what the VM truly costs, on disks too.
//!
//! What is read comes from files of the kernel under /proc, /sys and the cgroup, which differ from
//! kernel to kernel: a file or line that is not there is told as such and never counted as 0.
//! Everything is parsed by pure functions over text of bounded length.

pub mod admission;
pub mod cgroup;
pub mod control;
pub mod cost;
pub mod cpu;
pub mod files;
pub mod governor;
pub mod ksm;
pub mod ledger;
pub mod pressure;
pub mod psi;
pub mod reading;
pub mod storage;
pub mod triggers;
pub mod view;

use self::reading::{Neighbours, Own};

/// How this VM and the others on the host know of one another.
///
/// The decision is made while the others are kept from making theirs, so that no two of them give
/// away the same memory.
pub trait Coordinator: Send {
    /// Calls `decide` with what the others tell, and tells them what it returns. Where they can't
    /// be asked (an error is logged once), `decide` is called as for one VM alone.
    fn exchange(&mut self, decide: &mut dyn FnMut(&Neighbours) -> Own);

    /// What the others told not long ago: enough to find that there is nothing to do, which needs
    /// nobody to wait. `None` where they have to be asked again.
    fn recent(&self) -> Option<Neighbours> {
        None
    }

    /// Tells the others after a look that came to nothing; they may be deciding.
    fn tell(&mut self, _own: Own) {}
}

/// A VM that knows of no other.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Coordinator for Alone {
    fn exchange(&mut self, decide: &mut dyn FnMut(&Neighbours) -> Own) {
        decide(&Neighbours::default());
    }
}

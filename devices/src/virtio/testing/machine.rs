//! A machine that records what devices do to it.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use crate::machine::{Machine, MsiVector};

/// An interrupt vector that counts.
#[derive(Default)]
pub struct TestVector {
    route: Mutex<Option<(u64, u32)>>,
    fired: AtomicU64,
}

impl TestVector {
    /// Address and data of the message it delivers.
    pub fn message(&self) -> Option<(u64, u32)> {
        *self.route.lock().unwrap()
    }

    /// How often it was delivered.
    pub fn fired(&self) -> u64 {
        self.fired.load(Ordering::SeqCst)
    }
}

impl MsiVector for TestVector {
    fn route(&self, address: u64, data: u32) -> io::Result<()> {
        *self.route.lock().unwrap() = Some((address, data));
        Ok(())
    }

    fn trigger(&self) -> io::Result<()> {
        self.fired.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A machine in memory.
#[derive(Default)]
pub struct TestMachine {
    vectors: Mutex<Vec<Arc<TestVector>>>,
    doorbells: Mutex<BTreeMap<u64, EventFd>>,
    /// Refuse to bind doorbells, so that notifications come by way of the BAR.
    pub refuse_doorbells: AtomicBool,
}

impl TestMachine {
    /// All vectors ever made, in order: for each device one per queue, then one for its
    /// configuration, if it was plugged by [`super::TestGuest`].
    pub fn vectors(&self) -> Vec<Arc<TestVector>> {
        self.vectors.lock().unwrap().clone()
    }

    /// Addresses with a doorbell, ascending.
    pub fn doorbells(&self) -> Vec<u64> {
        self.doorbells.lock().unwrap().keys().copied().collect()
    }

    /// What KVM does on a guest's write: rings a doorbell bound to the address; `false` where
    /// there is none.
    pub fn ring(&self, address: u64) -> bool {
        match self.doorbells.lock().unwrap().get(&address) {
            Some(doorbell) => doorbell.write(1).is_ok(),
            None => false,
        }
    }
}

impl Machine for TestMachine {
    fn allocate_msi(&self, count: u16) -> io::Result<Vec<Arc<dyn MsiVector>>> {
        let mut all = self.vectors.lock().unwrap();
        let first = all.len();
        all.extend((0..count).map(|_| Arc::default()));
        Ok(all[first..].iter().map(|v| v.clone() as _).collect())
    }

    fn bind_doorbell(&self, address: u64, doorbell: &EventFd) -> io::Result<()> {
        if self.refuse_doorbells.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut doorbells = self.doorbells.lock().unwrap();
        if doorbells.contains_key(&address) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        doorbells.insert(address, doorbell.try_clone()?);
        Ok(())
    }

    fn unbind_doorbell(&self, address: u64, _: &EventFd) -> io::Result<()> {
        match self.doorbells.lock().unwrap().remove(&address) {
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

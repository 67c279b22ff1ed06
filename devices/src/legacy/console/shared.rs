//! What a character device and its console thread share: the output ring and the way to the guest.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A device that takes input; called on the console thread.
pub(crate) trait InputPort: Send + Sync {
    /// Takes as many bytes as there is room for, and says how many. When they are not all taken,
    /// the port calls [`Shared::wake`] once there is room again.
    fn offer(&self, bytes: &[u8]) -> usize;
}

/// The bytes on their way to the host, and what both sides need to know of one another.
///
/// The wake-up is a latch: the device writes the eventfd only when the thread has said that it
/// saw everything ([`Shared::rearm`]). A thread that is writing, lingering or blocked costs a vCPU
/// nothing but the push.
pub(crate) struct Shared {
    output: Mutex<Output>,
    wake: EventFd,
    port: Mutex<Option<Weak<dyn InputPort>>>,
    /// The most bytes kept; 0 throws all output away.
    bound: usize,
    discarding: AtomicBool,
    dropped: AtomicU64,
    written: AtomicBool,
}

#[derive(Default)]
struct Output {
    bytes: VecDeque<u8>,
    /// The thread has been told, or is still looking.
    told: bool,
}

/// Above this the ring gives memory back once it has been emptied.
const KEPT_CAPACITY: usize = 16 << 10;

impl Shared {
    pub(super) fn new(bound: usize) -> io::Result<Self> {
        Ok(Self {
            output: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            port: Mutex::new(None),
            bound,
            discarding: AtomicBool::new(bound == 0),
            dropped: AtomicU64::new(0),
            written: AtomicBool::new(false),
        })
    }

    /// Takes the guest's output; called on vCPU threads. When the ring is full the oldest bytes
    /// go: the end of a log is worth more than its middle.
    pub(crate) fn push(&self, bytes: &[u8]) {
        if self.discarding.load(Ordering::Relaxed) {
            return;
        }
        let mut dropped = 0;
        let told = {
            let mut output = self.lock();
            for &byte in bytes {
                if output.bytes.len() >= self.bound {
                    output.bytes.pop_front();
                    dropped += 1;
                }
                output.bytes.push_back(byte);
            }
            std::mem::replace(&mut output.told, true)
        };
        if dropped > 0 {
            self.count_dropped(dropped);
        }
        if !told {
            self.wake();
        }
    }

    /// Moves up to `most` bytes to the end of `chunk`.
    pub(super) fn take(&self, most: usize, chunk: &mut Vec<u8>) -> usize {
        let mut output = self.lock();
        let count = output.bytes.len().min(most);
        chunk.extend(output.bytes.drain(..count));
        if output.bytes.is_empty() && output.bytes.capacity() > KEPT_CAPACITY {
            output.bytes.shrink_to(KEPT_CAPACITY);
        }
        count
    }

    /// Asks for a wake-up at the next byte; `false` when there are bytes already.
    pub(super) fn rearm(&self) -> bool {
        let mut output = self.lock();
        output.told = !output.bytes.is_empty();
        !output.told
    }

    /// Nobody will ever read: what comes is thrown away from now on, and not counted.
    pub(super) fn discard(&self) {
        self.discarding.store(true, Ordering::Relaxed);
        self.lock().bytes = VecDeque::new();
    }

    /// Something has reached the host.
    pub(super) fn set_written(&self) {
        self.written.store(true, Ordering::Relaxed);
    }

    pub(super) fn written(&self) -> bool {
        self.written.load(Ordering::Relaxed)
    }

    pub(super) fn count_dropped(&self, bytes: usize) {
        self.dropped.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Has the thread look at both directions.
    pub(crate) fn wake(&self) {
        // An eventfd write fails only when the counter is full, and then it wakes anyway.
        let _ = self.wake.write(1);
    }

    pub(super) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// Input goes to `port` from now on, for as long as it lives.
    pub(crate) fn attach(&self, port: Weak<dyn InputPort>) {
        *self.port.lock().unwrap_or_else(PoisonError::into_inner) = Some(port);
        self.wake();
    }

    pub(super) fn port(&self) -> Option<Arc<dyn InputPort>> {
        self.port
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()?
            .upgrade()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_of_bytes_wakes_the_thread_once() {
        let shared = Shared::new(1000).unwrap();
        for byte in 0..100 {
            shared.push(&[byte]);
        }
        assert_eq!(shared.wake_fd().read().unwrap(), 1);
        let mut chunk = Vec::new();
        assert_eq!(shared.take(60, &mut chunk), 60);
        assert!(!shared.rearm());
        shared.push(b"x");
        assert!(shared.wake_fd().read().is_err(), "it is still looking");
        assert_eq!(shared.take(60, &mut chunk), 41);
        assert!(shared.rearm());
        shared.push(b"x");
        assert_eq!(shared.wake_fd().read().unwrap(), 1);
    }

    #[test]
    fn a_full_ring_keeps_the_newest_bytes_and_counts_the_others() {
        let shared = Shared::new(4).unwrap();
        shared.push(b"abcdefg");
        let mut chunk = Vec::new();
        shared.take(100, &mut chunk);
        assert_eq!((chunk.as_slice(), shared.dropped()), (&b"defg"[..], 3));
    }
}

//! What an image, on the VMM thread, and its queue, on a thread of its own, have in common.
//!
//! The image leaves an order and has the queue's thread look ([`crate::disk::Queue::attend`]); the
//! lock is held to put one in or take one out, never while anybody waits.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;

use super::super::super::dirty::DirtyMap;
use super::super::super::steps::{Reply, Step, Steps};
use super::lock::locked;

/// How long the VMM thread waits for the queue's.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Nobody has looked.
const UNKNOWN: u64 = u64::MAX;

/// Why a disk has not become larger.
#[derive(Debug)]
pub enum GrowError {
    /// It can't.
    Refused(String),
    /// The host failed.
    Host(io::Error),
}

impl From<io::Error> for GrowError {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

/// What the queue's thread is to do.
pub enum Order {
    /// Have the disk grow to so many bytes.
    Grow(u64, GrowReply),
    /// A step of a job.
    Step(Step, Reply),
}

/// Where the end of it is told.
pub struct GrowReply(SyncSender<Result<(), GrowError>>);

impl GrowReply {
    /// It is done, or could not be.
    pub fn done(&self, result: Result<(), GrowError>) {
        // Nobody may be waiting any more.
        let _ = self.0.try_send(result);
    }
}

impl Order {
    /// It is not even begun.
    pub fn refuse(self, error: Errno) {
        match self {
            Self::Grow(_, reply) => reply.done(Err(GrowError::Host(error.into()))),
            Self::Step(_, reply) => reply.tell(Err(error.into())),
        }
    }
}

/// See the module.
pub struct Control {
    size_bytes: AtomicU64,
    /// Clusters that are known to leak.
    leaks: AtomicU64,
    /// Those that were returned.
    returned: AtomicU64,
    numbers: AtomicU64,
    orders: Mutex<VecDeque<(u64, Order)>>,
    /// Somebody else goes on with the file.
    handed_over: AtomicBool,
    /// What requests change, while a job wants to know.
    pub dirty: Arc<DirtyMap>,
}

impl Control {
    /// Of a disk of this size.
    pub fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes: AtomicU64::new(size_bytes),
            leaks: AtomicU64::new(UNKNOWN),
            returned: AtomicU64::new(0),
            numbers: AtomicU64::new(0),
            orders: Mutex::default(),
            handed_over: AtomicBool::new(false),
            dirty: Arc::default(),
        }
    }

    /// Size of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::SeqCst)
    }

    /// It has a new size. Called on the queue's thread.
    pub fn set_size(&self, size_bytes: u64) {
        self.size_bytes.store(size_bytes, Ordering::SeqCst);
    }

    /// Clusters that are known to leak; `None` before they have been searched for.
    pub fn leaks(&self) -> Option<u64> {
        let leaks = self.leaks.load(Ordering::SeqCst);
        (leaks != UNKNOWN).then_some(leaks)
    }

    /// How many were returned.
    #[cfg(test)]
    pub fn returned(&self) -> u64 {
        self.returned.load(Ordering::SeqCst)
    }

    /// All are returned, so many. Called on the queue's thread.
    pub fn leaks_returned(&self, count: u64) {
        self.returned.store(count, Ordering::SeqCst);
        self.leaks.store(0, Ordering::SeqCst);
    }

    /// From now on another engine uses the file: this one has written everything, and is to be
    /// closed without another change. Called on the VMM thread while the queue stands still.
    pub fn hand_over(&self) {
        self.handed_over.store(true, Ordering::SeqCst);
    }

    /// Whether that is so.
    pub fn is_handed_over(&self) -> bool {
        self.handed_over.load(Ordering::SeqCst)
    }

    /// An order to be carried out. Called on the queue's thread.
    pub fn next(&self) -> Option<Order> {
        let order = locked(&self.orders).pop_front();
        order.map(|(_, order)| order)
    }

    fn push(&self, order: Order) -> u64 {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        locked(&self.orders).push_back((number, order));
        number
    }

    /// Leaves an order.
    pub fn order(&self, size_bytes: u64) -> (u64, Receiver<Result<(), GrowError>>) {
        let (reply, answer) = sync_channel(1);
        let number = self.push(Order::Grow(size_bytes, GrowReply(reply)));
        (number, answer)
    }

    /// Has the queue's thread make the disk larger, and waits for it. Called on the VMM thread.
    pub fn grow(&self, size_bytes: u64, attend: &dyn Fn()) -> Result<(), GrowError> {
        let (number, answer) = self.order(size_bytes);
        attend();
        let late = match answer.recv_timeout(TIMEOUT) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => return Err(GrowError::Host(Errno::IO.into())),
            Err(RecvTimeoutError::Timeout) => Errno::TIMEDOUT,
        };
        // If it has not been taken out it never will be; else it may still come about.
        self.withdraw(number);
        Err(GrowError::Host(late.into()))
    }
}

impl Steps for Control {
    fn leave(&self, step: Step, reply: Reply) -> u64 {
        self.push(Order::Step(step, reply))
    }

    fn withdraw(&self, number: u64) -> bool {
        let mut orders = locked(&self.orders);
        let found = orders.iter().position(|(its, _)| *its == number);
        let order = found.and_then(|index| orders.remove(index));
        // What is told when it is dropped is told with nothing locked.
        drop(orders);
        order.is_some()
    }
}

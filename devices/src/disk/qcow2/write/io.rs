//! What is asked of the host: reads, writes, syncs and allocations of the image files, each a
//! future that is ready when it is done.
//!
//! An operation owns its buffers from the moment it begins until the host is done with it, whether
//! or not anybody still waits for it. Done by an io_uring, or where the kernel refuses to make one
//! by the threads of a pool, to which operations move, or without one by plain system calls; through
//! the page cache, reads of what is cached and writes are done at once.
//!
//! The rule that makes the `unsafe` code sound: from the moment an entry is pushed into the ring
//! until its completion has been seen, its operation stays in its slot, untouched; [`Io`] leaks the
//! slots when it is dropped earlier.
#![expect(unsafe_code, reason = "hands pointers to an io_uring")]

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use rustix::io::Errno;

use super::super::super::buffers::Buffers;
use super::super::super::pool::Pool;
use super::super::super::ring::Ring;
pub use super::hostop::{HostFile, HostOp, Kind, PUNCH_HOLE};
use super::hostop::{entry, finish, perform};
use super::lock::locked;

enum Slot {
    Free,
    /// The host is at it, or will be. Whoever waits left a waker; nobody does any more once
    /// `abandoned`.
    Busy {
        /// Away while a pool is at it.
        op: Option<HostOp>,
        waker: Option<Waker>,
        abandoned: bool,
    },
    Done(io::Result<()>, Buffers),
}

/// A host that a test plays.
#[cfg(test)]
pub trait Simulation: Send {
    /// An operation begins.
    fn begin(&mut self, number: usize, op: &HostOp);
    /// Does one of those that have begun; its number.
    fn choose(&mut self) -> Option<usize>;
    /// Does it.
    fn perform(&mut self, number: usize, op: &mut HostOp) -> Result<usize, Errno>;
}

/// Who does the operations.
pub enum Backend {
    Ring(Box<Ring>),
    Pool(Box<Pool<HostOp>>),
    Plain,
    #[cfg(test)]
    Simulated(Box<dyn Simulation>),
}

/// See the module.
pub struct Io {
    state: Arc<Mutex<State>>,
}

struct State {
    backend: Backend,
    files: Vec<HostFile>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Operations for which the host has had no room yet.
    backlog: VecDeque<usize>,
    capacity: usize,
    in_flight: usize,
    /// A file system can't tell whether a read would wait.
    no_nowait: bool,
}

/// An operation that has begun.
pub struct Ticket {
    state: Arc<Mutex<State>>,
    number: usize,
    taken: bool,
}

impl Io {
    /// With a ring of `capacity` entries, or a pool that is given so many at a time, the backend's
    /// if it is one.
    pub fn new(backend: Backend, files: Vec<HostFile>, capacity: usize) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                backend,
                files,
                slots: Vec::new(),
                free: Vec::new(),
                backlog: VecDeque::new(),
                capacity,
                in_flight: 0,
                no_nowait: false,
            })),
        }
    }

    /// Readable when there may be something to harvest, where not all is done at once.
    pub fn descriptor(&self) -> Option<std::os::fd::RawFd> {
        match &locked(&self.state).backend {
            Backend::Ring(ring) => Some(ring.descriptor()),
            Backend::Pool(pool) => Some(pool.descriptor()),
            _ => None,
        }
    }

    /// Whether there is a ring.
    pub fn has_ring(&self) -> bool {
        matches!(locked(&self.state).backend, Backend::Ring(_))
    }

    /// Whether all is done at once.
    pub fn is_plain(&self) -> bool {
        matches!(locked(&self.state).backend, Backend::Plain)
    }

    /// Makes the descriptor unreadable until the next completion.
    pub fn acknowledge(&self) {
        match &mut locked(&self.state).backend {
            Backend::Ring(ring) => ring.acknowledge(),
            Backend::Pool(pool) => pool.acknowledge(),
            _ => {}
        }
    }

    /// Begins an operation.
    pub fn begin(&self, op: HostOp) -> Ticket {
        let mut state = locked(&self.state);
        let slot = Slot::Busy {
            op: Some(op),
            waker: None,
            abandoned: false,
        };
        let number = match state.free.pop() {
            Some(number) => {
                state.slots[number] = slot;
                number
            }
            None => {
                state.slots.push(slot);
                state.slots.len() - 1
            }
        };
        state.perform(number);
        Ticket {
            state: self.state.clone(),
            number,
            taken: false,
        }
    }

    /// Has the host begin all that is ready to.
    pub fn start(&self) -> io::Result<()> {
        match &mut locked(&self.state).backend {
            Backend::Ring(ring) => ring.start(),
            _ => Ok(()),
        }
    }

    /// Takes what the host has done; waits for something if `wait` is set and anything is under
    /// way. Whether there was anything.
    pub fn harvest(&self, wait: bool) -> io::Result<bool> {
        let mut state = locked(&self.state);
        let state = &mut *state;
        let mut found = false;
        match &mut state.backend {
            Backend::Plain => return Ok(false),
            Backend::Ring(ring) => ring.fetch()?,
            Backend::Pool(_) => {}
            #[cfg(test)]
            Backend::Simulated(simulation) => {
                let Some(number) = simulation.choose() else {
                    return Ok(false);
                };
                let Some(Slot::Busy { op: Some(op), .. }) = state.slots.get_mut(number) else {
                    return Ok(false);
                };
                let result = simulation.perform(number, op);
                state.in_flight -= 1;
                state.finished(number, result);
                return Ok(true);
            }
        }
        loop {
            while let Some((number, result)) = state.next() {
                found = true;
                state.in_flight = state.in_flight.saturating_sub(1);
                state.finished(number, result);
            }
            while state.in_flight < state.capacity
                && let Some(number) = state.backlog.pop_front()
            {
                state.submit(number);
            }
            if found || !wait || state.in_flight == 0 {
                return Ok(found);
            }
            match &mut state.backend {
                Backend::Ring(ring) => ring.enter(1)?,
                Backend::Pool(pool) => pool.wait(),
                _ => return Ok(found),
            }
        }
    }

    /// How many operations are under way.
    pub fn in_flight(&self) -> usize {
        let state = locked(&self.state);
        state.in_flight + state.backlog.len()
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        let mut state = locked(&self.state);
        if state.in_flight > 0 && matches!(state.backend, Backend::Ring(_)) {
            // The kernel may still write to what these point to.
            std::mem::forget(std::mem::take(&mut state.slots));
        }
    }
}

impl State {
    /// Has the host do an operation, at once or in its own time.
    fn perform(&mut self, number: usize) {
        loop {
            let Some(Slot::Busy { op: Some(op), .. }) = self.slots.get_mut(number) else {
                return;
            };
            let Some(host) = self.files.get(usize::from(op.file)) else {
                return self.done(number, Err(Errno::BADF.into()));
            };
            let plain = match &mut self.backend {
                Backend::Plain => true,
                Backend::Ring(_) | Backend::Pool(_) => false,
                #[cfg(test)]
                Backend::Simulated(simulation) => {
                    self.in_flight += 1;
                    return simulation.begin(number, op);
                }
            };
            let cached = host.direct.is_none();
            let at_once = match op.kind {
                Kind::Truncate => true,
                Kind::Read => cached && !self.no_nowait && !op.apart,
                Kind::Write => cached,
                Kind::Sync | Kind::Allocate | Kind::Punch => false,
            };
            if !plain && !at_once {
                break;
            }
            match perform(&host.file, op, !plain) {
                Err(Errno::AGAIN) if !plain => break,
                Err(Errno::OPNOTSUPP) if !plain && op.kind == Kind::Read => {
                    self.no_nowait = true;
                    break;
                }
                result => match finish(op, host, result) {
                    None => {}
                    Some(result) => return self.done(number, result),
                },
            }
        }
        if self.in_flight < self.capacity {
            self.submit(number);
        } else {
            self.backlog.push_back(number);
        }
    }

    fn submit(&mut self, number: usize) {
        let Some(Slot::Busy { op: slot, .. }) = self.slots.get_mut(number) else {
            return;
        };
        let (ring, op) = match (&mut self.backend, &*slot) {
            (Backend::Ring(ring), Some(op)) => (ring, op),
            (Backend::Pool(pool), Some(_)) => {
                if let Some(op) = slot.take() {
                    pool.push(number, op);
                    self.in_flight += 1;
                }
                return;
            }
            _ => return,
        };
        let entry = entry(op).user_data(number as u64);
        // SAFETY: the entry points to memory that the op's buffers keep alive, and the op stays in
        // its slot until the completion is seen (see the module). That the vector of slots moves
        // moves the op, but not what it points to: the array of parts is on the heap.
        if unsafe { ring.push(&entry) } {
            self.in_flight += 1;
        } else {
            // Can't be: there is room for `capacity`.
            self.done(number, Err(Errno::BUSY.into()));
        }
    }

    /// An operation of which the host has done a step, and the result.
    fn next(&mut self) -> Option<(usize, Result<usize, Errno>)> {
        match &mut self.backend {
            Backend::Ring(ring) => ring.next().map(|(number, done)| (number as usize, done)),
            Backend::Pool(pool) => {
                let (number, op, result) = pool.take()?;
                if let Some(Slot::Busy { op: slot, .. }) = self.slots.get_mut(number) {
                    *slot = Some(op);
                }
                Some((number, result))
            }
            _ => None,
        }
    }

    /// Takes the result of a step that the host has done in its own time.
    fn finished(&mut self, number: usize, result: Result<usize, Errno>) {
        let Some(Slot::Busy { op: Some(op), .. }) = self.slots.get_mut(number) else {
            return;
        };
        let Some(host) = self.files.get(usize::from(op.file)) else {
            return;
        };
        match finish(op, host, result) {
            None => self.perform(number),
            Some(result) => self.done(number, result),
        }
    }

    fn done(&mut self, number: usize, result: io::Result<()>) {
        let Some(slot) = self.slots.get_mut(number) else {
            return;
        };
        let Slot::Busy {
            op,
            waker,
            abandoned,
        } = std::mem::replace(slot, Slot::Free)
        else {
            return;
        };
        if abandoned {
            self.free.push(number);
            return;
        }
        let buffers = op.map(|op| op.buffers).unwrap_or_default();
        *slot = Slot::Done(result, buffers);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Ticket {
    /// Waits until it is done; gives the buffers back, of which nothing is left.
    pub async fn wait(mut self) -> (io::Result<()>, Buffers) {
        poll_fn(|context| {
            let mut state = locked(&self.state);
            let state = &mut *state;
            let Some(slot) = state.slots.get_mut(self.number) else {
                return Poll::Ready((Err(Errno::IO.into()), Buffers::default()));
            };
            match std::mem::replace(slot, Slot::Free) {
                Slot::Done(result, buffers) => {
                    state.free.push(self.number);
                    self.taken = true;
                    Poll::Ready((result, buffers))
                }
                Slot::Busy { op, abandoned, .. } => {
                    *slot = Slot::Busy {
                        op,
                        waker: Some(context.waker().clone()),
                        abandoned,
                    };
                    Poll::Pending
                }
                Slot::Free => Poll::Ready((Err(Errno::IO.into()), Buffers::default())),
            }
        })
        .await
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let mut state = locked(&self.state);
        let state = &mut *state;
        match state.slots.get_mut(self.number) {
            Some(Slot::Busy { abandoned, .. }) => *abandoned = true,
            Some(slot @ Slot::Done(..)) => {
                *slot = Slot::Free;
                state.free.push(self.number);
            }
            _ => {}
        }
    }
}

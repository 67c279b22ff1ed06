//! One engine for the queues of several threads.
//!
//! ```text
//!   thread of a queue                              thread of the engine
//!   Spoke ── start ──► submitted ── wake ──► Hub::attend ── push, start ──► engine
//!     ▲                                                                       │
//!     └──── poll, wait ◄── done ◄── eventfd, or condvar ◄── Hub::poll ◄───────┘
//! ```
//!
//! A disk whose queues have a thread each, every one with an engine of its own, may come to an image
//! whose metadata has one owner. One of its threads then has the engine, in a [`Hub`], and each of
//! the others a [`Spoke`]. Requests move to the thread of the engine, with the guest memory that they
//! point to, and back when they are done: nobody frees or looks at them meanwhile. No lock is held
//! over anything but that.
//!
//! The hub never waits for a spoke. A spoke may wait for the hub, whose thread hears [`Queue::attend`]
//! even while the device stands still, so that whoever is to stand still can finish what it has.
//! Where the engine fails, or its thread ends, all spokes fail.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Completion, Queue, Request};
use crate::sandbox::Allow;

/// Has the thread of the engine call [`Queue::attend`]; whether it is still there.
pub type Wake = Arc<dyn Fn() -> bool + Send + Sync>;

/// What a spoke and the hub share.
struct Mailbox {
    state: Mutex<State>,
    /// Something was done, or the hub is gone, and the spoke waits for it.
    came: Condvar,
    /// The same, and the spoke does not wait.
    ready: EventFd,
}

#[derive(Default)]
struct State {
    submitted: Vec<Request>,
    done: Vec<Completion>,
    spoke_waits: bool,
    /// Nothing will be done any more.
    closed: bool,
}

impl Mailbox {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic aborts the process: nobody ever sees a lock that it poisoned.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver(&self, batch: &mut Vec<Completion>) {
        let mut state = self.state();
        // Who takes one takes all: of a second one it need not be told.
        let first = state.done.is_empty();
        state.done.append(batch);
        let waits = std::mem::take(&mut state.spoke_waits);
        drop(state);
        self.tell(waits, first);
    }

    fn close(&self) {
        let mut state = self.state();
        let first = !std::mem::replace(&mut state.closed, true);
        let waits = std::mem::take(&mut state.spoke_waits);
        drop(state);
        self.tell(waits, first);
    }

    fn tell(&self, waits: bool, first: bool) {
        match waits {
            true => self.came.notify_one(),
            // Fails only when the counter is full, and then it is readable anyway.
            false if first => drop(self.ready.write(1)),
            false => {}
        }
    }
}

/// The engine, for the thread that has it.
pub struct Hub {
    engine: Box<dyn Queue>,
    /// How many requests each may hold: tags of the engine's are numbered through, the hub's own
    /// first.
    depth: u16,
    spokes: Vec<Arc<Mailbox>>,
    /// On their way to a spoke, by its number.
    batches: Vec<Vec<Completion>>,
    /// Our own that have no place.
    refused: Vec<Completion>,
    taken: Vec<Request>,
    polled: Vec<Completion>,
}

/// A queue of an engine that another thread has.
pub struct Spoke {
    mailbox: Arc<Mailbox>,
    wake: Wake,
    depth: u16,
    pushed: Vec<Request>,
    refused: Vec<Completion>,
    /// Pushed, and neither refused nor given back.
    held: usize,
}

/// What it takes to share an engine; made before there is one, for nothing fails afterwards.
pub struct Mailboxes {
    all: Vec<Arc<Mailbox>>,
    depth: u16,
}

impl Mailboxes {
    /// For so many threads beside that of the engine. Each may hold `depth` requests, the engine all
    /// of them.
    pub fn new(others: usize, depth: u16) -> io::Result<Self> {
        let size = usize::from(depth);
        if depth == 0 || (others + 1) * size > 1 << u16::BITS {
            return Err(Errno::INVAL.into());
        }
        let one = || {
            Ok(Arc::new(Mailbox {
                state: Mutex::new(State {
                    submitted: Vec::with_capacity(size),
                    done: Vec::with_capacity(size),
                    ..State::default()
                }),
                came: Condvar::new(),
                ready: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            }))
        };
        let all = (0..others).map(|_| one()).collect::<io::Result<_>>()?;
        Ok(Self { all, depth })
    }

    /// Shares the engine, whose thread `wake` wakes.
    pub fn share(self, engine: Box<dyn Queue>, wake: &Wake) -> (Hub, Vec<Spoke>) {
        let depth = self.depth;
        let size = usize::from(depth);
        let spokes = self.all.iter().map(|mailbox| Spoke {
            mailbox: mailbox.clone(),
            wake: wake.clone(),
            depth,
            pushed: Vec::with_capacity(size),
            refused: Vec::new(),
            held: 0,
        });
        let spokes = spokes.collect();
        let hub = Hub {
            engine,
            depth,
            batches: self.all.iter().map(|_| Vec::new()).collect(),
            spokes: self.all,
            refused: Vec::new(),
            taken: Vec::with_capacity(size),
            polled: Vec::with_capacity(size),
        };
        (hub, spokes)
    }
}

/// There is no place for a request.
fn busy(request: Request) -> Completion {
    Completion {
        tag: request.tag,
        result: Err(Errno::BUSY.into()),
        buffers: request.buffers,
    }
}

impl Hub {
    /// An engine that has failed does nothing any more, for nobody.
    fn checked<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.spokes.iter().for_each(|spoke| spoke.close());
        }
        result
    }

    /// Gives each its own.
    fn route(&mut self, completed: &mut Vec<Completion>) {
        completed.append(&mut self.refused);
        let mut polled = std::mem::take(&mut self.polled);
        for mut completion in polled.drain(..) {
            let number = usize::from(completion.tag / self.depth);
            let batch = number
                .checked_sub(1)
                .and_then(|number| self.batches.get_mut(number));
            match batch {
                None => completed.push(completion),
                Some(batch) => {
                    completion.tag %= self.depth;
                    batch.push(completion);
                }
            }
        }
        self.polled = polled;
        for (spoke, batch) in self.spokes.iter().zip(&mut self.batches) {
            if !batch.is_empty() {
                spoke.deliver(batch);
            }
        }
    }
}

impl Queue for Hub {
    fn push(&mut self, request: Request) {
        match request.tag < self.depth {
            true => self.engine.push(request),
            false => self.refused.push(busy(request)),
        }
    }

    fn start(&mut self) -> io::Result<()> {
        let result = self.engine.start();
        self.checked(result)
    }

    fn poll(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        let result = self.engine.poll(&mut self.polled);
        self.route(completed);
        self.checked(result)
    }

    /// Also comes back with nothing, when something of a spoke's is done.
    fn wait(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        let result = match self.refused.is_empty() {
            true => self.engine.wait(&mut self.polled),
            false => self.engine.poll(&mut self.polled),
        };
        self.route(completed);
        self.checked(result)
    }

    /// With those of the spokes that have come to the engine.
    fn held(&self) -> usize {
        self.engine.held() + self.refused.len()
    }

    fn descriptor(&self) -> Option<RawFd> {
        self.engine.descriptor()
    }

    fn acknowledge(&mut self) {
        self.engine.acknowledge();
    }

    /// What is completed by it is found by [`Queue::poll`], which is to follow.
    fn attend(&mut self) -> io::Result<()> {
        let result = self.engine.attend();
        self.checked(result)?;
        for (number, spoke) in self.spokes.iter().enumerate() {
            std::mem::swap(&mut spoke.state().submitted, &mut self.taken);
            for mut request in self.taken.drain(..) {
                // There are as many numbers as there are tags for.
                request.tag += (number as u16 + 1) * self.depth;
                self.engine.push(request);
            }
        }
        self.start()
    }

    fn syscalls(&self) -> &'static [Allow] {
        self.engine.syscalls()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.spokes.iter().for_each(|spoke| spoke.close());
    }
}

impl Spoke {
    fn take(
        state: &mut State,
        held: &mut usize,
        completed: &mut Vec<Completion>,
    ) -> io::Result<()> {
        *held = held.saturating_sub(state.done.len());
        completed.append(&mut state.done);
        match state.closed {
            true => Err(gone()),
            false => Ok(()),
        }
    }
}

fn gone() -> io::Error {
    io::Error::other("the disk's engine, which another thread has, is gone")
}

impl Queue for Spoke {
    fn push(&mut self, request: Request) {
        if request.tag < self.depth && self.held < usize::from(self.depth) {
            self.held += 1;
            self.pushed.push(request);
        } else {
            self.refused.push(busy(request));
        }
    }

    fn start(&mut self) -> io::Result<()> {
        if self.pushed.is_empty() {
            return Ok(());
        }
        let mut state = self.mailbox.state();
        if state.closed {
            return Err(gone());
        }
        let first = state.submitted.is_empty();
        state.submitted.append(&mut self.pushed);
        drop(state);
        // Otherwise it was woken for those that it has not taken yet.
        match !first || (self.wake)() {
            true => Ok(()),
            false => Err(gone()),
        }
    }

    fn poll(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        completed.append(&mut self.refused);
        Self::take(&mut self.mailbox.state(), &mut self.held, completed)
    }

    fn wait(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        self.start()?;
        let mut state = self.mailbox.state();
        while self.refused.is_empty() && self.held > 0 && state.done.is_empty() && !state.closed {
            state.spoke_waits = true;
            let waited = self.mailbox.came.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        state.spoke_waits = false;
        completed.append(&mut self.refused);
        Self::take(&mut state, &mut self.held, completed)
    }

    fn held(&self) -> usize {
        self.held + self.refused.len()
    }

    fn descriptor(&self) -> Option<RawFd> {
        Some(self.mailbox.ready.as_raw_fd())
    }

    fn acknowledge(&mut self) {
        // Empty when somebody has been here already.
        let _ = self.mailbox.ready.read();
    }

    /// Nothing that every device thread could not call.
    fn syscalls(&self) -> &'static [Allow] {
        &[]
    }
}

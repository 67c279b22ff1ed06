//! The requests of a writable image: each is a future, gone on with when the host has done what it
//! waits for.
//!
//! All of it is on one thread, which owns the image's metadata; there is no other queue.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use rustix::io::Errno;

use super::super::super::ring;
use super::super::super::{Buffers, Completion, Operation, Queue, Request};
use super::control::Order;
use super::engine::Engine;
use super::io::PUNCH_HOLE;
use super::lock::locked;
use crate::allow;
use crate::sandbox::{Allow, Test};

/// What the thread of a queue with a ring needs.
pub const URING_SYSCALLS: &[Allow] = &[
    ring::ENTER,
    ring::ENABLE,
    // Through the page cache.
    allow!(preadv2),
    allow!(pwritev),
    allow!(pwritev2),
    // When it is closed.
    allow!(ftruncate),
    // Holes below, which a job passes over.
    allow!(lseek, 2 => Test::Is(libc::SEEK_DATA as u32)),
    allow!(lseek, 2 => Test::Is(libc::SEEK_END as u32)),
];

/// What the thread of a queue without one needs, and those of its pool.
pub const SYNC_SYSCALLS: &[Allow] = &[
    allow!(preadv),
    allow!(preadv2),
    allow!(pwritev),
    allow!(pwritev2),
    allow!(fdatasync),
    allow!(fallocate, 1 => Test::Is(0)),
    allow!(fallocate, 1 => Test::Is(PUNCH_HOLE as u32)),
    allow!(ftruncate),
    allow!(lseek, 2 => Test::Is(libc::SEEK_DATA as u32)),
    allow!(lseek, 2 => Test::Is(libc::SEEK_END as u32)),
];

type Work = Pin<Box<dyn Future<Output = (io::Result<()>, Buffers)> + Send>>;

struct Task {
    /// Of the request; none where it is work of our own.
    tag: Option<u16>,
    work: Option<Work>,
}

/// Tasks to go on with.
type Ready = Arc<Mutex<VecDeque<usize>>>;

struct TaskWaker {
    number: usize,
    ready: Ready,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        locked(&self.ready).push_back(self.number);
    }
}

/// See the module.
pub struct WriteQueue {
    tasks: Vec<Task>,
    wakers: Vec<Waker>,
    ready: Ready,
    free: Vec<usize>,
    depth: usize,
    done: Vec<Completion>,
    engine: Arc<Engine>,
    has_ring: bool,
    closed: bool,
    /// Tasks that are no requests.
    own: usize,
    /// The one that returns leaks, from when it began: nobody waits for it.
    background: Option<usize>,
    begun: bool,
}

/// The most of them.
const OWN: usize = 4;

impl WriteQueue {
    /// The queue of an engine, which holds up to `depth` requests.
    pub fn new(engine: Arc<Engine>, depth: u16) -> Self {
        // One more, to close the image.
        let count = usize::from(depth) + OWN + 1;
        let ready = Ready::default();
        let waker = |number| {
            let ready = ready.clone();
            Waker::from(Arc::new(TaskWaker { number, ready }))
        };
        Self {
            tasks: (0..count)
                .map(|_| Task {
                    tag: None,
                    work: None,
                })
                .collect(),
            wakers: (0..count).map(waker).collect(),
            ready,
            free: (0..count).rev().collect(),
            depth: depth.into(),
            done: Vec::with_capacity(depth.into()),
            has_ring: engine.io.has_ring(),
            engine,
            closed: false,
            own: 0,
            background: None,
            begun: false,
        }
    }

    fn spawn(&mut self, tag: Option<u16>, work: Work) {
        let Some(number) = self.free.pop() else {
            return;
        };
        self.own += usize::from(tag.is_none());
        self.tasks[number] = Task {
            tag,
            work: Some(work),
        };
        self.advance(number);
        self.run();
    }

    /// Goes on with all that can.
    fn run(&mut self) {
        loop {
            let next = locked(&self.ready).pop_front();
            match next {
                Some(number) => self.advance(number),
                None => return,
            }
        }
    }

    fn advance(&mut self, number: usize) {
        let (Some(task), Some(waker)) = (self.tasks.get_mut(number), self.wakers.get(number))
        else {
            return;
        };
        let Some(work) = &mut task.work else {
            // It was woken twice.
            return;
        };
        let Poll::Ready((result, buffers)) = work.as_mut().poll(&mut Context::from_waker(waker))
        else {
            return;
        };
        task.work = None;
        if self.background == Some(number) {
            self.background = None;
        }
        self.free.push(number);
        match task.tag {
            Some(tag) => self.done.push(Completion {
                tag,
                result,
                buffers,
            }),
            None => self.own -= 1,
        }
    }

    /// What it shares with its image.
    #[cfg(test)]
    pub fn control(&self) -> &super::Control {
        &self.engine.control
    }

    /// Whether the engine has given up.
    #[cfg(test)]
    pub fn is_lost(&self) -> bool {
        self.engine.alive().is_err()
    }

    fn busy(&self) -> usize {
        self.tasks.len() - self.free.len()
    }

    /// Those that somebody waits for.
    fn awaited(&self) -> usize {
        self.busy() - usize::from(self.background.is_some())
    }

    /// Begins what goes on in the background.
    fn begin_background(&mut self) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let Some(number) = self.free.last().copied() else {
            return;
        };
        self.background = Some(number);
        let engine = self.engine.clone();
        self.spawn(
            None,
            Box::pin(async move {
                engine.return_leaks().await;
                (Ok(()), Buffers::default())
            }),
        );
    }

    /// Has it go on, where it does not wait for the host.
    fn breathe(&mut self) {
        let waker = locked(&self.engine.breathing).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn check(&self, request: &Request) -> Result<(), Errno> {
        if self.busy() - self.own >= self.depth {
            return Err(Errno::BUSY);
        }
        if request.operation == Operation::Flush {
            return Ok(());
        }
        let end = request.offset.checked_add(request.length);
        let size_bytes = locked(&self.engine.tables).size_bytes;
        let transfer = matches!(request.operation, Operation::Read | Operation::Write { .. });
        let writes = request.operation != Operation::Read;
        let unit = match self.engine.data_file().1 {
            Some(direct) if writes => u64::from(direct.file),
            _ => 1,
        };
        let fits = !transfer || request.buffers.len_bytes() == request.length;
        let aligned = (request.offset | request.length).is_multiple_of(unit);
        let inside = end.is_some_and(|end| end <= size_bytes);
        match fits && aligned && inside {
            true => Ok(()),
            false => Err(Errno::INVAL),
        }
    }

    /// Takes what the host has done, and goes on.
    fn harvest(&mut self, wait: bool) -> io::Result<bool> {
        let found = self.engine.io.harvest(wait)?;
        self.run();
        self.engine.io.start()?;
        Ok(found)
    }

    /// Ends all requests, writes all metadata and gives back what was allocated ahead.
    pub fn close(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.closed, true) {
            return Ok(());
        }
        self.engine.stopping.store(true, Ordering::Relaxed);
        self.breathe();
        self.run();
        while self.busy() > 0 {
            if !self.harvest(true)? && self.engine.io.in_flight() == 0 {
                return Err(Errno::IO.into());
            }
        }
        let engine = self.engine.clone();
        self.spawn(
            None,
            Box::pin(async move {
                engine.close().await;
                (Ok(()), Buffers::default())
            }),
        );
        while self.busy() > 0 {
            if !self.harvest(true)? && self.engine.io.in_flight() == 0 {
                return Err(Errno::IO.into());
            }
        }
        Ok(())
    }
}

impl Queue for WriteQueue {
    fn push(&mut self, request: Request) {
        let Request {
            tag,
            operation,
            offset,
            length,
            ..
        } = request;
        if let Err(error) = self.check(&request) {
            self.done.push(Completion {
                tag,
                result: Err(error.into()),
                buffers: request.buffers,
            });
            return;
        }
        let engine = self.engine.clone();
        let mut buffers = request.buffers;
        self.spawn(
            Some(tag),
            Box::pin(async move {
                let change = engine.control.dirty.change(operation, offset, length);
                let result = engine
                    .execute(operation, offset, length, &mut buffers)
                    .await;
                // Before anybody is told.
                drop(change);
                (result, buffers)
            }),
        );
    }

    fn start(&mut self) -> io::Result<()> {
        self.begin_background();
        self.engine.io.start()
    }

    fn poll(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        self.breathe();
        self.harvest(false)?;
        completed.append(&mut self.done);
        Ok(())
    }

    fn wait(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        loop {
            let found = self.harvest(self.done.is_empty())?;
            let idle = self.awaited() == 0 || (!found && self.engine.io.in_flight() == 0);
            if !self.done.is_empty() || idle {
                completed.append(&mut self.done);
                return Ok(());
            }
        }
    }

    fn held(&self) -> usize {
        self.awaited() + self.done.len()
    }

    fn descriptor(&self) -> Option<RawFd> {
        self.engine.io.descriptor()
    }

    fn acknowledge(&mut self) {
        self.engine.io.acknowledge();
    }

    fn attend(&mut self) -> io::Result<()> {
        while let Some(order) = self.engine.control.next() {
            if self.own >= OWN {
                order.refuse(Errno::BUSY);
                continue;
            }
            let engine = self.engine.clone();
            self.spawn(
                None,
                Box::pin(async move {
                    match order {
                        Order::Grow(size_bytes, reply) => reply.done(engine.grow(size_bytes).await),
                        Order::Step(step, reply) => reply.tell(engine.step(step).await),
                    }
                    (Ok(()), Buffers::default())
                }),
            );
        }
        self.engine.io.start()
    }

    fn syscalls(&self) -> &'static [Allow] {
        match self.has_ring {
            true => URING_SYSCALLS,
            false => SYNC_SYSCALLS,
        }
    }
}

impl Drop for WriteQueue {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!(%error, "closing a qcow2 image");
        }
    }
}

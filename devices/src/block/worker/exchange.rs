//! Exchanging the engine, on the thread of its queue.
//!
//! What is held for lack of space stays with the queue, and is tried again with the new engine.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::QueueHandler;
use crate::block::hold::is_no_space;
use crate::disk::exchange::Exchange;
use crate::disk::{Operation, Queue, Request};

/// Of the engine's descriptor, among those of the handler: behind its own.
const ENGINE: u64 = 3;

impl QueueHandler {
    pub(super) fn take_step(&mut self, step: Exchange, epoll: &Epoll) {
        // Whoever no longer waits for the answer has ordered to abort.
        match step {
            Exchange::Freeze(reply) => {
                let _ = reply.send(self.freeze());
            }
            Exchange::Stage(engine, reply) => {
                let _ = reply.send(self.stage(engine, epoll));
            }
            Exchange::Commit(reply) => {
                self.commit(epoll);
                let _ = reply.send(Ok(()));
            }
            Exchange::Abort(reply) => {
                self.abort(epoll);
                let _ = reply.send(Ok(()));
            }
        }
    }

    fn freeze(&mut self) -> io::Result<()> {
        self.frozen = true;
        if self.broken {
            return Err(io::Error::other("the disk engine has failed before"));
        }
        // Twice: the first frees what the second records as free.
        for _ in 0..2 {
            self.flush_engine()?;
        }
        Ok(())
    }

    /// Nothing else is in flight.
    fn flush_engine(&mut self) -> io::Result<()> {
        let buffers = self.spare.pop().unwrap_or_default();
        self.engine.push(Request {
            tag: 0,
            operation: Operation::Flush,
            offset: 0,
            length: 0,
            buffers,
        });
        let mut done = Vec::new();
        let mut result = self.engine.start();
        while result.is_ok() && self.engine.held() > 0 {
            result = self.engine.wait(&mut done);
        }
        if let Err(error) = result {
            self.broken = true;
            return Err(error);
        }
        let mut all: io::Result<()> = Ok(());
        for completion in done {
            self.recycle(completion.buffers);
            all = all.and(completion.result);
        }
        // The host tells of data that it has lost once, and this was not the driver's flush. Where
        // there was no space, the data is still there.
        if matches!(&all, Err(error) if !is_no_space(error)) {
            self.common.flush_lost.store(true, Ordering::SeqCst);
        }
        all
    }

    fn stage(&mut self, engine: Box<dyn Queue>, epoll: &Epoll) -> io::Result<()> {
        if let Some(descriptor) = engine.descriptor() {
            let event = EpollEvent::new(EventSet::IN, ENGINE);
            epoll.ctl(ControlOperation::Add, descriptor, event)?;
        }
        self.staged = Some(engine);
        Ok(())
    }

    fn commit(&mut self, epoll: &Epoll) {
        if let Some(engine) = self.staged.take() {
            let old = std::mem::replace(&mut self.engine, engine);
            unwatch(epoll, old.descriptor());
        }
        self.frozen = false;
    }

    fn abort(&mut self, epoll: &Epoll) {
        if let Some(engine) = self.staged.take() {
            unwatch(epoll, engine.descriptor());
        }
        self.frozen = false;
    }
}

fn unwatch(epoll: &Epoll, descriptor: Option<RawFd>) {
    if let Some(descriptor) = descriptor {
        // Fails only for one that was never added.
        let _ = epoll.ctl(ControlOperation::Delete, descriptor, EpollEvent::default());
    }
}

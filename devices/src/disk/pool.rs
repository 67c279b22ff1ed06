//! Threads that read, write and sync for a queue where there is no io_uring.
//!
//! ```text
//!   queue's thread ── push ──► queued ──► one of the threads: a system call ──► done ──┐
//!        ▲                                                                          eventfd
//!        └─────────────── take ◄── [`Pool::descriptor`] becomes readable ◄─────────────┘
//! ```
//!
//! They are spawned when the queue is opened, on the VMM thread, for the queue's own thread can't,
//! and each is under a filter that lets it do what the queue does and nothing else. What is to be
//! done moves to them with the buffers that it points to and moves back when it is done, so that
//! nobody can free or look at them meanwhile. A pool that is dropped waits for what has begun and
//! never begins the rest. No lock is held over a system call.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::sandbox::{Allow, COMMON, Filter, SeccompMode};
use crate::worker::spawn_sandboxed;

/// Threads of a queue at most. With 8, reads at a depth of 16 were 0.73 of QEMU's, whose pool has up
/// to 64.
const MAX_THREADS: usize = 16;
/// Threads of all queues of a disk at most, beyond which each still has what makes it a pool.
const MAX_DISK_THREADS: usize = 32;

/// Threads that a queue may have.
#[derive(Clone, Debug)]
pub struct Threads {
    /// What they are called, in at most 15 bytes.
    pub name: String,
    /// What becomes of a call that their filter does not allow.
    pub seccomp: SeccompMode,
    /// How many there may be.
    pub most: usize,
}

impl Threads {
    /// Those of one of a disk's `queues`.
    pub fn of_queue(name: String, seccomp: SeccompMode, queues: u16) -> Self {
        let share = MAX_DISK_THREADS / usize::from(queues.max(1));
        Self {
            name,
            seccomp,
            most: share.clamp(2, MAX_THREADS),
        }
    }
}

/// Something to be done, which owns all that it points to.
pub trait Work: Send + 'static {
    /// Does it, on a thread of the pool: one system call on one of the pool's files.
    fn perform(&mut self, files: &[Arc<File>]) -> Result<usize, Errno>;
}

/// Work that is done: its number, itself, and a number of bytes or an error.
pub type Done<W> = (usize, W, Result<usize, Errno>);

/// See the module.
pub struct Pool<W: Work> {
    shared: Arc<Shared<W>>,
    threads: Vec<JoinHandle<()>>,
    /// Taken from the threads, and not yet given back.
    taken: VecDeque<Done<W>>,
    in_flight: usize,
}

struct Shared<W> {
    files: Vec<Arc<File>>,
    state: Mutex<State<W>>,
    /// Something was queued, or the end has come.
    queued: Condvar,
    /// Something was done, and the owner waits for it.
    done: Condvar,
    /// Something was done, and the owner does not wait.
    ready: EventFd,
}

struct State<W> {
    queued: VecDeque<(usize, W)>,
    done: VecDeque<Done<W>>,
    /// Threads that wait, and have not been woken.
    idle: usize,
    owner_waits: bool,
    ending: bool,
}

impl<W: Work> Pool<W> {
    /// A pool for a queue of `depth` requests, whose threads may do `calls`. `None` where it would
    /// be no use, or the host has no threads for it: the queue then does all by itself. Called on
    /// the VMM thread.
    pub fn open(
        threads: Option<&Threads>,
        depth: u16,
        files: Vec<Arc<File>>,
        calls: &'static [Allow],
    ) -> io::Result<Option<Self>> {
        let Some(threads) = threads else {
            return Ok(None);
        };
        let count = threads.most.min(MAX_THREADS).min(depth.into());
        if count < 2 {
            return Ok(None);
        }
        let filter = Filter::compile(&threads.name, threads.seccomp, &[COMMON, calls])
            .map_err(io::Error::other)?;
        let mut pool = Self {
            shared: Arc::new(Shared {
                files,
                state: Mutex::new(State {
                    queued: VecDeque::with_capacity(depth.into()),
                    done: VecDeque::with_capacity(depth.into()),
                    idle: 0,
                    owner_waits: false,
                    ending: false,
                }),
                queued: Condvar::new(),
                done: Condvar::new(),
                ready: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            }),
            threads: Vec::with_capacity(count),
            taken: VecDeque::with_capacity(depth.into()),
            in_flight: 0,
        };
        for _ in 0..count {
            let shared = pool.shared.clone();
            match spawn_sandboxed(&threads.name, filter.clone(), move || shared.serve()) {
                Ok(thread) => pool.threads.push(thread),
                Err(error) if is_shortage(&error) => {
                    tracing::warn!(%error, "no threads for a disk; using its own");
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Some(pool))
    }

    /// Gives work to the threads; comes back with `number`.
    pub fn push(&mut self, number: usize, work: W) {
        self.in_flight += 1;
        let mut state = locked(&self.shared.state);
        state.queued.push_back((number, work));
        if state.idle > 0 {
            state.idle -= 1;
            drop(state);
            self.shared.queued.notify_one();
        }
    }

    /// Work that is done; does not wait.
    pub fn take(&mut self) -> Option<Done<W>> {
        if self.taken.is_empty() && self.in_flight > 0 {
            std::mem::swap(&mut self.taken, &mut locked(&self.shared.state).done);
        }
        let done = self.taken.pop_front()?;
        self.in_flight -= 1;
        Some(done)
    }

    /// Waits until [`Pool::take`] has something, if anything is under way.
    pub fn wait(&mut self) {
        if !self.taken.is_empty() || self.in_flight == 0 {
            return;
        }
        let mut state = locked(&self.shared.state);
        while state.done.is_empty() {
            state.owner_waits = true;
            state = waited(self.shared.done.wait(state));
        }
        state.owner_waits = false;
    }

    /// How much was pushed and not given back by [`Pool::take`].
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Readable when there may be something done.
    pub fn descriptor(&self) -> RawFd {
        self.shared.ready.as_raw_fd()
    }

    /// Makes the descriptor unreadable until something more is done; to be called before
    /// [`Pool::take`].
    pub fn acknowledge(&self) {
        // Empty when somebody has been here already.
        let _ = self.shared.ready.read();
    }
}

impl<W: Work> Drop for Pool<W> {
    fn drop(&mut self) {
        locked(&self.shared.state).ending = true;
        self.shared.queued.notify_all();
        for thread in self.threads.drain(..) {
            // A panic aborts the process, so a join can't report one.
            let _ = thread.join();
        }
    }
}

impl<W: Work> Shared<W> {
    /// What each of the threads does.
    fn serve(&self) {
        let mut state = locked(&self.state);
        while !state.ending {
            let Some((number, mut work)) = state.queued.pop_front() else {
                state.idle += 1;
                state = waited(self.queued.wait(state));
                continue;
            };
            drop(state);
            let result = work.perform(&self.files);
            state = locked(&self.state);
            // Who takes one takes all: a second one need not be told of.
            let first = state.done.is_empty();
            state.done.push_back((number, work, result));
            if first {
                let owner_waits = std::mem::take(&mut state.owner_waits);
                drop(state);
                match owner_waits {
                    true => self.done.notify_one(),
                    // Fails only when the counter is full, and then it is readable anyway.
                    false => drop(self.ready.write(1)),
                }
                state = locked(&self.state);
            }
        }
    }
}

/// Whether the host has no thread to give. (With EPERM it does not let us.)
fn is_shortage(error: &io::Error) -> bool {
    let shortages = [libc::EAGAIN, libc::ENOMEM, libc::EPERM];
    error
        .raw_os_error()
        .is_some_and(|errno| shortages.contains(&errno))
}

// A panic aborts the process: nobody ever sees a lock that it poisoned.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    waited(mutex.lock())
}

fn waited<T>(result: Result<T, PoisonError<T>>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;
    use crate::allow;

    const NAME: &str = "pool-test";

    fn threads(name: &str, most: usize) -> Threads {
        Threads {
            name: name.to_owned(),
            seccomp: SeccompMode::Enforce,
            most,
        }
    }

    fn open<W: Work>(most: usize, depth: u16) -> Pool<W> {
        Pool::open(Some(&threads(NAME, most)), depth, Vec::new(), &[])
            .unwrap()
            .unwrap()
    }

    /// Waits for so many others.
    struct Together(Arc<Barrier>);

    impl Work for Together {
        fn perform(&mut self, _: &[Arc<File>]) -> Result<usize, Errno> {
            self.0.wait();
            Ok(7)
        }
    }

    #[test]
    fn as_much_is_done_at_a_time_as_there_are_threads() {
        let mut pool = open(5, 128);
        let barrier = Arc::new(Barrier::new(5));
        for number in 0..10 {
            pool.push(number, Together(barrier.clone()));
        }
        let mut numbers = Vec::new();
        while pool.in_flight() > 0 {
            pool.wait();
            let (number, _, result) = pool.take().unwrap();
            assert_eq!(result, Ok(7));
            numbers.push(number);
        }
        numbers.sort_unstable();
        assert_eq!(numbers, (0..10).collect::<Vec<_>>());
        assert!(pool.take().is_none());
        // With nothing under way there is nothing to wait for.
        pool.wait();
    }

    #[test]
    fn there_are_no_more_threads_than_requests_and_none_for_one() {
        let count = |most, depth| {
            let threads = threads(NAME, most);
            let pool = Pool::<Together>::open(Some(&threads), depth, Vec::new(), &[]);
            pool.unwrap().map_or(0, |pool| pool.threads.len())
        };
        assert_eq!([count(8, 0), count(8, 1), count(1, 128)], [0; 3]);
        assert_eq!([count(8, 3), count(2, 128), count(99, 999)], [3, 2, 16]);
        let pool = Pool::<Together>::open(None, 128, Vec::new(), &[]).unwrap();
        assert!(pool.is_none());
        let of_queue = |queues| Threads::of_queue(String::new(), SeccompMode::Off, queues).most;
        assert_eq!([0, 1, 4, 8, 64].map(of_queue), [16, 16, 8, 4, 2]);
    }

    /// Says that it has begun, and ends when it is told.
    struct Gated(Sender<usize>, Receiver<()>, usize);

    impl Work for Gated {
        fn perform(&mut self, _: &[Arc<File>]) -> Result<usize, Errno> {
            let _ = self.0.send(self.2);
            self.1.recv().map(|()| self.2).map_err(|_| Errno::IO)
        }
    }

    #[test]
    fn a_pool_that_is_dropped_ends_what_has_begun_and_begins_nothing_else() {
        let mut pool = open(2, 16);
        let (begun, told) = channel();
        let mut gates = Vec::new();
        for number in 0..6 {
            let (gate, closed) = channel();
            pool.push(number, Gated(begun.clone(), closed, number));
            gates.push(gate);
        }
        drop(begun);
        let mut first = [told.recv().unwrap(), told.recv().unwrap()];
        first.sort_unstable();
        assert_eq!(first, [0, 1]);
        let shared = Arc::downgrade(&pool.shared);
        let ending = pool.shared.clone();
        let dropping = std::thread::spawn(move || drop(pool));
        while !locked(&ending.state).ending {
            std::thread::yield_now();
        }
        drop(ending);
        assert!(!dropping.is_finished(), "it waits for what has begun");
        gates[0].send(()).unwrap();
        gates[1].send(()).unwrap();
        dropping.join().unwrap();
        assert!(told.recv().is_err(), "nothing else has begun, or will");
        assert!(shared.upgrade().is_none());
        assert!(
            gates[2].send(()).is_err(),
            "it is gone, and all that it points to"
        );
    }

    /// Cuts its file, which the list does not allow, or syncs it, which it does.
    struct Call(bool);

    impl Work for Call {
        fn perform(&mut self, files: &[Arc<File>]) -> Result<usize, Errno> {
            match self.0 {
                true => rustix::fs::ftruncate(&files[0], 0).map(|()| 0),
                false => rustix::fs::fdatasync(&files[0]).map(|()| 0),
            }
        }
    }

    #[test]
    fn a_thread_may_do_what_is_on_its_list_and_nothing_else() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let mut threads = threads(NAME, 2);
        threads.seccomp = SeccompMode::Errno;
        let calls: &[Allow] = &[allow!(fdatasync)];
        let pool = Pool::open(Some(&threads), 2, vec![file], calls);
        let mut pool = pool.unwrap().unwrap();
        for (cut, expected) in [(true, Err(Errno::PERM)), (false, Ok(0))] {
            pool.push(0, Call(cut));
            pool.wait();
            assert_eq!(pool.take().unwrap().2, expected);
        }
    }

    #[test]
    fn where_the_host_has_no_threads_there_is_no_pool() {
        use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
        for errno in [libc::EAGAIN, libc::EPERM] {
            let test = std::thread::spawn(move || {
                let calls = [libc::SYS_clone, libc::SYS_clone3];
                let filter = SeccompFilter::new(
                    calls.map(|call| (call, Vec::new())).into(),
                    SeccompAction::Allow,
                    SeccompAction::Errno(errno as u32),
                    TargetArch::x86_64,
                );
                let program = BpfProgram::try_from(filter.unwrap()).unwrap();
                seccompiler::apply_filter(&program).unwrap();
                let threads = threads(NAME, 8);
                let pool = Pool::<Together>::open(Some(&threads), 128, Vec::new(), &[]);
                assert!(pool.unwrap().is_none());
            });
            test.join().unwrap();
        }
    }
}

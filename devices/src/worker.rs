//! A device's thread: born sandboxed, takes orders, dies by `Drop`.
//!
//! ```text
//!            Activate                    Pause
//!   idle ───────────────► running ◄────────────────► paused
//!    ▲  ◄───────────────────┘ │        Resume          │
//!    │         Reset          │ handler error          │ Reset
//!    │                        ▼                        │
//!    └──────────────────── failed ◄────────────────────┘
//! ```
//!
//! The VMM thread spawns workers (filters are inherited, so a vCPU thread must never spawn); vCPU
//! threads only send orders. An order that others wait for carries what to do when it is done.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use thiserror::Error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::block_signal;

use crate::disk::exchange::Exchange;
use crate::event::{DeviceEvent, Reporter};
use crate::sandbox::Filter;
use crate::virtio::Activation;

/// Called by the worker when an order is carried out.
pub type Done = Box<dyn FnOnce() + Send>;

/// What a worker can be told.
pub enum Order {
    /// The driver is ready: take these queues and serve them.
    Activate(Box<Activation>),
    /// The driver wants the device reset: finish what touches guest memory, give up the queues.
    Reset(Done),
    /// Finish what is in flight, then touch neither guest memory nor queues until told.
    Pause(Done),
    /// Go on.
    Resume,
    /// Look at what the device's owner has left for it, paused or not.
    Attend,
    /// The same for many, of whom only the first orders it: it is over when this is false again.
    AttendAll(Arc<AtomicBool>),
    /// A step in exchanging the engine of a disk's worker, which is paused.
    Exchange(Exchange),
    /// End the thread, after finishing what is in flight.
    Stop,
}

/// Why a worker can't go on; the device then needs a reset.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct WorkerError(pub String);

impl WorkerError {
    /// An error that says what was being done and what went wrong.
    pub fn new(doing: &str, error: impl std::fmt::Display) -> Self {
        Self(format!("{doing}: {error}"))
    }
}

/// Which descriptor became readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The driver rang the doorbell of the n-th queue of the current [`Activation`].
    Queue(usize),
    /// The n-th descriptor of [`Handler::descriptors`].
    Descriptor(usize),
}

/// The part of a worker that knows the device. All methods are called on the worker's thread,
/// inside its filter.
pub trait Handler: Send + 'static {
    /// Descriptors to watch for as long as the thread lives (timers, completion eventfds).
    fn descriptors(&self) -> Vec<RawFd> {
        Vec::new()
    }
    /// Takes the queues, and serves what is in them already.
    fn activate(&mut self, activation: Activation) -> Result<(), WorkerError>;
    /// A descriptor became readable; the handler reads (resets) its own, the loop the doorbells.
    fn ready(&mut self, source: Source) -> Result<(), WorkerError>;
    /// Finishes what is in flight. Afterwards nothing of the handler touches guest memory.
    fn quiesce(&mut self) -> Result<(), WorkerError>;
    /// The same while it has no queues: finishes what it does for others than its driver.
    fn quiesce_idle(&mut self) -> Result<(), WorkerError> {
        Ok(())
    }
    /// Goes on after [`Handler::quiesce`]; serves what has come meanwhile.
    fn resume(&mut self) -> Result<(), WorkerError>;
    /// Begins what the device's owner has left for it, where that is not the guest's work.
    fn attend(&mut self) -> Result<(), WorkerError> {
        Ok(())
    }
    /// A step in exchanging the engine under a disk's queue; the handler watches its descriptors
    /// itself. A device without one drops the order, and with it the way to answer.
    fn exchange(&mut self, _step: Exchange, _epoll: &Epoll) {}
    /// Finishes what is in flight and gives up the queues; never fails, but may drop results.
    fn reset(&mut self);
}

/// Stack of each of our threads. The usual 2 MiB would be one huge page, and resident as a whole,
/// where the host gives huge pages unasked.
pub const STACK_BYTES: usize = 256 << 10;

/// A device's thread as its owner holds it.
pub struct Worker {
    orders: Orders,
    thread: Option<JoinHandle<()>>,
}

/// What sends orders to a worker; may outlive it.
#[derive(Clone)]
pub struct Orders {
    orders: Sender<Order>,
    wake: Arc<EventFd>,
}

impl Orders {
    /// Sends an order; never blocks. Whether the worker is still there: one that is gone drops the
    /// order, and with it its [`Done`].
    pub fn send(&self, order: Order) -> bool {
        let sent = self.orders.send(order).is_ok();
        if sent {
            // An eventfd write fails only when the counter is full, and then it wakes anyway.
            let _ = self.wake.write(1);
        }
        sent
    }

    /// Has it [`Order::Attend`] each time that this is called, on whatever thread, but not more often
    /// than it gets to: what it is told meanwhile, however often, is one order. Says what
    /// [`Orders::send`] does.
    pub fn attend_all(self) -> impl Fn() -> bool + Send + Sync + 'static {
        let ordered = Arc::new(AtomicBool::new(false));
        move || {
            let ordered_already = ordered.swap(true, Ordering::SeqCst);
            ordered_already || self.send(Order::AttendAll(ordered.clone()))
        }
    }
}

/// Orders that are carried out before others than who gives orders are listened to.
const ORDERS_AT_ONCE: usize = 16;

const WAKE: u64 = u64::MAX;
const QUEUE: u64 = 1 << 32;

impl Worker {
    /// Spawns the thread `name` (shown in /proc, at most 15 characters are kept) and has it
    /// install `filter` before anything else. Called on the VMM thread only.
    pub fn spawn<H: Handler>(
        name: &str,
        filter: Filter,
        reporter: Reporter,
        handler: H,
    ) -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let epoll = Epoll::new()?;
        watch(&epoll, wake.as_raw_fd(), WAKE)?;
        for (index, descriptor) in handler.descriptors().into_iter().enumerate() {
            watch(&epoll, descriptor, index as u64)?;
        }
        let (orders, inbox) = channel();
        let body = Loop {
            epoll,
            wake: wake.clone(),
            inbox,
            reporter,
            handler,
            running: None,
        };
        let thread = spawn_sandboxed(name, filter, move || body.run())?;
        Ok(Self {
            orders: Orders { orders, wake },
            thread: Some(thread),
        })
    }

    /// Sends an order; never blocks. A worker that is gone drops the order, and with it its
    /// [`Done`].
    pub fn order(&self, order: Order) {
        self.orders.send(order);
    }

    /// What sends orders to it.
    pub fn orders(&self) -> Orders {
        self.orders.clone()
    }
}

/// Spawns the thread `name` (shown in /proc, at most 15 characters are kept), which installs
/// `filter` before anything else. Called on the VMM thread only.
pub fn spawn_sandboxed(
    name: &str,
    filter: Filter,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (installed, outcome) = channel();
    let thread = std::thread::Builder::new()
        // A zero byte in a name would be a panic.
        .name(name.replace('\0', "").chars().take(15).collect())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            // Where files may not grow beyond a limit (RLIMIT_FSIZE), a write beyond it is to
            // fail; the signal would let a guest end the process. Fails only for no signal.
            let _ = block_signal(libc::SIGXFSZ);
            let result = filter.install();
            let go = result.is_ok();
            // The spawner waits for this, so it is there to hear it.
            let _ = installed.send(result);
            if go {
                body();
            }
        })?;
    match outcome.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(io::Error::other(error)),
        Err(_) => Err(io::Error::other(
            "the thread ended before its filter was in place",
        )),
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.order(Order::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic aborts the process, so a join can't report one.
            let _ = thread.join();
        }
    }
}

fn watch(epoll: &Epoll, descriptor: RawFd, token: u64) -> io::Result<()> {
    epoll.ctl(
        ControlOperation::Add,
        descriptor,
        EpollEvent::new(EventSet::IN, token),
    )
}

/// What the loop keeps of the queues it handed to the handler.
struct Running {
    kicks: Vec<Arc<EventFd>>,
    signals: Arc<dyn crate::virtio::TransportSignals>,
}

struct Loop<H> {
    epoll: Epoll,
    wake: Arc<EventFd>,
    inbox: Receiver<Order>,
    reporter: Reporter,
    handler: H,
    running: Option<Running>,
}

enum Flow {
    Go,
    End,
}

impl<H: Handler> Loop<H> {
    fn run(mut self) {
        let mut events = [EpollEvent::default(); 16];
        loop {
            let ready = match self.epoll.wait(-1, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    self.fail(WorkerError::new("waiting for events", error));
                    return;
                }
            };
            for event in &events[..ready] {
                let flow = match event.data() {
                    WAKE => {
                        let _ = self.wake.read();
                        self.take_orders()
                    }
                    token if token >= QUEUE => self.kicked((token - QUEUE) as usize),
                    token => {
                        self.attempt(|handler| handler.ready(Source::Descriptor(token as usize)))
                    }
                };
                if let Flow::End = flow {
                    self.handler.reset();
                    return;
                }
            }
        }
    }

    fn kicked(&mut self, queue: usize) -> Flow {
        // The event may be a leftover of queues that were given up in this very round.
        let Some(kick) = self.running.as_ref().and_then(|r| r.kicks.get(queue)) else {
            return Flow::Go;
        };
        let _ = kick.read();
        self.attempt(|handler| handler.ready(Source::Queue(queue)))
    }

    fn take_orders(&mut self) -> Flow {
        for _ in 0..ORDERS_AT_ONCE {
            match self.inbox.try_recv() {
                Ok(order) => {
                    if let Flow::End = self.obey(order) {
                        return Flow::End;
                    }
                }
                Err(TryRecvError::Empty) => return Flow::Go,
                Err(TryRecvError::Disconnected) => return Flow::End,
            }
        }
        // Fails only when the counter is full, and then it wakes anyway.
        let _ = self.wake.write(1);
        Flow::Go
    }

    fn obey(&mut self, order: Order) -> Flow {
        match order {
            Order::Activate(activation) => self.activate(*activation),
            Order::Reset(done) => {
                self.give_up_queues();
                done();
                Flow::Go
            }
            Order::Pause(done) => {
                match self.running.is_some() {
                    true => self.attempt(Handler::quiesce),
                    false => self.attempt(Handler::quiesce_idle),
                };
                done();
                self.paused()
            }
            Order::Resume => Flow::Go,
            Order::Attend => self.attempt(Handler::attend),
            Order::AttendAll(ordered) => self.attend_all(&ordered),
            Order::Exchange(step) => {
                self.handler.exchange(step, &self.epoll);
                Flow::Go
            }
            Order::Stop => Flow::End,
        }
    }

    /// Paused: only orders are heard, so nothing can start by itself.
    fn paused(&mut self) -> Flow {
        loop {
            match self.inbox.recv() {
                Ok(Order::Resume) => break,
                Ok(Order::Reset(done)) => {
                    self.give_up_queues();
                    done();
                }
                Ok(Order::Activate(activation)) => {
                    // Sent just before the vCPUs stopped: take the queues, but stay quiet.
                    self.activate(*activation);
                    if self.running.is_some() {
                        self.attempt(Handler::quiesce);
                    }
                }
                Ok(Order::Pause(done)) => done(),
                Ok(order @ (Order::Attend | Order::AttendAll(_))) => {
                    self.obey(order);
                    // No descriptor is watched that would have it go on later.
                    self.attempt(Handler::quiesce);
                }
                Ok(Order::Exchange(step)) => self.handler.exchange(step, &self.epoll),
                Ok(Order::Stop) | Err(_) => return Flow::End,
            }
        }
        if self.running.is_some() {
            return self.attempt(Handler::resume);
        }
        Flow::Go
    }

    fn attend_all(&mut self, ordered: &AtomicBool) -> Flow {
        // It is seen what was left by whoever found this still true, for it is read, too.
        ordered.swap(false, Ordering::SeqCst);
        self.attempt(Handler::attend)
    }

    fn activate(&mut self, activation: Activation) -> Flow {
        self.give_up_queues();
        let kicks: Vec<_> = activation.queues.iter().map(|q| q.kick()).collect();
        let watched = (kicks.iter().enumerate()).try_for_each(|(index, kick)| {
            watch(&self.epoll, kick.as_raw_fd(), QUEUE + index as u64)
        });
        // From here on a failure has someone to tell, and descriptors to stop watching.
        self.running = Some(Running {
            kicks,
            signals: activation.signals.clone(),
        });
        if let Err(error) = watched {
            self.fail(WorkerError::new("watching a queue", error));
            return Flow::Go;
        }
        self.attempt(|handler| handler.activate(activation))
    }

    fn attempt(&mut self, step: impl FnOnce(&mut H) -> Result<(), WorkerError>) -> Flow {
        if let Err(error) = step(&mut self.handler) {
            self.fail(error);
        }
        Flow::Go
    }

    /// The device can't go on: say so to the driver (virtio 1.3 §2.1.1) and to the VMM, and wait
    /// for a reset.
    fn fail(&mut self, error: WorkerError) {
        if let Some(running) = &self.running {
            running.signals.needs_reset();
        }
        self.give_up_queues();
        self.reporter.report(DeviceEvent::Failed {
            reason: error.to_string(),
        });
    }

    fn give_up_queues(&mut self) {
        if let Some(running) = self.running.take() {
            self.handler.reset();
            for kick in running.kicks {
                // Fails only for a descriptor that was never added.
                let _ = self.epoll.ctl(
                    ControlOperation::Delete,
                    kick.as_raw_fd(),
                    EpollEvent::default(),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::SeccompMode;

    /// Says that it attends, and ends that when it is told.
    struct Slow(Sender<()>, Receiver<()>);

    impl Handler for Slow {
        fn activate(&mut self, _: Activation) -> Result<(), WorkerError> {
            Ok(())
        }
        fn ready(&mut self, _: Source) -> Result<(), WorkerError> {
            Ok(())
        }
        fn quiesce(&mut self) -> Result<(), WorkerError> {
            Ok(())
        }
        fn resume(&mut self) -> Result<(), WorkerError> {
            Ok(())
        }
        fn attend(&mut self) -> Result<(), WorkerError> {
            let _ = self.0.send(());
            let _ = self.1.recv();
            Ok(())
        }
        fn reset(&mut self) {}
    }

    #[test]
    fn a_worker_that_is_slow_to_attend_does_so_once_for_all_that_it_was_told_meanwhile() {
        for paused in [false, true] {
            let ((attends, attended), (go, gate)) = (channel(), channel());
            let filter = Filter::compile("slow", SeccompMode::Off, &[]).unwrap();
            let handler = Slow(attends, gate);
            let worker = Worker::spawn("slow", filter, Reporter::silent(), handler).unwrap();
            if paused {
                worker.order(Order::Pause(Box::new(|| ())));
            }
            let attend = worker.orders().attend_all();
            assert!(attend());
            for _ in 0..3 {
                attended.recv().unwrap();
                // It is at it: whatever is left from now on it may have missed.
                (0..1000).for_each(|_| assert!(attend()));
                go.send(()).unwrap();
            }
            attended.recv().unwrap();
            go.send(()).unwrap();
            drop(go);
            let (done, ended) = channel::<()>();
            worker.order(Order::Reset(Box::new(move || drop(done))));
            assert!(ended.recv().is_err());
            assert!(attended.try_recv().is_err(), "nothing was left");
            drop(worker);
            assert!(!attend(), "it is gone");
        }
    }
}

//! How much a queue takes upon itself at a time: the handler by itself, over an engine of our own.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::config::DetectZeroes;
use super::super::hold::Hold;
use super::super::shared::{Offer, Shared};
use super::super::worker::{Common, MAX_IN_FLIGHT, QueueHandler};
use super::*;
use crate::disk::exchange::Exchange;
use crate::disk::{Completion, Geometry, Operation, Queue, Request};
use crate::rate_limiter::{RateLimiter, RateLimiterConfig, TokenBucketConfig};
use crate::sandbox::Allow;
use crate::virtio::Activation;
use crate::worker::{Handler, Source};

const REQUEST: u64 = 8 << 20;

/// The handler's descriptors.
const TRY_AGAIN: Source = Source::Descriptor(1);
const TRY_NOW: Source = Source::Descriptor(2);
const COMPLETION: Source = Source::Descriptor(3);

/// Does nothing, and counts. With a descriptor it holds what it gets until it is waited for.
struct Engine {
    descriptor: Option<RawFd>,
    held: Vec<Completion>,
    pushed: Arc<AtomicU64>,
    given: Arc<AtomicUsize>,
    /// There is no space for anything.
    full: Arc<AtomicBool>,
    /// The host tells of data it has lost, to whoever flushes next.
    lost: Arc<AtomicBool>,
}

impl Queue for Engine {
    fn push(&mut self, request: Request) {
        self.pushed.fetch_add(request.length, Ordering::SeqCst);
        self.held.push(Completion {
            tag: request.tag,
            result: match self.full.load(Ordering::SeqCst) {
                true => Err(std::io::Error::from_raw_os_error(libc::ENOSPC)),
                false
                    if request.operation == Operation::Flush
                        && self.lost.swap(false, Ordering::SeqCst) =>
                {
                    Err(std::io::Error::from_raw_os_error(libc::EIO))
                }
                false => Ok(()),
            },
            buffers: request.buffers,
        });
    }
    fn start(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    fn poll(&mut self, completed: &mut Vec<Completion>) -> std::io::Result<()> {
        let ready = match self.descriptor {
            None => self.held.len(),
            Some(_) => self.given.swap(0, Ordering::SeqCst).min(self.held.len()),
        };
        completed.extend(self.held.drain(..ready));
        Ok(())
    }
    fn wait(&mut self, completed: &mut Vec<Completion>) -> std::io::Result<()> {
        completed.append(&mut self.held);
        Ok(())
    }
    fn held(&self) -> usize {
        self.held.len()
    }
    fn descriptor(&self) -> Option<RawFd> {
        self.descriptor
    }
    /// One request is done per completion event.
    fn acknowledge(&mut self) {
        self.given.store(1, Ordering::SeqCst);
    }
    fn syscalls(&self) -> &'static [Allow] {
        &[]
    }
}

fn engine(descriptor: Option<RawFd>) -> Engine {
    Engine {
        descriptor,
        held: Vec::new(),
        pushed: Arc::default(),
        given: Arc::default(),
        full: Arc::default(),
        lost: Arc::default(),
    }
}

fn handler(descriptor: Option<RawFd>) -> (QueueHandler, Arc<AtomicU64>) {
    let engine = engine(descriptor);
    let pushed = engine.pushed.clone();
    (handler_over(engine), pushed)
}

fn handler_over(engine: Engine) -> QueueHandler {
    handler_of(1, engine, None)
}

fn handler_of(queues: usize, engine: Engine, limiter: Option<RateLimiter>) -> QueueHandler {
    handler_from(0, queues, engine, common(limiter))
}

fn handler_from(first: u16, queues: usize, engine: Engine, common: Common) -> QueueHandler {
    let retry_now = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let counters = (0..queues).map(|_| Arc::default()).collect();
    QueueHandler::new(common, first, counters, Box::new(engine), retry_now).unwrap()
}

fn common(limiter: Option<RateLimiter>) -> Common {
    Common {
        flush_lost: Arc::default(),
        shared: Arc::new(Shared::new(&Offer {
            size_bytes: 1 << 40,
            geometry: Geometry {
                logical_block: 512,
                physical_block: 512,
                discard_granularity: 512,
            },
            readonly: false,
            sparse: true,
            num_queues: 1,
            queue_size: 128,
        })),
        limiter: limiter.map(|limiter| Arc::new(Mutex::new(limiter))),
        epoch: Instant::now(),
        serial: [0; 20],
        reporter: Reporter::silent(),
        queue_size: 128,
        hold: Arc::new(Hold::new(
            &serde_json::from_value(serde_json::json!({"path": "/x"})).unwrap(),
            Arc::new(tempfile::tempfile().unwrap()),
            Reporter::silent(),
        )),
        detect_zeroes: DetectZeroes::Off,
    }
}

fn activation_of(drivers: &[&Driver]) -> Activation {
    Activation {
        features: 0,
        queues: (0..).zip(drivers).map(|(i, d)| d.queue(i)).collect(),
        signals: drivers[0].signals.clone(),
    }
}

/// How many have been given back since the last look.
fn used(driver: &mut Driver) -> usize {
    std::iter::from_fn(|| driver.try_used()).count()
}

#[test]
fn a_greedy_queue_leaves_the_others_of_its_thread_their_share() {
    let (mut greedy, mut modest) = (greedy_driver(), Driver::new(memory(), 1, 128, true));
    let engine = engine(Some(0));
    let pushed = engine.pushed.clone();
    let mut handler = handler_of(2, engine, None);
    handler
        .activate(activation_of(&[&greedy, &modest]))
        .unwrap();
    let share = MAX_IN_FLIGHT / 2;
    assert_eq!(pushed.swap(0, Ordering::SeqCst), share);
    offer(&mut modest, 0, false);
    handler.ready(Source::Queue(1)).unwrap();
    assert_eq!(pushed.swap(0, Ordering::SeqCst), REQUEST, "at once");
    // In the order of arrival: one of the first makes room for one more of its own queue.
    for done in 1..=share / REQUEST {
        handler.ready(COMPLETION).unwrap();
        assert_eq!(used(&mut greedy), 1, "{done}");
        assert_eq!(pushed.swap(0, Ordering::SeqCst), REQUEST);
    }
    handler.ready(COMPLETION).unwrap();
    assert_eq!((used(&mut greedy), used(&mut modest)), (0, 1));
    assert_eq!(pushed.load(Ordering::SeqCst), 0, "its own room is full");
    // A pause waits for what is in flight and no more.
    handler.quiesce().unwrap();
    assert_eq!(used(&mut greedy) as u64, share / REQUEST);
    handler.resume().unwrap();
    assert_eq!(pushed.load(Ordering::SeqCst), share);
}

#[test]
fn queues_that_wait_for_the_limiter_go_on_in_turns() {
    let limits = RateLimiterConfig {
        bandwidth: None,
        ops: Some(TokenBucketConfig {
            size: 1,
            one_time_burst: None,
            refill_time: 40,
        }),
    };
    let limiter = RateLimiter::new(&limits, std::time::Duration::ZERO);
    let mut drivers: Vec<Driver> = (0..3)
        .map(|i| Driver::new(memory(), i, 128, true))
        .collect();
    for driver in &mut drivers {
        (0..6).for_each(|i| offer(driver, i, false));
    }
    let mut handler = handler_of(3, engine(None), limiter);
    let all: Vec<&Driver> = drivers.iter().collect();
    handler.activate(activation_of(&all)).unwrap();
    let mut counts = [0_usize; 3];
    while counts != [6; 3] {
        for (driver, count) in drivers.iter_mut().zip(&mut counts) {
            *count += used(driver);
        }
        // However late the timer is heard of, the bucket has one. Where this thread stands still
        // between two requests one more may pass.
        let (least, most) = (counts.iter().min(), counts.iter().max());
        assert!(most.unwrap() - least.unwrap() <= 3, "{counts:?}");
        if counts != [6; 3] {
            // Whoever rings meanwhile is no exception.
            handler.ready(Source::Queue(0)).unwrap();
            assert_eq!(used(&mut drivers[0]), 0);
            assert!(runs_out(&handler, 0, true));
            handler.ready(Source::Descriptor(0)).unwrap();
        }
    }
}

/// Whether the timer to try again has run out, or does within a minute if we are `patient`.
fn is_due(handler: &QueueHandler, patient: bool) -> bool {
    runs_out(handler, 1, patient)
}

/// The same of another timer.
fn runs_out(handler: &QueueHandler, descriptor: usize, patient: bool) -> bool {
    let epoll = Epoll::new().unwrap();
    let timer = handler.descriptors()[descriptor];
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, timer, event).unwrap();
    let timeout = if patient { 60_000 } else { 0 };
    epoll.wait(timeout, &mut [EpollEvent::default()]).unwrap() == 1
}

/// A driver with 40 reads of [`REQUEST`] bytes on offer.
fn greedy_driver() -> Driver {
    let mut driver = Driver::new(memory(), 0, 128, true);
    (0..40).for_each(|i| offer(&mut driver, i, false));
    driver
}

/// Offers the `i`-th request, of [`REQUEST`] bytes.
fn offer(driver: &mut Driver, i: u64, write: bool) {
    let base = BUFFERS + i * 0x100;
    driver.poke(base, &[0; 16]);
    driver.poke(base, &[u8::from(write)]);
    let head = driver.chain(&[
        (base, 16, false),
        (0x40_0000, REQUEST as u32, !write),
        (base + 0x80, 1, true),
    ]);
    driver.offer(head);
}

fn activation(driver: &Driver) -> Activation {
    Activation {
        features: 0,
        queues: vec![driver.queue(0)],
        signals: driver.signals.clone(),
    }
}

#[test]
fn a_queue_listens_to_orders_before_it_has_done_all_that_a_greedy_driver_asks_for() {
    let mut driver = greedy_driver();
    let (mut handler, pushed) = handler(None);
    handler.activate(activation(&driver)).unwrap();
    let mut total = 0;
    loop {
        let taken = pushed.swap(0, Ordering::SeqCst);
        assert!(taken < MAX_IN_FLIGHT + REQUEST, "{taken}");
        total += taken;
        if total == 40 * REQUEST {
            break;
        }
        assert!(driver.rung(), "it forgot to come back");
        handler.ready(Source::Queue(0)).unwrap();
    }
    assert_eq!(std::iter::from_fn(|| driver.try_used()).count(), 40);
}

#[test]
fn what_is_in_flight_is_little_enough_to_wait_for() {
    let mut driver = greedy_driver();
    let (mut handler, pushed) = handler(Some(0));
    handler.activate(activation(&driver)).unwrap();
    for done in 0..40 {
        let taken = pushed.load(Ordering::SeqCst);
        let in_flight = taken - done * REQUEST;
        assert!(in_flight > 0 && in_flight < MAX_IN_FLIGHT + REQUEST);
        handler.ready(COMPLETION).unwrap();
        assert_eq!(std::iter::from_fn(|| driver.try_used()).count(), 1);
    }
    assert_eq!(pushed.load(Ordering::SeqCst), 40 * REQUEST);
    assert!(!driver.rung(), "nothing was left to come back for");
}

#[test]
fn a_write_that_lacks_space_does_not_put_off_what_lacked_it_earlier() {
    let engine = engine(None);
    engine.full.store(true, Ordering::SeqCst);
    let (full, pushed) = (engine.full.clone(), engine.pushed.clone());
    let mut handler = handler_over(engine);
    let mut driver = Driver::new(memory(), 0, 128, true);
    offer(&mut driver, 0, true);
    handler.activate(activation(&driver)).unwrap();
    for i in 1..4 {
        assert!(is_due(&handler, true), "it is tried again");
        offer(&mut driver, i, true);
        handler.ready(Source::Queue(0)).unwrap();
        assert!(is_due(&handler, false), "still, whatever else has failed");
        pushed.store(0, Ordering::SeqCst);
        handler.ready(TRY_AGAIN).unwrap();
        assert_eq!(pushed.load(Ordering::SeqCst), (i + 1) * REQUEST);
    }
    full.store(false, Ordering::SeqCst);
    assert!(is_due(&handler, true));
    handler.ready(TRY_AGAIN).unwrap();
    assert_eq!(std::iter::from_fn(|| driver.try_used()).count(), 4);
}

#[test]
fn going_on_with_what_is_tried_again_does_not_try_all_of_it_anew() {
    let engine = engine(Some(0));
    engine.full.store(true, Ordering::SeqCst);
    let (given, pushed) = (engine.given.clone(), engine.pushed.clone());
    let mut handler = handler_over(engine);
    let mut driver = Driver::new(memory(), 0, 128, true);
    (0..10).for_each(|i| offer(&mut driver, i, true));
    handler.activate(activation(&driver)).unwrap();
    (0..10).for_each(|_| handler.ready(COMPLETION).unwrap());
    pushed.store(0, Ordering::SeqCst);
    // One completion comes so early that there is room for more, but not before it has listened.
    given.store(1, Ordering::SeqCst);
    handler.ready(TRY_NOW).unwrap();
    assert_eq!(pushed.load(Ordering::SeqCst), MAX_IN_FLIGHT);
    // The others come before the timer is heard of.
    (1..10).for_each(|_| handler.ready(COMPLETION).unwrap());
    assert_eq!(pushed.swap(0, Ordering::SeqCst), 10 * REQUEST);
    assert!(is_due(&handler, true));
    handler.ready(TRY_AGAIN).unwrap();
    assert_eq!(pushed.load(Ordering::SeqCst), 0, "that was a moment ago");
    // And yet nothing is forgotten.
    assert!(is_due(&handler, true));
    handler.ready(TRY_AGAIN).unwrap();
    assert_eq!(pushed.load(Ordering::SeqCst), MAX_IN_FLIGHT);
}

#[test]
fn the_driver_hears_of_data_that_was_lost_although_another_flush_came_before_its_own() {
    for (full, expected) in [(false, [IOERR, OK]), (true, [OK, OK])] {
        let engine = engine(None);
        engine.lost.store(!full, Ordering::SeqCst);
        engine.full.store(full, Ordering::SeqCst);
        let is_full = engine.full.clone();
        let common = common(None);
        let mut handler = handler_from(0, 1, engine, common.clone());
        let mut other = handler_from(1, 1, super::load::engine(None), common);
        let mut drivers = [0, 1].map(|index| Driver::new(memory(), index, 128, true));
        handler.activate(activation(&drivers[0])).unwrap();
        let queues = vec![drivers[1].queue(1)];
        let signals = drivers[1].signals.clone();
        let activation = Activation {
            features: 0,
            queues,
            signals,
        };
        other.activate(activation).unwrap();
        let epoll = Epoll::new().unwrap();
        let (reply, answer) = std::sync::mpsc::channel();
        handler.exchange(Exchange::Freeze(reply), &epoll);
        assert!(answer.recv().unwrap().is_err());
        let (reply, answer) = std::sync::mpsc::channel();
        handler.exchange(Exchange::Abort(reply), &epoll);
        answer.recv().unwrap().unwrap();
        is_full.store(false, Ordering::SeqCst);
        handler.resume().unwrap();
        // Whichever thread of the disk it is that has the driver's.
        let both = [(&mut other, 1), (&mut handler, 0)];
        for ((handler, index), status) in both.into_iter().zip(expected) {
            let driver = &mut drivers[index];
            driver.poke(BUFFERS, &4_u32.to_le_bytes());
            driver.poke(BUFFERS + 4, &[0; 12]);
            let head = driver.chain(&[(BUFFERS, 16, false), (BUFFERS + 0x80, 1, true)]);
            driver.offer(head);
            handler.ready(Source::Queue(0)).unwrap();
            assert!(driver.try_used().is_some());
            assert_eq!(driver.peek(BUFFERS + 0x80, 1), [status]);
        }
    }
}

//! How much a queue takes upon itself at a time: the handler by itself, over an engine of our own.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use super::super::config::DetectZeroes;
use super::super::counters::QueueCounters;
use super::super::hold::Hold;
use super::super::shared::{Offer, Shared};
use super::super::worker::{Common, MAX_IN_FLIGHT, QueueHandler};
use super::*;
use crate::disk::{Completion, Geometry, Queue, Request};
use crate::sandbox::Allow;
use crate::virtio::Activation;
use crate::worker::{Handler, Source};

const REQUEST: u64 = 8 << 20;

/// Does nothing, and counts. With a descriptor it holds what it gets until it is waited for.
struct Engine {
    descriptor: Option<RawFd>,
    held: Vec<Completion>,
    pushed: Arc<AtomicU64>,
    given: usize,
}

impl Queue for Engine {
    fn push(&mut self, request: Request) {
        self.pushed.fetch_add(request.length, Ordering::SeqCst);
        self.held.push(Completion {
            tag: request.tag,
            result: Ok(()),
            buffers: request.buffers,
        });
    }
    fn start(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    fn poll(&mut self, completed: &mut Vec<Completion>) -> std::io::Result<()> {
        let ready = match self.descriptor {
            None => self.held.len(),
            Some(_) => std::mem::take(&mut self.given).min(self.held.len()),
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
        self.given = 1;
    }
    fn syscalls(&self) -> &'static [Allow] {
        &[]
    }
}

fn handler(descriptor: Option<RawFd>) -> (QueueHandler, Arc<AtomicU64>) {
    let pushed = Arc::new(AtomicU64::new(0));
    let engine = Engine {
        descriptor,
        held: Vec::new(),
        pushed: pushed.clone(),
        given: 0,
    };
    let common = Common {
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
        limiter: None,
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
    };
    let retry_now = Arc::new(EventFd::new(0).unwrap());
    let counters = Arc::new(QueueCounters::default());
    let handler = QueueHandler::new(common, counters, Box::new(engine), retry_now).unwrap();
    (handler, pushed)
}

/// A driver with 40 reads of [`REQUEST`] bytes on offer.
fn greedy_driver() -> Driver {
    let mut driver = Driver::new(memory(), 0, 128, true);
    for i in 0..40_u64 {
        let base = BUFFERS + i * 0x100;
        driver.poke(base, &[0; 16]);
        let head = driver.chain(&[
            (base, 16, false),
            (0x40_0000, REQUEST as u32, true),
            (base + 0x80, 1, true),
        ]);
        driver.offer(head);
    }
    driver
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
        handler.ready(Source::Descriptor(3)).unwrap();
        assert_eq!(std::iter::from_fn(|| driver.try_used()).count(), 1);
    }
    assert_eq!(pushed.load(Ordering::SeqCst), 40 * REQUEST);
    assert!(!driver.rung(), "nothing was left to come back for");
}

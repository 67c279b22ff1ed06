//! A hub and its spokes over an engine that does what it is told.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::{Buffers, Operation};
use super::*;

const DEPTH: u16 = 4;

/// Completes what was started, the last first; or fails.
#[derive(Default)]
struct Engine {
    pushed: Vec<Request>,
    started: Vec<Request>,
    /// The largest tag and the most requests there have been.
    seen: Arc<Mutex<(u16, usize)>>,
    broken: Arc<AtomicUsize>,
}

impl Queue for Engine {
    fn push(&mut self, request: Request) {
        let mut seen = self.seen.lock().unwrap();
        seen.0 = seen.0.max(request.tag);
        self.pushed.push(request);
        seen.1 = seen.1.max(self.held());
    }
    fn start(&mut self) -> io::Result<()> {
        self.started.append(&mut self.pushed);
        match self.broken.load(Ordering::SeqCst) {
            0 => Ok(()),
            _ => Err(Errno::NXIO.into()),
        }
    }
    fn poll(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        completed.extend(self.started.drain(..).rev().map(|request| Completion {
            tag: request.tag,
            result: match request.offset {
                0 => Err(Errno::NOSPC.into()),
                _ => Ok(()),
            },
            buffers: request.buffers,
        }));
        Ok(())
    }
    fn wait(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        self.poll(completed)
    }
    fn held(&self) -> usize {
        self.pushed.len() + self.started.len()
    }
    fn descriptor(&self) -> Option<RawFd> {
        None
    }
    fn acknowledge(&mut self) {}
    fn syscalls(&self) -> &'static [Allow] {
        &[]
    }
}

fn request(tag: u16, offset: u64) -> Request {
    Request {
        tag,
        operation: Operation::Flush,
        offset,
        length: 0,
        buffers: Buffers::default(),
    }
}

struct Shared {
    hub: Hub,
    spokes: Vec<Spoke>,
    woken: Arc<AtomicUsize>,
    seen: Arc<Mutex<(u16, usize)>>,
    broken: Arc<AtomicUsize>,
}

fn shared(others: usize) -> Shared {
    let engine = Engine::default();
    let (seen, broken) = (engine.seen.clone(), engine.broken.clone());
    let woken = Arc::new(AtomicUsize::new(0));
    let count = woken.clone();
    let wake: Wake = Arc::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
        true
    });
    let mailboxes = Mailboxes::new(others, DEPTH).unwrap();
    let (hub, spokes) = mailboxes.share(Box::new(engine), &wake);
    Shared {
        hub,
        spokes,
        woken,
        seen,
        broken,
    }
}

/// What a queue gives back: tags, and whether it was done.
fn polled(queue: &mut dyn Queue) -> Vec<(u16, bool)> {
    let mut completed = Vec::new();
    queue.poll(&mut completed).unwrap();
    let told = completed.iter().map(|c| (c.tag, c.result.is_ok()));
    let mut told: Vec<_> = told.collect();
    told.sort_unstable();
    told
}

#[test]
fn each_gets_back_what_it_pushed_and_the_engine_is_woken_once_for_many() {
    let mut all = shared(3);
    for tag in 0..DEPTH {
        all.hub.push(request(tag, 1));
        for (number, spoke) in all.spokes.iter_mut().enumerate() {
            // One by one; of each another fails.
            spoke.push(request(tag, u64::from(usize::from(tag) != number)));
            spoke.start().unwrap();
            assert!(polled(spoke).is_empty());
            assert_eq!(spoke.held(), usize::from(tag) + 1);
            assert!(spoke.mailbox.ready.read().is_err(), "nothing is there");
        }
    }
    assert_eq!(all.woken.load(Ordering::SeqCst), 3);
    all.hub.attend().unwrap();
    assert_eq!(all.hub.held(), 16);
    let own: Vec<_> = (0..DEPTH).map(|tag| (tag, true)).collect();
    assert_eq!(polled(&mut all.hub), own);
    assert_eq!(*all.seen.lock().unwrap(), (15, 16));
    for (number, spoke) in all.spokes.iter_mut().enumerate() {
        spoke.acknowledge();
        let theirs = (0..DEPTH).map(|tag| (tag, usize::from(tag) != number));
        assert_eq!(polled(spoke), theirs.collect::<Vec<_>>());
        assert_eq!(spoke.held(), 0);
        spoke.push(request(0, 1));
        spoke.start().unwrap();
    }
    // Each after it was taken.
    assert_eq!(all.woken.load(Ordering::SeqCst), 6);
    assert_eq!(all.hub.held(), 0);
}

#[test]
fn one_that_has_no_place_comes_back_at_once_and_nobody_elses_does() {
    let mut all = shared(1);
    let spoke = &mut all.spokes[0];
    for tag in 0..=DEPTH {
        spoke.push(request(tag.min(DEPTH - 1), 1));
    }
    spoke.push(request(DEPTH, 1));
    spoke.start().unwrap();
    assert_eq!(spoke.held(), 6);
    assert_eq!(polled(spoke), [(3, false), (4, false)]);
    all.hub.push(request(DEPTH, 1));
    all.hub.attend().unwrap();
    assert_eq!(polled(&mut all.hub), [(4, false)]);
    assert_eq!(polled(&mut all.spokes[0]).len(), 4);
    assert!(Mailboxes::new(15, 4096).is_ok());
    assert!(Mailboxes::new(16, 4096).is_err(), "there are no such tags");
    assert!(Mailboxes::new(1, 0).is_err());
}

#[test]
fn where_the_engine_fails_all_fail_and_who_waits_hears_of_it() {
    for drops in [false, true] {
        let mut all = shared(2);
        let [mut waiting, mut idle] = <[Spoke; 2]>::try_from(all.spokes).ok().unwrap();
        waiting.push(request(1, 1));
        waiting.start().unwrap();
        let thread = std::thread::spawn(move || {
            let failed = waiting.wait(&mut Vec::new()).is_err();
            (failed, waiting)
        });
        let waits = || all.hub.spokes[0].state().spoke_waits;
        while !waits() {
            std::thread::yield_now();
        }
        if drops {
            drop(all.hub);
        } else {
            all.broken.store(1, Ordering::SeqCst);
            assert!(all.hub.attend().is_err());
        }
        let (failed, mut waiting) = thread.join().unwrap();
        assert!(failed);
        waiting.push(request(2, 1));
        assert!(waiting.start().is_err());
        assert!(idle.mailbox.ready.read().is_ok(), "it is told");
        assert!(idle.poll(&mut Vec::new()).is_err());
        assert!(idle.start().is_ok(), "of nothing");
    }
}

#[test]
fn who_waits_is_woken_by_what_is_done_and_does_not_wait_for_nothing() {
    let mut all = shared(1);
    let mut spoke = all.spokes.pop().unwrap();
    spoke.wait(&mut Vec::new()).unwrap();
    spoke.push(request(3, 1));
    let thread = std::thread::spawn(move || {
        let mut completed = Vec::new();
        // Starts it.
        spoke.wait(&mut completed).unwrap();
        assert_eq!((completed.len(), completed[0].tag), (1, 3));
        assert_eq!(spoke.held(), 0);
    });
    while !thread.is_finished() {
        all.hub.attend().unwrap();
        all.hub.poll(&mut Vec::new()).unwrap();
        std::thread::yield_now();
    }
    thread.join().unwrap();
}

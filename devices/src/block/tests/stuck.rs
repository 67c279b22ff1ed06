//! Jobs on a host that stands still: each wait has its end, and the guest goes on.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::job::{PATIENCE, PLAIN, bytes_of, content, over};
use super::*;
use crate::block::ImageType;
use crate::block::job::{Bounds, ConcludeError, Job, JobKind, JobStatus};
use crate::disk::qcow2::tests::qemu;
use crate::disk::steps::{Reply, Step, Steps};
use crate::disk::{Commit, Completion, Geometry, Image, ImageInfo, Queue, Request, Threads};
use crate::sandbox::Allow;

/// What is to run out.
const SHORT: Duration = Duration::from_millis(50);

/// Something that can be held up from outside.
#[derive(Default)]
struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn set(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let closed = self.closed.lock().unwrap();
        drop(self.opened.wait_while(closed, |closed| *closed).unwrap());
    }
}

/// Opens it again, however the test ends: a thread may wait for it.
struct Open(Arc<Gate>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

/// What is done with a step of these.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Done,
    /// It is left where it is, and can be taken back.
    Left,
    /// It has begun, and comes to no end.
    Begun,
}

/// What a test does to a disk's image, and to the base of its commit.
struct Host {
    /// What the base's queue waits for.
    base: Arc<Gate>,
    fate: Mutex<(Option<Step>, Fate)>,
    /// Steps that have begun and come to no end.
    begun: Mutex<Vec<Reply>>,
    reclaim_fails: bool,
    /// So many of the writes to the base that are under way beside others are told to lack space.
    full: AtomicUsize,
}

impl Host {
    /// What is told of those that were completed.
    fn tell(&self, completed: &mut [Completion]) {
        // Tags of this size are of requests that are waited for.
        for one in completed.iter_mut().filter(|one| one.tag != u16::MAX) {
            let take = |full: usize| full.checked_sub(1);
            if self.full.fetch_update(SeqCst, SeqCst, take).is_ok() {
                one.result = Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
        }
    }

    /// What becomes of a step of the same kind.
    fn fate_of(&self, step: Step) -> Fate {
        let (which, fate) = *self.fate.lock().unwrap();
        let same = |other: Step| std::mem::discriminant(&other) == std::mem::discriminant(&step);
        match which.is_some_and(same) {
            true => fate,
            false => Fate::Done,
        }
    }
}

/// The image, its base, or what takes its steps.
struct Faulty<T: ?Sized>(Arc<T>, Arc<Host>);

impl Steps for Faulty<dyn Steps> {
    fn leave(&self, step: Step, reply: Reply) -> u64 {
        match self.1.fate_of(step) {
            Fate::Done => return self.0.leave(step, reply),
            Fate::Left | Fate::Begun => self.1.begun.lock().unwrap().push(reply),
        }
        u64::MAX
    }

    fn withdraw(&self, number: u64) -> bool {
        match number {
            u64::MAX => self.1.fate.lock().unwrap().1 == Fate::Left,
            number => self.0.withdraw(number),
        }
    }
}

impl Image for Faulty<dyn Image> {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn serial(&self) -> String {
        self.0.serial()
    }
    fn open_queue_with(&self, depth: u16, threads: Option<&Threads>) -> io::Result<Box<dyn Queue>> {
        let queue = self.0.open_queue_with(depth, threads)?;
        Ok(Box::new(Slow(queue, self.1.clone())))
    }
    fn has_owner(&self) -> bool {
        self.0.has_owner()
    }
    fn host_file(&self) -> Arc<File> {
        self.0.host_file()
    }
    fn files(&self) -> Vec<Arc<File>> {
        self.0.files()
    }
    fn info(&self) -> io::Result<ImageInfo> {
        self.0.info()
    }
    fn stream(&self) -> Result<Arc<dyn Steps>, BuildError> {
        Ok(Arc::new(Faulty(self.0.stream()?, self.1.clone())))
    }
    fn begin_commit(&self) -> Result<Commit, BuildError> {
        let commit = self.0.begin_commit()?;
        Ok(Commit {
            steps: Arc::new(Faulty(commit.steps, self.1.clone())),
            base: Arc::new(Faulty(commit.base, self.1.clone())),
            ..commit
        })
    }
    fn reopen_alone(&self) -> Result<Box<dyn Image>, BuildError> {
        self.0.reopen_alone()
    }
    fn reopen_base(&self) -> Result<Box<dyn Image>, BuildError> {
        self.0.reopen_base()
    }
    fn hand_over(&self) {
        self.0.hand_over();
    }
    fn is_handed_over(&self) -> bool {
        self.0.is_handed_over()
    }
    fn reclaim(&self) -> Result<(), BuildError> {
        match self.1.reclaim_fails {
            true => Err(BuildError::host(
                "looking for room",
                io::ErrorKind::TimedOut,
            )),
            false => self.0.reclaim(),
        }
    }
}

/// Completes nothing while its gate is closed.
struct Slow(Box<dyn Queue>, Arc<Host>);

impl Queue for Slow {
    fn push(&mut self, request: Request) {
        self.0.push(request);
    }
    fn start(&mut self) -> io::Result<()> {
        self.0.start()
    }
    fn poll(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        let before = completed.len();
        let result = self.0.poll(completed);
        self.1.tell(&mut completed[before..]);
        result
    }
    fn wait(&mut self, completed: &mut Vec<Completion>) -> io::Result<()> {
        self.1.base.pass();
        let before = completed.len();
        let result = self.0.wait(completed);
        self.1.tell(&mut completed[before..]);
        result
    }
    fn held(&self) -> usize {
        self.0.held()
    }
    fn descriptor(&self) -> Option<RawFd> {
        self.0.descriptor()
    }
    fn acknowledge(&mut self) {
        self.0.acknowledge();
    }
    fn attend(&mut self) -> io::Result<()> {
        self.0.attend()
    }
    fn syscalls(&self) -> &'static [Allow] {
        self.0.syscalls()
    }
}

/// A disk that is an overlay of a raw base, with data in both.
struct Stuck {
    disk: Disk,
    host: Arc<Host>,
    expected: Vec<u8>,
    base: PathBuf,
    path: PathBuf,
    _open: Open,
    _folder: tempfile::TempDir,
}

impl Stuck {
    fn new(bounds: Bounds, reclaim_fails: bool) -> Option<Self> {
        let folder = qemu::folder()?;
        let base = folder.path().join("base.raw");
        std::fs::copy(image().path(), &base).unwrap();
        let options = format!("backing_file={},backing_fmt=raw", base.display());
        let path = qemu::create(folder.path(), "overlay.qcow2", &options, SIZE);
        qemu::scribble(&path, SIZE, 40, 3);
        let host = Arc::new(Host {
            base: Arc::default(),
            fate: Mutex::new((None, Fate::Done)),
            begun: Mutex::default(),
            reclaim_fails,
            full: AtomicUsize::new(0),
        });
        let expected = qemu::content(&path);
        let mut disk = Disk::on(&path, PLAIN, over());
        disk.block.bounds = bounds;
        {
            let mut opened = disk.block.opened();
            let image = opened.image.clone();
            opened.image = Arc::new(Faulty(image, host.clone()));
        }
        Some(Self {
            disk,
            _open: Open(host.base.clone()),
            host,
            expected,
            base,
            path,
            _folder: folder,
        })
    }

    fn begin(&self, kind: JobKind) -> (Job, Receiver<()>) {
        let (tell, told) = channel();
        let wake = Box::new(move || {
            let _ = tell.send(());
        });
        (self.disk.block.begin_job(kind, None, wake).unwrap(), told)
    }

    fn ready(&self) -> (Job, Receiver<()>) {
        let (job, told) = self.begin(JobKind::Commit);
        told.recv_timeout(PATIENCE).unwrap();
        assert_eq!(job.view().status, JobStatus::Ready);
        (job, told)
    }

    fn fate(&self, step: Step, fate: Fate) {
        *self.host.fate.lock().unwrap() = (Some(step), fate);
    }

    /// The guest uses it.
    #[track_caller]
    fn use_disk(&mut self, number: u64) {
        let bytes = bytes_of(number);
        assert_eq!(self.disk.write(number * 64, &bytes), OK);
        self.expected[number as usize * 64 * 512..][..bytes.len()].copy_from_slice(&bytes);
        assert_eq!(self.disk.flush(), OK);
        assert!(content(&mut self.disk) == self.expected);
    }

    /// The disk is on this image, and another commit comes to its end.
    #[track_caller]
    fn goes_on(mut self) {
        assert_eq!(self.disk.block.config().path, self.path);
        self.use_disk(9);
        self.fate(Step::Empty, Fate::Done);
        let (mut job, _) = self.ready();
        self.use_disk(10);
        job.conclude(&self.disk.block, true).unwrap();
        self.moved(job);
    }

    #[track_caller]
    fn moved(mut self, job: Job) {
        drop(job);
        let config = self.disk.block.config();
        assert_eq!(
            (&config.path, config.image_type),
            (&self.base, ImageType::Raw)
        );
        self.use_disk(11);
        assert!(self.disk.io_errors().is_empty());
        drop(self.disk);
        assert!(std::fs::read(&self.base).unwrap() == self.expected);
    }
}

fn ended(job: &Job) {
    let start = Instant::now();
    while !job.has_ended() {
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn reason_of(error: ConcludeError) -> String {
    match error {
        ConcludeError::NotMoved(error) => error.to_string(),
        other => panic!("{other}"),
    }
}

#[test]
fn a_disk_that_does_not_write_out_in_time_goes_on_and_its_job_ends_at_another_time() {
    for kind in [JobKind::Stream, JobKind::Commit] {
        let bounds = Bounds {
            write_out: SHORT,
            ..Bounds::default()
        };
        let Some(mut stuck) = Stuck::new(bounds, false) else {
            return;
        };
        let (mut job, told) = stuck.begin(kind);
        told.recv_timeout(PATIENCE).unwrap();
        for round in 1..3 {
            // The queue's thread is held up before it hears of anything else.
            let (go, wait) = channel::<()>();
            let hold_up = move || {
                // It comes, or there is nobody to send it any more.
                let _ = wait.recv();
            };
            stuck.disk.worker().order(Order::Pause(Box::new(hold_up)));
            let error = job.conclude(&stuck.disk.block, true).unwrap_err();
            assert!(matches!(error, ConcludeError::Timeout), "{error}");
            assert_eq!(job.view().status, JobStatus::Ready);
            drop(go);
            stuck.use_disk(round);
        }
        // It is only the host that is slow in this test, not the machine.
        job.bounds.write_out = PATIENCE;
        job.conclude(&stuck.disk.block, true).unwrap();
        match kind {
            JobKind::Commit => stuck.moved(job),
            JobKind::Stream => {
                drop(job);
                stuck.use_disk(5);
                drop(stuck.disk);
                assert!(qemu::content(&stuck.path) == stuck.expected);
            }
        }
    }
}

#[test]
fn a_base_that_does_not_take_the_rest_in_time_fails_the_commit_and_nobody_waits_for_it() {
    let bounds = Bounds {
        last_copy: SHORT,
        ..Bounds::default()
    };
    let Some(mut stuck) = Stuck::new(bounds, false) else {
        return;
    };
    let (mut job, told) = stuck.ready();
    stuck.use_disk(1);
    stuck.host.base.set(true);
    let reason = reason_of(job.conclude(&stuck.disk.block, true).unwrap_err());
    assert!(reason.contains("took too long"), "{reason}");
    // The host has not come back, and the guest has its disk.
    stuck.use_disk(2);
    assert!(!job.has_ended() && stuck.disk.block.has_job());
    stuck.host.base.set(false);
    while !job.has_ended() {
        told.recv_timeout(PATIENCE).unwrap();
    }
    drop(job);
    stuck.disk.block.bounds = Bounds::default();
    stuck.goes_on();
}

#[test]
fn an_image_that_is_not_begun_to_be_emptied_in_time_stays_the_disks() {
    let bounds = Bounds {
        emptying: SHORT,
        ..Bounds::default()
    };
    let Some(mut stuck) = Stuck::new(bounds, false) else {
        return;
    };
    let (mut job, _) = stuck.ready();
    stuck.use_disk(1);
    stuck.fate(Step::Empty, Fate::Left);
    let reason = reason_of(job.conclude(&stuck.disk.block, true).unwrap_err());
    assert!(reason.contains("emptying"), "{reason}");
    assert!(reason.contains("took too long"), "{reason}");
    ended(&job);
    drop(job);
    stuck.use_disk(2);
    stuck.disk.block.bounds = Bounds::default();
    stuck.goes_on();
}

#[test]
fn a_disk_whose_image_is_not_emptied_in_time_goes_on_with_its_base_which_has_everything() {
    let bounds = Bounds {
        emptying: SHORT,
        ..Bounds::default()
    };
    let Some(mut stuck) = Stuck::new(bounds, false) else {
        return;
    };
    let (mut job, _) = stuck.ready();
    stuck.use_disk(1);
    stuck.fate(Step::Empty, Fate::Begun);
    let note = job.conclude(&stuck.disk.block, true).unwrap().unwrap();
    assert!(note.contains("could not be emptied"), "{note}");
    assert!(note.contains("took too long"), "{note}");
    stuck.moved(job);
}

#[test]
fn an_image_whose_room_is_not_found_in_time_only_loses_it() {
    let Some(mut stuck) = Stuck::new(Bounds::default(), true) else {
        return;
    };
    let (mut job, _) = stuck.ready();
    stuck.use_disk(1);
    assert_eq!(job.conclude(&stuck.disk.block, true).unwrap(), None);
    stuck.moved(job);
}

#[test]
fn a_job_that_is_cancelled_waits_for_a_step_that_has_begun_only_so_long() {
    for (kind, step) in [
        (JobKind::Stream, Step::Populate(0)),
        (JobKind::Commit, Step::Take(0, 0)),
    ] {
        for fate in [Fate::Left, Fate::Begun] {
            let bounds = Bounds {
                // What can be taken back need not be waited for at all.
                last_step: match fate {
                    Fate::Begun => SHORT,
                    _ => Duration::from_secs(3600),
                },
                ..Bounds::default()
            };
            let Some(mut stuck) = Stuck::new(bounds, false) else {
                return;
            };
            stuck.fate(step, fate);
            let (job, told) = stuck.begin(kind);
            stuck.disk.wait_until("the step is left", |_| {
                !stuck.host.begun.lock().unwrap().is_empty()
            });
            job.cancel();
            told.recv_timeout(PATIENCE).unwrap();
            assert_eq!(job.view().status, JobStatus::Cancelled);
            drop(job);
            // Nobody hears of it any more.
            stuck.host.begun.lock().unwrap().clear();
            stuck.use_disk(1);
            stuck.disk.block.bounds = Bounds::default();
            stuck.goes_on();
        }
    }
}

#[test]
fn writes_under_way_that_lacked_space_wait_for_it_only_while_there_is_none() {
    let Some(stuck) = Stuck::new(Bounds::default(), false) else {
        return;
    };
    stuck.host.full.store(5, SeqCst);
    // The first that it tells of is the end.
    let (mut job, _) = stuck.ready();
    assert_eq!(stuck.host.full.load(SeqCst), 0);
    job.conclude(&stuck.disk.block, true).unwrap();
    stuck.moved(job);
}

//! The virtio block device (virtio 1.3 §5.2).
//!
//! One sandboxed thread per queue (`worker`), each with a queue of its own into the disk engine
//! ([`crate::disk`]); nothing is shared between them but a few atomics and, where one is
//! configured, the rate limiter. A qcow2 image that is written to has one owner of its metadata, and
//! so one thread for all queues; where a disk with several comes to such an image while it is in
//! use, the first one has the engine and the others pass on to it what they have
//! ([`crate::disk::relay`]), until the VM is booted again.

mod config;
mod counters;
mod frozen;
mod hold;
mod info;
pub mod job;
mod new_disk;
pub mod request;
mod shared;
pub mod snapshot;
#[cfg(test)]
pub(crate) mod tests;
pub mod watermarks;
mod worker;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use crate::disk::qcow2::create::Preallocation;
pub use config::{DetectZeroes, DiskConfig, ImageType, LockGranularity, OnEnospc};
pub use info::{Backing, DiskInfo, DiskReading};
pub use new_disk::{NewDiskConfig, SYSCALLS as CREATE_SYSCALLS};

use self::counters::QueueCounters;
use self::hold::Hold;
use self::request::ID_BYTES;
use self::shared::{Offer, Shared};
use self::worker::{Common, QueueHandler};
use crate::config::{BuildContext, BuildError, Invalid};
use crate::disk::{self, Format, Image, OpenOptions, SECTOR, Threads, qcow2, raw, space};
use crate::rate_limiter::RateLimiter;
use crate::sandbox::{Allow, COMMON, Filter, SeccompMode, WORKER};
use crate::timer;
use crate::virtio::{VirtioDevice, config_space};
use crate::worker::{Order, Worker};

/// VIRTIO_ID_BLOCK.
const DEVICE_TYPE: u16 = 2;

/// Bytes of a thread's name.
const NAME_BYTES: usize = 15;

/// A virtio block device.
pub struct Block {
    shared: Arc<Shared>,
    counters: Vec<Arc<QueueCounters>>,
    queue_sizes: Vec<u16>,
    // The threads end before the image is closed and its lock released: fields are dropped in this
    // order.
    workers: Vec<Worker>,
    /// Rung to have a queue try again what it holds for lack of space.
    retries: Vec<Arc<EventFd>>,
    hold: Arc<Hold>,
    opened: Mutex<Opened>,
    id: String,
    seccomp: SeccompMode,
    /// There is a job on the disk.
    job: Arc<AtomicBool>,
    /// What its jobs wait for.
    bounds: job::Bounds,
}

/// The image that the disk has now. Used on the VMM thread only; what is locked is never waited for.
struct Opened {
    config: DiskConfig,
    image: Arc<dyn Image>,
}

impl Drop for Block {
    /// The first thread may have the engine of all, so it ends last.
    fn drop(&mut self) {
        while self.workers.pop().is_some() {}
    }
}

impl Block {
    /// Opens the image and starts a thread per queue. Called on the VMM thread.
    pub fn new(config: &DiskConfig, context: BuildContext) -> Result<Self, BuildError> {
        let image = open(config)?;
        let shared = Arc::new(Shared::new(&Offer {
            size_bytes: image.size_bytes(),
            geometry: image.geometry(),
            readonly: config.readonly,
            sparse: config.sparse,
            num_queues: config.num_queues,
            queue_size: config.queue_size,
        }));
        let (file, reporter) = (image.host_file(), context.reporter.clone());
        let hold = Arc::new(Hold::new(config, file, reporter));
        let limiter = config
            .rate_limiter_config
            .as_ref()
            .and_then(|limits| RateLimiter::new(limits, Duration::ZERO))
            .map(|limiter| Arc::new(Mutex::new(limiter)));
        let common = Common {
            flush_lost: Arc::default(),
            shared: shared.clone(),
            limiter,
            epoch: Instant::now(),
            serial: serial(config.serial.clone().unwrap_or_else(|| image.serial())),
            reporter: context.reporter.clone(),
            queue_size: config.queue_size,
            hold: hold.clone(),
            detect_zeroes: config.detect_zeroes,
        };
        let queues = usize::from(config.num_queues);
        let counters: Vec<Arc<QueueCounters>> = (0..queues).map(|_| Arc::default()).collect();
        let mut retries = Vec::new();
        let mut workers = Vec::new();
        let mut first = 0;
        for counters in counters.chunks(usize::from(config.queues_per_thread())) {
            let retry_now = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
                .map(Arc::new)
                .map_err(|e| BuildError::host("making an eventfd", e))?;
            retries.push(retry_now.clone());
            let served = Served {
                first,
                counters: counters.to_vec(),
                retry_now,
            };
            first += counters.len() as u16;
            let image = image.as_ref();
            workers.push(spawn(image, &common, served, &context, config)?);
        }
        Ok(Self {
            shared,
            counters,
            queue_sizes: vec![config.queue_size; config.num_queues.into()],
            workers,
            retries,
            hold,
            opened: Mutex::new(Opened {
                config: config.clone(),
                image: image.into(),
            }),
            id: context.reporter.id().to_owned(),
            seccomp: context.seccomp,
            job: Arc::default(),
            bounds: job::Bounds::default(),
        })
    }

    /// Has every queue try at once what it holds for lack of space; does not wait. Called on the
    /// VMM thread.
    pub fn retry_held(&self) {
        for retry in &self.retries {
            // Fails only when the counter is full, and then it is rung anyway.
            let _ = retry.write(1);
        }
    }

    /// Has what is held fail if there is no space when it is tried next, which
    /// [`Block::retry_held`] does. Called on the VMM thread.
    pub fn give_up_held(&self) {
        self.hold.give_up();
    }

    /// Whether the VM is to stand still until the host has space.
    pub fn wants_pause(&self) -> bool {
        self.hold.wants_pause()
    }

    /// The disk's configuration as it is now.
    pub fn config(&self) -> DiskConfig {
        self.opened().config.clone()
    }

    /// Size of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.opened().image.size_bytes()
    }

    /// How many requests all queues hold.
    fn depth_of_all(&self) -> u16 {
        let all = self.queue_sizes.iter();
        all.fold(0, |sum, size| sum.saturating_add(*size))
    }

    fn opened(&self) -> MutexGuard<'_, Opened> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the image larger; the driver is not told before [`Block::set_size`]. Refusals name
    /// the field `desired_size`. Called on the VMM thread.
    pub fn grow(&self, size_bytes: u64) -> Result<(), BuildError> {
        let refuse = |reason: String| Err(Invalid::new("desired_size", reason).into());
        let (config, image) = {
            let opened = self.opened();
            (opened.config.clone(), opened.image.clone())
        };
        let is = image.size_bytes();
        let block = u64::from(image.geometry().logical_block);
        if config.readonly {
            return refuse("the disk is read-only".to_owned());
        }
        if self.has_job() {
            return refuse("there is a job on the disk".to_owned());
        }
        if size_bytes < is {
            return refuse(format!("the disk has {is} bytes; it can't be made smaller"));
        }
        if !size_bytes.is_multiple_of(block) {
            return refuse(format!("must be a multiple of {block}"));
        }
        if size_bytes > is {
            // The thread that has the engine, where the image's metadata has an owner.
            let attend = || {
                self.workers
                    .iter()
                    .take(1)
                    .for_each(|w| w.order(Order::Attend))
            };
            image
                .grow(size_bytes, &attend)
                .map_err(|error| match error {
                    BuildError::Host { doing, source } if lacks_space(&source) => {
                        let reason = format!("the host has no space for it: {doing}: {source}");
                        Invalid::new("desired_size", reason).into()
                    }
                    other => other,
                })?;
        }
        Ok(())
    }

    /// Whether the image has another size than the driver was told.
    pub fn has_new_size(&self) -> bool {
        self.shared.capacity_sectors() != self.size_bytes() / SECTOR
    }

    /// Puts the size of the image into the configuration space. The transport must tell the driver
    /// in the same breath.
    pub fn set_size(&self) {
        self.shared.set_size(self.size_bytes());
    }
}

/// Whether the host has no space, or no more for us.
fn lacks_space(error: &std::io::Error) -> bool {
    Errno::from_io_error(error).is_some_and(space::is_no_space)
}

/// The queues of a thread, and what it shares with nobody but its device.
struct Served {
    first: u16,
    counters: Vec<Arc<QueueCounters>>,
    retry_now: Arc<EventFd>,
}

/// Opens and locks the image of a disk.
fn open(config: &DiskConfig) -> Result<Box<dyn Image>, BuildError> {
    let format = match config.image_type {
        ImageType::Raw | ImageType::Unknown => Format::Raw,
        ImageType::Qcow2 => Format::Qcow2,
    };
    let options = OpenOptions {
        path: config.path.clone(),
        readonly: config.readonly,
        direct: config.direct,
        disable_io_uring: config.disable_io_uring,
        lock: config.lock_granularity,
        backing_files: config.backing_files,
        cache_bytes: config.l2_cache_size,
    };
    disk::open(format, &options)
}

impl DiskConfig {
    /// Checks that the image can be opened and that nobody else has it, and closes it again.
    pub fn check_host(&self) -> Result<(), BuildError> {
        open(self).map(drop)
    }
}

/// The kinds of thread there are, with the lists of their filters: a queue of each engine, one
/// whose engine can be exchanged for that of an overlay, one beside that, and a job.
pub fn thread_kinds() -> Vec<(&'static str, Vec<&'static [Allow]>)> {
    let own = disk::QUEUES
        .iter()
        .map(|(kind, list)| (*kind, lists(list, Exchanged::Never)));
    let exchanged = [
        ("raw-io-uring-or-overlay", raw::URING_SYSCALLS),
        ("raw-sync-or-overlay", raw::SYNC_SYSCALLS),
        ("qcow2-or-overlay", qcow2::WRITE_SYSCALLS[0]),
    ];
    let exchanged = exchanged.map(|(kind, list)| (kind, lists(list, Exchanged::Overlay)));
    let beside = [
        ("raw-io-uring-beside-owner", raw::URING_SYSCALLS),
        ("raw-sync-beside-owner", raw::SYNC_SYSCALLS),
    ];
    let beside = beside.map(|(kind, list)| (kind, lists(list, Exchanged::BesideOwner)));
    let job = [("disk-job", job::SYSCALLS.to_vec())];
    // One that commits has an engine of its own.
    let commits = [
        ("disk-commit-raw-io-uring", raw::URING_SYSCALLS),
        ("disk-commit-raw-sync", raw::SYNC_SYSCALLS),
        ("disk-commit-qcow2-io-uring", qcow2::WRITE_SYSCALLS[0]),
        ("disk-commit-qcow2-sync", qcow2::WRITE_SYSCALLS[1]),
    ];
    let commits = commits.map(|(kind, list)| {
        let lists = [job::SYSCALLS, &[list, job::BASE_SYSCALLS]].concat();
        (kind, lists)
    });
    let kinds = own.chain(exchanged).chain(beside);
    kinds.chain(job).chain(commits).collect()
}

/// What may take the place of the engine that a queue's thread begins with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Exchanged {
    /// Nothing.
    Never,
    /// Way to the engine of an overlay, which another thread of the disk has, and back.
    BesideOwner,
    /// The engine of an overlay, and that of a raw image again.
    Overlay,
}

/// The lists of the filter of a queue's thread, whose engine has the list `engine`.
fn lists(engine: &'static [Allow], exchanged: Exchanged) -> Vec<&'static [Allow]> {
    let mut lists = vec![COMMON, WORKER, engine, timer::SYSCALLS, space::SYSCALLS];
    if exchanged != Exchanged::Never {
        lists.extend([raw::URING_SYSCALLS, raw::SYNC_SYSCALLS]);
    }
    if exchanged == Exchanged::Overlay {
        lists.extend(qcow2::WRITE_SYSCALLS);
    }
    lists
}

/// Starts the thread of one queue, or of all.
fn spawn(
    image: &dyn Image,
    common: &Common,
    served: Served,
    context: &BuildContext,
    config: &DiskConfig,
) -> Result<Worker, BuildError> {
    let id = context.reporter.id();
    let name = thread_name(id, served.first, "");
    let engines = config.num_queues.div_ceil(config.queues_per_thread());
    let threads = threads(id, context.seccomp, served.first, engines);
    let engine = image
        .open_queue_with(
            common
                .queue_size
                .saturating_mul(served.counters.len() as u16),
            Some(&threads),
        )
        .map_err(|e| BuildError::host(format!("opening a disk queue for {name}"), e))?;
    let exchanged = match (snapshot::is_possible(config), served.first) {
        (false, _) => Exchanged::Never,
        (true, 0) => Exchanged::Overlay,
        (true, _) => Exchanged::BesideOwner,
    };
    let lists = lists(engine.syscalls(), exchanged);
    let filter = Filter::compile(&name, context.seccomp, &lists)
        .map_err(|e| BuildError::host("compiling a filter", std::io::Error::other(e)))?;
    let (first, counters) = (served.first, served.counters);
    let handler = QueueHandler::new(common.clone(), first, counters, engine, served.retry_now)
        .map_err(|e| BuildError::host("making a timer", e))?;
    Worker::spawn(&name, filter, context.reporter.clone(), handler)
        .map_err(|e| BuildError::host(format!("starting the thread {name}"), e))
}

/// The threads that an engine of a disk may have beside the queue's own: that of the queue `first`
/// and maybe more, one of `engines`.
fn threads(id: &str, seccomp: SeccompMode, first: u16, engines: u16) -> Threads {
    Threads::of_queue(thread_name(id, first, "_io"), seccomp, engines)
}

/// `<id>_q<N><role>`; of a long id the beginning is kept, so that the queue can still be told.
fn thread_name(id: &str, index: u16, role: &str) -> String {
    let suffix = format!("_q{index}{role}");
    let mut room = NAME_BYTES.saturating_sub(suffix.len()).min(id.len());
    while !id.is_char_boundary(room) {
        room -= 1;
    }
    format!("{}{suffix}", &id[..room])
}

/// The answer to GET_ID: filled up with zeroes.
fn serial(text: String) -> [u8; ID_BYTES] {
    let mut serial = [0; ID_BYTES];
    for (to, from) in serial.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    serial
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.shared.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.shared.image(), offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        self.shared.write(offset, data);
    }

    fn features_accepted(&self, features: u64) {
        self.shared.features_accepted(features);
    }

    fn workers(&self) -> &[Worker] {
        &self.workers
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        counters::sum(self.counters.iter().map(AsRef::as_ref))
    }

    fn as_block(&self) -> Option<&Block> {
        Some(self)
    }

    fn worker_of_queue(&self, index: usize) -> usize {
        match self.workers.len() {
            1 => 0,
            _ => index,
        }
    }
}

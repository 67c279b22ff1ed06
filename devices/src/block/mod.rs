//! The virtio block device (virtio 1.3 §5.2).
//!
//! One sandboxed thread per queue (`worker`), each with a queue of its own into the disk engine
//! ([`crate::disk`]); nothing is shared between them but a few atomics and, where one is
//! configured, the rate limiter.

mod config;
mod counters;
pub mod request;
mod shared;
#[cfg(test)]
pub(crate) mod tests;
mod worker;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub use config::{DiskConfig, ImageType, LockGranularity};

use self::counters::QueueCounters;
use self::request::ID_BYTES;
use self::shared::{Offer, Shared};
use self::worker::{Common, QueueHandler};
use crate::config::{BuildContext, BuildError};
use crate::disk::{self, Format, Image, OpenOptions};
use crate::rate_limiter::RateLimiter;
use crate::sandbox::{Allow, COMMON, Filter, WORKER};
use crate::timer;
use crate::virtio::{VirtioDevice, config_space};
use crate::worker::Worker;

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
    _image: Box<dyn Image>,
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
        let limiter = config
            .rate_limiter_config
            .as_ref()
            .and_then(|limits| RateLimiter::new(limits, Duration::ZERO))
            .map(|limiter| Arc::new(Mutex::new(limiter)));
        let common = Common {
            shared: shared.clone(),
            limiter,
            epoch: Instant::now(),
            serial: serial(config.serial.clone().unwrap_or_else(|| image.serial())),
            reporter: context.reporter.clone(),
            queue_size: config.queue_size,
        };
        let mut counters = Vec::new();
        let mut workers = Vec::new();
        for index in 0..config.num_queues {
            let count = Arc::new(QueueCounters::default());
            workers.push(spawn(
                index,
                image.as_ref(),
                &common,
                count.clone(),
                &context,
            )?);
            counters.push(count);
        }
        Ok(Self {
            shared,
            counters,
            queue_sizes: vec![config.queue_size; config.num_queues.into()],
            workers,
            _image: image,
        })
    }
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
    };
    disk::open(format, &options)
}

impl DiskConfig {
    /// Checks that the image can be opened and that nobody else has it, and closes it again.
    pub fn check_host(&self) -> Result<(), BuildError> {
        open(self).map(drop)
    }
}

/// The kinds of thread there are, with the lists of their filters: a queue of each engine.
pub fn thread_kinds() -> Vec<(&'static str, Vec<&'static [Allow]>)> {
    disk::QUEUES
        .iter()
        .map(|(kind, list)| (*kind, vec![COMMON, WORKER, *list, timer::SYSCALLS]))
        .collect()
}

/// Starts the thread of one queue.
fn spawn(
    index: u16,
    image: &dyn Image,
    common: &Common,
    counters: Arc<QueueCounters>,
    context: &BuildContext,
) -> Result<Worker, BuildError> {
    let name = thread_name(context.reporter.id(), index);
    let engine = image
        .open_queue(common.queue_size)
        .map_err(|e| BuildError::host(format!("opening a disk queue for {name}"), e))?;
    let lists = [COMMON, WORKER, engine.syscalls(), timer::SYSCALLS];
    let filter = Filter::compile(&name, context.seccomp, &lists)
        .map_err(|e| BuildError::host("compiling a filter", std::io::Error::other(e)))?;
    let handler = QueueHandler::new(common.clone(), counters, engine)
        .map_err(|e| BuildError::host("making a timer", e))?;
    Worker::spawn(&name, filter, context.reporter.clone(), handler)
        .map_err(|e| BuildError::host(format!("starting the thread {name}"), e))
}

/// `<id>_q<N>`; of a long id the beginning is kept, so that the queue can still be told.
fn thread_name(id: &str, index: u16) -> String {
    let suffix = format!("_q{index}");
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

    fn worker_of_queue(&self, index: usize) -> usize {
        index
    }
}

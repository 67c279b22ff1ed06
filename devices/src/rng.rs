//! The virtio entropy device (virtio 1.3 §5.4).
//!
//! One thread reads the source into the buffers the driver offers, at most 64 KiB each. §5.4.6.1
//! wants at least one byte in every buffer, so a source that has none right now (a hardware
//! generator, or a pool not yet seeded) keeps the buffer waiting, looked at ten times a second: the
//! source is opened non-blocking and can neither stall the thread nor have it spin.
//!
//! A regular file, for guests that must be reproducible, begins anew at its end: it gives the same
//! bytes over and over, which is said in the log when it is opened.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vm_memory::Bytes;

use crate::allow;
use crate::config::{BuildContext, BuildError, Invalid, PciCommon};
use crate::event::Reporter;
use crate::sandbox::{Allow, COMMON, Filter, WORKER};
use crate::timer::{self, Timer};
use crate::virtio::queue::Chain;
use crate::virtio::{Activation, VirtQueue, VirtioDevice};
use crate::worker::{Handler, Source, Worker, WorkerError};

/// VIRTIO_ID_RNG.
const DEVICE_TYPE: u16 = 4;
const QUEUE_SIZE: u16 = 64;

/// Bytes given per buffer at most.
const MAX_BYTES: usize = 64 << 10;
/// Descriptors looked at per buffer at most.
const MAX_DESCRIPTORS: usize = 256;
/// How soon to ask a source again that had nothing.
const RETRY: Duration = Duration::from_millis(100);
/// Buffers filled in a row before orders are looked at.
const BATCH: usize = 16;

/// What the thread needs beside [`COMMON`], [`WORKER`] and its timer.
pub const SYSCALLS: &[Allow] = &[allow!(pread64)];

/// A virtio entropy device and where its bytes come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RngConfig {
    #[serde(flatten)]
    #[allow(missing_docs)]
    pub common: PciCommon,
    /// A character device or file to read from.
    #[schema(value_type = String)]
    pub src: PathBuf,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            common: PciCommon::default(),
            src: "/dev/urandom".into(),
        }
    }
}

impl RngConfig {
    /// Checks all that can be known without looking at the host.
    pub fn validate(&self) -> Result<(), Invalid> {
        if self.src.as_os_str().is_empty() {
            return Err(Invalid::new("src", "must not be empty"));
        }
        Ok(())
    }
}

impl RngConfig {
    /// Checks that the source can be opened, and closes it again.
    pub fn check_host(&self) -> Result<(), BuildError> {
        Entropy::open(self).map(drop)
    }
}

/// The kind of thread there is, with the lists of its filter.
pub fn thread_kinds() -> Vec<(&'static str, Vec<&'static [Allow]>)> {
    vec![("rng", vec![COMMON, WORKER, timer::SYSCALLS, SYSCALLS])]
}

/// A virtio entropy device.
pub struct Rng {
    workers: [Worker; 1],
}

impl Rng {
    /// Opens the source and starts the thread. Called on the VMM thread.
    pub fn new(config: &RngConfig, context: BuildContext) -> Result<Self, BuildError> {
        let source = Entropy::open(config)?;
        let timer = Timer::new().map_err(|e| BuildError::host("making a timer", e))?;
        let name = context.reporter.id().to_owned();
        let lists = [COMMON, WORKER, timer::SYSCALLS, SYSCALLS];
        let filter = Filter::compile(&name, context.seccomp, &lists)
            .map_err(|e| BuildError::host("compiling a filter", io::Error::other(e)))?;
        let handler = EntropyHandler {
            source,
            timer,
            reporter: context.reporter.clone(),
            bytes: vec![0; MAX_BYTES],
            queue: None,
        };
        let worker = Worker::spawn(&name, filter, context.reporter, handler)
            .map_err(|e| BuildError::host(format!("starting the thread {name}"), e))?;
        Ok(Self { workers: [worker] })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write_config(&self, _offset: u64, _data: &[u8]) {}
    fn workers(&self) -> &[Worker] {
        &self.workers
    }
}

/// Where the bytes come from.
struct Entropy {
    file: File,
    /// In a regular file: where to go on reading.
    position: Option<u64>,
}

impl Entropy {
    fn open(config: &RngConfig) -> Result<Self, BuildError> {
        let path = config.src.as_path();
        let invalid = |reason: String| Invalid::new("src", reason);
        let refused = |error: Errno| BuildError::cannot_open("src", path, error);
        let before = rustix::fs::stat(path).map_err(refused)?;
        // Looked at before it is opened, since opening a FIFO or socket has effects; and after,
        // since the path may lead elsewhere by then.
        is_regular(before.st_mode).map_err(invalid)?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd =
            rustix::fs::openat(rustix::fs::CWD, path, flags, Mode::empty()).map_err(refused)?;
        let stat = rustix::fs::fstat(&fd).map_err(refused)?;
        let regular = is_regular(stat.st_mode).map_err(invalid)?;
        if regular {
            if stat.st_size == 0 {
                return Err(invalid(format!("{} is empty", path.display())).into());
            }
            tracing::warn!(
                path = %path.display(),
                "entropy comes from a regular file: its bytes are repeated"
            );
        }
        Ok(Self {
            file: File::from(fd),
            position: regular.then_some(0),
        })
    }

    /// Reads some bytes; 0 where there are none right now.
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize, Errno> {
        let result = match &mut self.position {
            None => rustix::io::read(&self.file, bytes),
            Some(position) => {
                let mut result = rustix::io::pread(&self.file, &mut *bytes, *position);
                if result == Ok(0) {
                    *position = 0;
                    result = rustix::io::pread(&self.file, bytes, 0);
                }
                if let Ok(count) = result {
                    *position += count as u64;
                }
                result
            }
        };
        match result {
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            other => other,
        }
    }
}

/// Whether it is a regular file; an error unless it is one or a character device.
fn is_regular(mode: u32) -> Result<bool, String> {
    match FileType::from_raw_mode(mode) {
        FileType::RegularFile => Ok(true),
        FileType::CharacterDevice => Ok(false),
        other => Err(format!(
            "must be a character device or a regular file; it is {other:?}"
        )),
    }
}

struct EntropyHandler {
    source: Entropy,
    timer: Timer,
    reporter: Reporter,
    bytes: Vec<u8>,
    queue: Option<VirtQueue>,
}

impl EntropyHandler {
    fn serve(&mut self) -> Result<(), WorkerError> {
        let Some(mut queue) = self.queue.take() else {
            return Ok(());
        };
        let result = self.fill_buffers(&mut queue);
        self.queue = Some(queue);
        result
    }

    fn fill_buffers(&mut self, queue: &mut VirtQueue) -> Result<(), WorkerError> {
        queue.disable_kicks()?;
        let mut used = false;
        for _ in 0..BATCH {
            let Some(chain) = queue.pop()? else {
                if used {
                    queue.notify()?;
                }
                used = false;
                if queue.enable_kicks()? {
                    queue.disable_kicks()?;
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            match self.fill(queue, chain) {
                Some(written) => queue.push_used(head, written)?,
                None => {
                    queue.undo_pop();
                    if used {
                        queue.notify()?;
                    }
                    return self.retry_later();
                }
            }
            used = true;
        }
        if used {
            queue.notify()?;
        }
        // Come back after having listened to orders. Fails only when it is set anyway.
        let _ = queue.kick().write(1);
        Ok(())
    }

    /// Fills one buffer; `None` where the source has nothing right now.
    fn fill(&mut self, queue: &VirtQueue, chain: Chain) -> Option<u32> {
        let mut written = 0;
        for descriptor in chain.take(MAX_DESCRIPTORS) {
            if !descriptor.is_write_only() {
                continue;
            }
            let want = (descriptor.len() as usize).min(MAX_BYTES - written);
            if want == 0 {
                continue;
            }
            let count = match self.source.read(&mut self.bytes[..want]) {
                Ok(count) => count,
                Err(error) => {
                    self.reporter.io_error("read", 0, &io::Error::from(error));
                    0
                }
            };
            if count == 0 {
                return (written > 0).then_some(written as u32);
            }
            let memory = queue.memory();
            if memory
                .write_slice(&self.bytes[..count], descriptor.addr())
                .is_err()
            {
                // Not memory: the driver gets what it had up to here.
                break;
            }
            written += count;
            if count < want {
                break;
            }
        }
        Some(written as u32)
    }

    fn retry_later(&self) -> Result<(), WorkerError> {
        self.timer
            .set(RETRY)
            .map_err(|e| WorkerError::new("setting the retry timer", e))
    }
}

impl Handler for EntropyHandler {
    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.timer.as_raw_fd()]
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), WorkerError> {
        self.queue = activation.queues.pop();
        self.serve()
    }

    fn ready(&mut self, source: Source) -> Result<(), WorkerError> {
        if let Source::Descriptor(_) = source {
            self.timer.acknowledge();
        }
        self.serve()
    }

    fn quiesce(&mut self) -> Result<(), WorkerError> {
        // Nothing is ever in flight between two events.
        Ok(())
    }

    fn resume(&mut self) -> Result<(), WorkerError> {
        self.serve()
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}

#[cfg(test)]
mod tests;

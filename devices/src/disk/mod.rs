//! Disk image engines: they know nothing of virtio.
//!
//! ```text
//!   block device ── push(Request) ─► Queue ── start() ─► host kernel
//!        ▲                             │
//!        └──── Completion ◄── poll() ──┘   `descriptor()` becomes readable when there are some
//! ```
//!
//! An [`Image`] is opened once, on the VMM thread, where it takes its lock and opens all it will
//! ever need; it then hands out one [`Queue`] per device thread. A queue owns a request, with the
//! guest memory it points to, from [`Queue::push`] until its [`Completion`] is given back, so
//! nothing is freed or unmapped while the kernel may still write to it, and a caller that reuses
//! the returned [`Buffers`] allocates nothing per request, unless it is in very many pieces.
//!
//! An engine does a request as a whole: it continues short transfers, moves misaligned buffers
//! through a bounce buffer, and falls back where the file system lacks an operation. It may hold a
//! request as long as it likes (for space to allocate, say): completions come in any order.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::config::{BuildError, Invalid};
use crate::sandbox::Allow;

pub mod blocking;
pub mod buffers;
pub mod commit;
pub mod compare;
pub mod copy;
pub mod dirty;
pub mod exchange;
pub mod lock;
pub mod measure;
pub(crate) mod new_file;
mod open;
pub mod pool;
pub mod qcow2;
pub mod raw;
pub mod relay;
pub mod resize;
mod ring;
pub mod space;
pub mod steps;

pub use buffers::Buffers;
pub use lock::LockGranularity;
pub use pool::Threads;

/// Bytes of a qcow2 chain's tables that are kept in memory unless it is told: with clusters of 64 KiB
/// what 256 GiB of the disk need.
pub const DEFAULT_CACHE_BYTES: u64 = 32 << 20;

/// Bytes in a sector, the unit in which guests count.
pub const SECTOR: u64 = 512;

/// A disk image that is open and locked. Dropped on the VMM thread, after all of its queues.
pub trait Image: Send + Sync {
    /// Size of the disk the guest sees, in bytes; a multiple of [`SECTOR`].
    fn size_bytes(&self) -> u64;
    /// In what units the image is best used.
    fn geometry(&self) -> Geometry;
    /// What tells this image from others: at most 20 ASCII bytes, the same for every opening of
    /// the same file.
    fn serial(&self) -> String;
    /// A queue that holds up to `depth` requests at a time, for a thread yet to be spawned. Where
    /// there is no io_uring its requests block that thread.
    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.open_queue_with(depth, None)
    }
    /// The same, with threads to be used where there is no io_uring. Called on the VMM thread.
    fn open_queue_with(&self, depth: u16, threads: Option<&Threads>) -> io::Result<Box<dyn Queue>>;
    /// Whether one thread has to own what the image knows of itself: there is one queue only then.
    fn has_owner(&self) -> bool {
        false
    }
    /// The file in which the image grows, to ask how much space it and its file system have.
    fn host_file(&self) -> Arc<File>;
    /// The file at the image's path, and those without which it is nothing, but for backing files.
    fn files(&self) -> Vec<Arc<File>> {
        vec![self.host_file()]
    }
    /// What the engine knows about the image beside its file. Called on the VMM thread.
    fn info(&self) -> io::Result<ImageInfo>;
    /// Makes the disk larger: `size_bytes` is more than [`Image::size_bytes`] and a multiple of the
    /// logical block. Its queues take requests beyond the old end from then on. On failure nothing
    /// is changed; a refusal names the field `desired_size`. Where it is the thread of a queue that
    /// does it, `attend` is called to have that thread call [`Queue::attend`]. Called on the VMM
    /// thread.
    fn grow(&self, _size_bytes: u64, _attend: &dyn Fn()) -> Result<(), BuildError> {
        let reason = "not supported yet: resizing images of this format while they are in use";
        Err(Invalid::new("desired_size", reason).into())
    }
    /// Whether all that is below the image can come into it while it is in use, and how the first
    /// queue's thread is told to; it looks when [`Queue::attend`] is called. A refusal names the
    /// field `id`. Called on the VMM thread.
    fn stream(&self) -> Result<Arc<dyn steps::Steps>, BuildError> {
        Err(Invalid::new("id", "an image of this format has no backing file").into())
    }
    /// Opens the image anew when it has forgotten what was below it, under the same lock. Its queue
    /// has written everything and stands still. Called on the VMM thread.
    fn reopen_alone(&self) -> Result<Box<dyn Image>, BuildError> {
        Err(Invalid::new("id", "an image of this format has no backing file").into())
    }
    /// Opens the image below this one, the base, for writing, so that what is in this one can come
    /// into it while both are in use. A refusal names the field `id`. Called on the VMM thread.
    fn begin_commit(&self) -> Result<Commit, BuildError> {
        Err(Invalid::new("id", "an image of this format has no backing file").into())
    }
    /// Opens the base of a commit anew, under the same lock, to be used by a disk: nobody reads it
    /// as the other image's backing file any more. Its queue is closed. Called on the VMM thread.
    fn reopen_base(&self) -> Result<Box<dyn Image>, BuildError> {
        Err(Invalid::new("id", "it is not the base of a commit").into())
    }
    /// The image that was opened anew is about to be used: this one's queue, which still stands
    /// still, is to be closed without a change to the file. Called on the VMM thread.
    fn hand_over(&self) {}
    /// Whether that is so; or the image was emptied ([`steps::Step::Empty`]), or may have been.
    fn is_handed_over(&self) -> bool {
        false
    }
    /// The image was emptied, its queue is closed: it is to know which room is free, and to take no
    /// more of the host. Where that fails some is lost until it is repaired. Called on the VMM
    /// thread.
    fn reclaim(&self) -> Result<(), BuildError> {
        Ok(())
    }
}

/// What it takes to commit an image.
pub struct Commit {
    /// Gives out what the image has ([`steps::Step::Take`]), and empties it in the end.
    pub steps: Arc<dyn steps::Steps>,
    /// Knows what is changed meanwhile.
    pub dirty: Arc<dirty::DirtyMap>,
    /// The image below. Only where the other image has something may it be written to, with the
    /// same content; then what that one shows stays the same, though it reads this one too.
    pub base: Arc<dyn Image>,
    /// What the base is.
    pub info: BackingInfo,
}

/// Units of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Requests must be multiples of this many bytes; a power of two, at least [`SECTOR`].
    pub logical_block: u32,
    /// Writes smaller than this cost the host a read as well; a power of two.
    pub physical_block: u32,
    /// Discards free whole multiples of this many bytes; a power of two.
    pub discard_granularity: u32,
}

/// What an engine knows about an image; `None` where it does not know, or the format has no such
/// thing.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageInfo {
    /// The image's format.
    pub format: Format,
    /// Size of the disk the guest sees.
    pub virtual_bytes: u64,
    /// The images below it, the nearest first.
    pub backing: Vec<BackingInfo>,
    /// The unit in which the image allocates.
    pub cluster_bytes: Option<u64>,
    /// Clusters that are known to be allocated and not in use.
    pub leaked_clusters: Option<u64>,
    /// Look-ups in tables of where data is, so far: those that the cache could answer, and all.
    pub cache: Option<(u64, u64)>,
    /// Names of the snapshots inside the image.
    pub snapshots: Option<Vec<String>>,
}

impl ImageInfo {
    /// Nothing is known but this.
    pub fn new(format: Format, virtual_bytes: u64) -> Self {
        Self {
            format,
            virtual_bytes,
            backing: Vec::new(),
            cluster_bytes: None,
            leaked_clusters: None,
            cache: None,
            snapshots: None,
        }
    }
}

/// An image on which another lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingInfo {
    /// Its file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
}

/// What to do with a range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read it into the buffers.
    Read,
    /// Write it from the buffers.
    Write {
        /// Complete only when the data would survive a power cut.
        durable: bool,
    },
    /// Make all that has been completed survive a power cut; has no range. After one through the
    /// page cache that failed all others fail too, until the image is opened anew.
    Flush,
    /// Give its space back to the host; what it then reads is not promised. A hint: no error where
    /// the host can't.
    Discard,
    /// Make it read as zeroes.
    WriteZeroes {
        /// Its space may be given back to the host.
        unmap: bool,
        /// As with [`Operation::Write`].
        durable: bool,
    },
}

impl Operation {
    /// Its name in events and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write { .. } => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes { .. } => "write-zeroes",
        }
    }
}

/// One request.
pub struct Request {
    /// Comes back with the completion.
    pub tag: u16,
    /// What to do.
    pub operation: Operation,
    /// Where the range begins, in bytes. The caller has checked that it lies within the image.
    pub offset: u64,
    /// How many bytes; with [`Operation::Read`] and [`Operation::Write`] as many as the buffers
    /// hold.
    pub length: u64,
    /// The guest's memory to read into or write from.
    pub buffers: Buffers,
}

/// A request that is done.
pub struct Completion {
    /// The request's.
    pub tag: u16,
    /// Whether all of it was done. A read past the end of the host's file fails with
    /// `UnexpectedEof`: the file was cut short behind our back. ENOSPC and EDQUOT say that the host
    /// has no space for it, that nothing that was completed is lost, and that the same request may
    /// be pushed again later.
    pub result: io::Result<()>,
    /// The request's, for reuse. An engine may have used them up by [`Buffers::advance`] and
    /// [`Buffers::split_to`], and in no other way: what lacked space is pushed again with them.
    pub buffers: Buffers,
}

/// The requests of one device thread. Used on that thread only, within its filter.
///
/// An error of any method but [`Queue::push`] means that the queue is broken for good; requests
/// that the kernel may still be working on then stay with the queue for ever.
pub trait Queue: Send {
    /// Takes a request. It may begin at once, or when [`Queue::start`] is called. Never more than
    /// the queue's depth may be held; one too many is completed with `EBUSY`.
    fn push(&mut self, request: Request);
    /// Has the host begin all that was pushed: one system call for the batch.
    fn start(&mut self) -> io::Result<()>;
    /// Appends what has been completed; does not wait.
    fn poll(&mut self, completed: &mut Vec<Completion>) -> io::Result<()>;
    /// As [`Queue::poll`], but waits until there is at least one, if any is held.
    fn wait(&mut self, completed: &mut Vec<Completion>) -> io::Result<()>;
    /// How many requests are pushed and not yet given back.
    fn held(&self) -> usize;
    /// Readable when [`Queue::poll`] may find something; `None` for a queue whose requests are
    /// completed by the time `start` returns, blocking the thread meanwhile.
    fn descriptor(&self) -> Option<RawFd>;
    /// Makes the descriptor unreadable until the next completion; to be called before `poll`.
    fn acknowledge(&mut self);
    /// Takes what the image, on its own thread, wants of the queue, and begins it; it goes on as
    /// requests do, and counts as held.
    fn attend(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// The system calls its thread needs for it.
    fn syscalls(&self) -> &'static [Allow];
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// A regular file or block device.
    pub path: PathBuf,
    /// Open for reading only.
    pub readonly: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// Use plain system calls, on threads where there may be some, even where the kernel offers
    /// io_uring.
    pub disable_io_uring: bool,
    /// What to lock against other processes.
    pub lock: LockGranularity,
    /// Follow the name of a backing file that the image has, and of an external data file.
    pub backing_files: bool,
    /// Most bytes of a qcow2 chain's tables that are kept in memory; [`DEFAULT_CACHE_BYTES`] without.
    /// What has been changed and not yet written is kept beyond that, until the next flush.
    pub cache_bytes: Option<u64>,
}

impl OpenOptions {
    /// For reading and writing, through the page cache, following no names.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            readonly: false,
            direct: false,
            disable_io_uring: false,
            lock: LockGranularity::ByteRange,
            backing_files: false,
            cache_bytes: None,
        }
    }
}

/// The formats there are. A format is always told, never guessed from the image's content, which
/// the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk, as they are.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// Its name, as QEMU has it and as headers record it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// The kinds of queue there are, and what each calls. Where there is no io_uring the threads of its
/// pool, if it has one, do so too.
pub const QUEUES: &[(&str, &[Allow])] = &[
    ("raw-io-uring", raw::URING_SYSCALLS),
    ("raw-sync", raw::SYNC_SYSCALLS),
    ("qcow2-io-uring", qcow2::URING_SYSCALLS),
    ("qcow2-sync", qcow2::SYNC_SYSCALLS),
    ("qcow2-write-io-uring", qcow2::WRITE_SYSCALLS[0]),
    ("qcow2-write-sync", qcow2::WRITE_SYSCALLS[1]),
];

/// Opens and locks an image. Called on the VMM thread.
///
/// Errors name the field of the disk's configuration that is to blame.
pub fn open(format: Format, options: &OpenOptions) -> Result<Box<dyn Image>, BuildError> {
    match format {
        Format::Raw => Ok(Box::new(raw::RawImage::open(options)?)),
        Format::Qcow2 => Ok(Box::new(qcow2::Qcow2Image::open(options)?)),
    }
}

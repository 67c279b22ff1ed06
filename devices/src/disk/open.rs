//! Opening a host file as a disk: what is accepted, and what is found out about it.
//!
//! Only regular files and block devices are. A path that names anything else is refused before it
//! is opened, since opening a FIFO can block and opening a character device can do things.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, StatxFlags};
use rustix::io::Errno;

use super::buffers::{AlignedBuffer, read_at};
use super::lock::{ImageLock, LockError};
use super::{Geometry, OpenOptions, SECTOR};
use crate::config::{BuildError, Invalid};

/// Alignment that suits every kind of memory mapping and every disk we know of.
const PAGE: u32 = 4096;

/// A host file, open and locked until the last clone is dropped.
#[derive(Clone)]
pub struct HostFile {
    pub file: Arc<File>,
    pub lock: Arc<ImageLock>,
    pub size_bytes: u64,
    pub geometry: Geometry,
    /// What O_DIRECT asks of buffers in memory; `None` without O_DIRECT.
    pub direct_memory_align: Option<u32>,
    pub block_device: bool,
    pub serial: String,
    /// Device and inode.
    pub identity: (u64, u64),
}

/// Opens and locks the file of a raw disk: its size is the disk's.
pub fn open(options: &OpenOptions) -> Result<HostFile, BuildError> {
    checked(open_file(options)?, options)
}

/// Checks that a file can be a raw disk.
pub fn checked(host: HostFile, options: &OpenOptions) -> Result<HostFile, BuildError> {
    let (path, size_bytes) = (options.path.display(), host.size_bytes);
    if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR) {
        return Err(invalid(format!(
            "{path} has {size_bytes} bytes; a disk has a multiple of {SECTOR}, and is not empty"
        )));
    }
    if !size_bytes.is_multiple_of(host.geometry.logical_block.into()) {
        return Err(invalid(format!(
            "{path} has {size_bytes} bytes, which is not a multiple of the {} bytes that its host \
             disk transfers at a time; not possible with `direct`",
            host.geometry.logical_block
        )));
    }
    Ok(host)
}

/// Opens and locks a file of any size.
pub fn open_file(options: &OpenOptions) -> Result<HostFile, BuildError> {
    open_any(options, Locking::Take)
}

/// Opens a file for reading that this process writes to, through another opening that is about to
/// end.
pub fn open_beside_own(options: &OpenOptions) -> Result<HostFile, BuildError> {
    open_any(options, Locking::BesideOwn)
}

/// Opens a file that this process has locked already, to look at it.
pub fn open_unlocked(options: &OpenOptions) -> Result<HostFile, BuildError> {
    open_any(options, Locking::Nothing)
}

/// Opens a file as its writer that this process reads through another opening, with the lock
/// `reader`; see [`ImageLock::beside_own_reader`].
pub fn open_beside_reader(
    options: &OpenOptions,
    reader: &Arc<ImageLock>,
) -> Result<HostFile, BuildError> {
    open_any(options, Locking::BesideReader(reader))
}

/// How a file is locked.
enum Locking<'a> {
    Take,
    BesideOwn,
    BesideReader(&'a Arc<ImageLock>),
    Nothing,
}

fn open_any(options: &OpenOptions, locking: Locking<'_>) -> Result<HostFile, BuildError> {
    let path = options.path.as_path();
    let before = rustix::fs::stat(path).map_err(|e| refused(path, e))?;
    check_kind(&before)?;
    let fd = open_fd(path, options)?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| refused(path, e))?;
    // The path may lead elsewhere by now.
    let block_device = check_kind(&stat)?;
    // O_NONBLOCK was for what may have come in its place.
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(|e| refused(path, e))?;
    rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK).map_err(|e| refused(path, e))?;

    let file = Arc::new(File::from(fd));
    let lock = match locking {
        Locking::Take => ImageLock::take(file.clone(), !options.readonly, options.lock),
        Locking::BesideOwn => ImageLock::beside_own(file.clone()),
        Locking::BesideReader(reader) => ImageLock::beside_own_reader(file.clone(), reader),
        Locking::Nothing => Ok(ImageLock::nothing(file.clone())),
    };
    let lock = Arc::new(lock.map_err(|e| lock_failed(path, e))?);
    let size_bytes = size(&file, &stat, block_device).map_err(|e| refused(path, e))?;
    let (geometry, direct_memory_align) = alignment(&file, &stat, block_device, options.direct)
        .map_err(|e| {
            BuildError::host(format!("finding the block size of {}", path.display()), e)
        })?;
    Ok(HostFile {
        file,
        lock,
        size_bytes,
        geometry,
        direct_memory_align,
        block_device,
        serial: serial(&stat),
        identity: (stat.st_dev, stat.st_ino),
    })
}

fn open_fd(path: &Path, options: &OpenOptions) -> Result<OwnedFd, BuildError> {
    let access = if options.readonly {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    let common = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let open = |flags| rustix::fs::openat(rustix::fs::CWD, path, flags, Mode::empty());
    if !options.direct {
        return open(common).map_err(|e| refused(path, e));
    }
    match open(common | OFlags::DIRECT) {
        Ok(fd) => Ok(fd),
        Err(Errno::INVAL) if open(common).is_ok() => Err(Invalid::new(
            "direct",
            format!("the file system of {} has no O_DIRECT", path.display()),
        )
        .into()),
        Err(error) => Err(refused(path, error)),
    }
}

/// Whether it is a block device; an error unless it is one or a regular file.
fn check_kind(stat: &Stat) -> Result<bool, BuildError> {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => return Ok(false),
        FileType::BlockDevice => return Ok(true),
        FileType::Directory => "a directory",
        FileType::CharacterDevice => "a character device",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        _ => "something else",
    };
    Err(invalid(format!(
        "must be a regular file or a block device; it is {kind}"
    )))
}

fn size(file: &File, stat: &Stat, block_device: bool) -> Result<u64, Errno> {
    if block_device {
        return rustix::fs::seek(file, rustix::fs::SeekFrom::End(0));
    }
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

fn alignment(
    file: &File,
    stat: &Stat,
    block_device: bool,
    direct: bool,
) -> io::Result<(Geometry, Option<u32>)> {
    let mut logical = SECTOR as u32;
    let mut physical = power_of_two(stat.st_blksize.try_into().unwrap_or(PAGE));
    if block_device {
        logical = power_of_two(rustix::fs::ioctl_blksszget(file)?);
        physical = power_of_two(rustix::fs::ioctl_blkpbszget(file)?);
    }
    let mut memory = None;
    if direct {
        let (memory_align, offset_align) = direct_alignment(file)?;
        memory = Some(memory_align);
        logical = logical.max(offset_align);
    }
    let physical = physical.clamp(logical, logical.max(64 << 10));
    Ok((
        Geometry {
            logical_block: logical,
            physical_block: physical,
            discard_granularity: physical,
        },
        memory,
    ))
}

/// What O_DIRECT asks of addresses in memory, and of offsets and lengths.
fn direct_alignment(file: &File) -> io::Result<(u32, u32)> {
    let found = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(found) = found
        && found.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        && found.stx_dio_offset_align != 0
    {
        return Ok((
            // As small as a word: most misaligned buffers need no bounce.
            found.stx_dio_mem_align.clamp(1, PAGE).next_power_of_two(),
            power_of_two(found.stx_dio_offset_align),
        ));
    }
    // Linux before 6.1, or a file system that does not say: try.
    for align in [SECTOR as u32, PAGE] {
        let mut buffer = AlignedBuffer::zeroed(align as usize, PAGE)?;
        let parts = buffer.parts(align as usize);
        match read_at(rustix::fd::AsFd::as_fd(file), parts, 0, false) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok((PAGE, align)),
        }
    }
    Err(Errno::INVAL.into())
}

/// The next power of two, from a sector up to 64 KiB.
fn power_of_two(value: u32) -> u32 {
    value.clamp(SECTOR as u32, 64 << 10).next_power_of_two()
}

/// The file's identity in digits, as Cloud Hypervisor has it.
fn serial(stat: &Stat) -> String {
    let mut text = format!("{}{}{}", stat.st_dev, stat.st_rdev, stat.st_ino);
    text.truncate(20);
    text
}

fn invalid(reason: String) -> BuildError {
    Invalid::new("path", reason).into()
}

fn refused(path: &Path, error: Errno) -> BuildError {
    BuildError::cannot_open("path", path, error)
}

fn lock_failed(path: &Path, error: LockError) -> BuildError {
    match error {
        LockError::Held(_) => BuildError::Locked {
            path: path.display().to_string(),
            reason: error.to_string(),
        },
        LockError::Unsupported(_) => invalid(format!("{}: {error}", path.display())),
        LockError::Host(source) => BuildError::host(format!("locking {}", path.display()), source),
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    fn options(path: &Path) -> OpenOptions {
        OpenOptions::new(path)
    }

    fn refusal(path: &Path) -> String {
        match open(&options(path)) {
            Err(BuildError::Invalid(invalid)) => {
                assert_eq!(invalid.field, "path");
                invalid.reason
            }
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("{} was accepted", path.display()),
        }
    }

    #[test]
    fn what_is_no_disk_is_refused_without_blocking() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert!(refusal(folder.path()).contains("a directory"));
        assert!(refusal(&at("missing")).contains("No such file"));
        assert!(refusal(Path::new("/dev/zero")).contains("a character device"));
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), FileType::Fifo, mode, 0).unwrap();
        assert!(refusal(&at("fifo")).contains("a FIFO"));
        let _listener = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        assert!(refusal(&at("socket")).contains("a socket"));
    }

    #[test]
    fn an_image_of_no_or_of_broken_size_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(refusal(file.path()).contains("0 bytes"));
        file.as_file().set_len(1000).unwrap();
        assert!(refusal(file.path()).contains("1000 bytes"));
        file.as_file().set_len(1024).unwrap();
        assert_eq!(open(&options(file.path())).unwrap().size_bytes, 1024);
    }

    #[test]
    fn an_open_image_is_blocking_and_its_serial_fits() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let host = open(&options(file.path())).unwrap();
        let flags = rustix::fs::fcntl_getfl(&host.file).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK));
        assert!(host.serial.len() <= 20 && host.serial.is_ascii() && !host.serial.is_empty());
    }

    #[test]
    fn alignment_is_found_for_direct_images() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let mut options = options(file.path());
        options.direct = true;
        let host = open(&options).unwrap();
        let memory = host.direct_memory_align.unwrap();
        assert!(memory.is_power_of_two() && memory <= PAGE);
        assert!(host.geometry.logical_block.is_power_of_two());
    }
}

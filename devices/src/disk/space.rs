//! How much space an image and its host file system have: two system calls, on any thread whose
//! filter has [`SYSCALLS`].
//!
//! Free is what `statfs` calls available (`f_bavail`), and full is as `df` computes it, so that
//! nobody sees other numbers here than there. A quota may end sooner than the file system.

use std::fs::File;
use std::io;

use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

use crate::allow;
use crate::sandbox::Allow;

/// What looking needs.
pub const SYSCALLS: &[Allow] = &[allow!(fstat), allow!(fstatfs)];

/// What a file takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSpace {
    /// Bytes up to its end.
    pub length: u64,
    /// Bytes that the file system keeps for it.
    pub allocated: u64,
}

/// What a file system has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystemSpace {
    /// Bytes for the taking.
    pub free: u64,
    /// Those, and those in use.
    pub total: u64,
}

/// Where a regular file is, and what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which file system, as `stat` names it.
    pub device: u64,
    /// Which file of it.
    pub inode: u64,
    /// What it takes.
    pub file: FileSpace,
    /// What its file system has; `None` where that does not say.
    pub system: Option<FileSystemSpace>,
}

/// Whether an error says that the host has no space, or no more for us.
pub fn is_no_space(error: Errno) -> bool {
    [Errno::NOSPC, Errno::DQUOT].contains(&error)
}

/// What the file takes; `None` for a block device, which is there as a whole.
pub fn of_file(file: &File) -> io::Result<Option<FileSpace>> {
    let stat = rustix::fs::fstat(file)?;
    Ok(space_of(&stat))
}

/// What the file system of a regular file has; `None` for a block device, and where the file
/// system does not say.
pub fn of_file_system(file: &File) -> io::Result<Option<FileSystemSpace>> {
    Ok(place(file)?.and_then(|place| place.system))
}

/// Both, and where the file is; `None` for a block device.
pub fn place(file: &File) -> io::Result<Option<Place>> {
    let stat = rustix::fs::fstat(file)?;
    let Some(space) = space_of(&stat) else {
        return Ok(None);
    };
    let found = rustix::fs::fstatvfs(file)?;
    let used = found.f_blocks.saturating_sub(found.f_bfree);
    let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
    let system = FileSystemSpace {
        free: bytes(found.f_bavail),
        total: bytes(used.saturating_add(found.f_bavail)),
    };
    Ok(Some(Place {
        device: stat.st_dev,
        inode: stat.st_ino,
        file: space,
        system: (system.total > 0).then_some(system),
    }))
}

fn space_of(stat: &Stat) -> Option<FileSpace> {
    let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    regular.then(|| FileSpace {
        length: u64::try_from(stat.st_size).unwrap_or(0),
        allocated: u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_sparse_file_takes_less_than_it_is_long() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 8192).unwrap();
        file.sync_all().unwrap();
        let space = of_file(&file).unwrap().unwrap();
        assert_eq!(space.length, 1 << 20);
        assert!((4096..1 << 20).contains(&space.allocated), "{space:?}");
        let system = of_file_system(&file).unwrap().unwrap();
        assert!(system.free <= system.total && system.total > 1 << 20);
    }

    #[test]
    fn what_is_no_regular_file_takes_no_space_of_a_file_system() {
        let file = File::open("/dev/null").unwrap();
        assert_eq!(of_file(&file).unwrap(), None);
        assert_eq!(of_file_system(&file).unwrap(), None);
    }
}

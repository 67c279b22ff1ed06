//! An image that is marked as dirty is mended before it is written to.
//!
//! Who has the compatible feature "lazy refcounts" may set the dirty bit and then write L2 tables
//! without the refcounts that belong to them; where such a process dies the refcounts must be built
//! anew before anything is allocated (`docs/interop/qcow2.txt`, "Incompatible features", bit 0).
//! QEMU does it when it opens the image, and so do we: refcounts and COPIED bits are set right and
//! synced, and only then the bit goes, so that whoever dies on the way leaves an image that is dirty
//! still, for the next to mend. Afterwards the bit stays clear: we write refcounts as they are.
//!
//! An image that a running commit has emptied has the refcounts that it had: they are set right too.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::super::OpenOptions;
use super::super::super::open::open_unlocked;
use super::super::chain::{failed, refused};
use super::super::details::ReadError;
use super::super::header::Header;
use super::{Limits, Listener, Repair, Report, check_file};
use crate::allow;
use crate::config::BuildError;
use crate::sandbox::Allow;

/// Bytes of L2 tables that are read, in one walk over all windows: seconds, in which the VMM does
/// nothing else. An image of 1 TiB with clusters of 64 KiB has 128 MiB, and four windows.
const MOST_BYTES: u64 = 1 << 30;
/// However little of it that is, an image can make more of it: by tables of snapshots and bitmaps,
/// and by what is strewn over a file that is all holes.
const MOST_TIME: Duration = Duration::from_secs(if cfg!(test) { 10 } else { 30 });

/// So long the VMM looks for lost room at most.
const RECLAIM_TIME: Duration = Duration::from_secs(5);

/// What [`settle`] and [`reclaim`] call, beside what opening does.
pub const SYSCALLS: &[Allow] = &[
    allow!(fdatasync),
    allow!(fsync),
    allow!(ftruncate),
    allow!(pread64),
    allow!(pwrite64),
];

/// Mends an image that is marked as dirty. `locked` is its file, open and locked for writing.
///
/// Errors name the field `path`: an image that contradicts itself beyond its refcounts is left
/// dirty, and so is one that is too large to be mended while somebody waits.
pub fn settle(options: &OpenOptions, header: &Header, locked: &File) -> Result<(), BuildError> {
    let path = options.path.as_path();
    let file = open_again(options, locked)?;
    let hint = "it was not closed cleanly (dirty bit)";
    let cluster_bits = header.cluster_bits;
    let report = mend(&file, Repair::All, cluster_bits, MOST_TIME).map_err(|error| {
        match error {
            // What is said of an image that is beyond a bound.
            ReadError::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => refused(
                path,
                format!("{hint} and can't be mended now: {error} (`ballast disk repair`)"),
            ),
            ReadError::Io(error) => {
                BuildError::host(format!("mending {}, as {hint}", path.display()), error)
            }
            ReadError::Unusable(why) => refused(path, format!("{hint}: {why}")),
        }
    })?;
    if report.corruptions > 0 {
        let count = report.corruptions;
        let reason = format!(
            "{hint}, and {count} contradictions in it can't be mended (`ballast disk check` tells \
             which); it can only be read (`readonly`)"
        );
        return Err(refused(path, reason));
    }
    tracing::info!(
        path = %path.display(),
        refcounts = report.corruptions_fixed,
        leaks = report.leaks_fixed,
        "a qcow2 image that was not closed cleanly was mended"
    );
    Ok(())
}

/// Has an image that was emptied know that its room is free, and cuts its file off. `locked` is that
/// file, still open and locked for writing; nobody uses it any more. An error leaves room lost.
pub fn reclaim(options: &OpenOptions, cluster_bits: u32, locked: &File) -> Result<(), BuildError> {
    let path = options.path.as_path();
    let file = open_again(options, locked)?;
    let report =
        mend(&file, Repair::Leaks, cluster_bits, RECLAIM_TIME).map_err(|error| match error {
            ReadError::Io(error) => failed(path, error),
            ReadError::Unusable(why) => refused(path, why.to_string()),
        })?;
    if report.corruptions > 0 {
        return Err(refused(path, "it contradicts itself"));
    }
    let end = report.image_end_offset;
    let cut = || match file.metadata()?.len() > end {
        true => file.set_len(end).and_then(|()| file.sync_all()),
        false => Ok(()),
    };
    cut().map_err(|e| BuildError::host(format!("cutting {} off", path.display()), e))
}

/// Another opening of the file that is open and locked as `locked`, and not through O_DIRECT, which
/// that one may have been opened with.
fn open_again(options: &OpenOptions, locked: &File) -> Result<Arc<File>, BuildError> {
    let path = options.path.as_path();
    let host = open_unlocked(&OpenOptions {
        readonly: false,
        direct: false,
        ..options.clone()
    })?;
    match is_same(&host.file, locked).map_err(|e| failed(path, e))? {
        true => Ok(host.file),
        false => Err(refused(path, "another file has come in its place")),
    }
}

/// Does so while somebody waits, who does not hear of findings.
fn mend(
    file: &File,
    repair: Repair,
    cluster_bits: u32,
    time: Duration,
) -> Result<Report, ReadError> {
    let limits = Limits {
        tables: MOST_BYTES >> cluster_bits,
        until: Some(Instant::now() + time),
    };
    let mut listener = Listener {
        finding: &mut |_| {},
        progress: &mut |_, _| {},
    };
    check_file(file, repair, limits, &mut listener)
}

fn is_same(file: &File, other: &File) -> std::io::Result<bool> {
    let (a, b) = (rustix::fs::fstat(file)?, rustix::fs::fstat(other)?);
    Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}

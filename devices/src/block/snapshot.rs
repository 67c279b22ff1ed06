//! `vm.snapshot-disk`: disks move on to new overlays, and their images stay as they are.
//!
//! ```text
//!   1 check, and make the overlays    files without names: nothing is left of them on any failure
//!   2 pause and freeze the queues     what was done is on disk, in whole images
//!   3 open the overlays, stage them   all that can fail, but for …
//!   4 name them                       file, name and folder are synced; the first names go again
//!                                     where a later one can't be had
//!   5 commit                          can't fail
//! ```
//!
//! Killed before 4, nothing has happened. Killed later, an overlay that has its name is whole, and
//! what the guest was told is written is in it or below it; one that nobody came to use is empty.
//!
//! The image becomes a backing file under the lock of a reader, which is taken before the
//! writer's is given up.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

use super::config::MAX_DESCRIPTORS;
use super::frozen::{Answer, FreezeError, Frozen};
use super::{Block, DiskConfig, ImageType, LockGranularity, Opened};
use crate::config::{BuildError, Invalid};
use crate::disk::new_file::NewFile;
use crate::disk::qcow2::Qcow2Image;
use crate::disk::qcow2::create::{NewBacking, begin_overlay};
use crate::disk::{Format, Image, OpenOptions};
use crate::sandbox::Allow;
use crate::{allow, disk};

/// What it takes beside opening and making images: the first of several names must go again where
/// the second can't be had.
pub const SYSCALLS: &[Allow] = &[
    // An image below is named absolutely.
    allow!(getcwd),
    allow!(unlinkat),
];

/// A disk, and the overlay it is to move on to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSnapshot {
    /// The disk's id.
    #[schema(example = "_disk0")]
    pub id: String,
    /// Where the overlay is to be: a name that nothing has yet.
    #[schema(value_type = String, example = "/var/lib/images/data-1.qcow2")]
    pub path: PathBuf,
}

/// Why disks stayed where they were.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// Because of the n-th of them.
    #[error("disks[{0}]: {1}")]
    Disk(usize, BuildError),
    /// A queue could not write out in time what it has; may be tried again.
    #[error("writing out what the disks hold took too long")]
    Timeout,
}

/// Whether a disk of this configuration can move on to an overlay, as far as that is known.
pub(super) fn is_possible(config: &DiskConfig) -> bool {
    refusal(config).is_none()
}

fn refusal(config: &DiskConfig) -> Option<&'static str> {
    if config.descriptors() > MAX_DESCRIPTORS {
        return Some(
            "the disk's queues (`num_queues` of `queue_size`) have more than 16384 descriptors, \
             which those of an overlay can't",
        );
    }
    if config.readonly {
        return Some("the disk is read-only: nothing would ever be in the overlay");
    }
    if config.lock_granularity == LockGranularity::Full {
        return Some("not supported yet: a disk whose `lock_granularity` is Full");
    }
    None
}

/// Moves all of these disks on to new overlays, or none; `go_on` unless the VM is paused. Called on
/// the VMM thread.
pub fn snapshot(disks: &[(&Block, &Path)], go_on: bool) -> Result<(), SnapshotError> {
    let mut paths = BTreeSet::new();
    for (number, (_, path)) in disks.iter().enumerate() {
        if !paths.insert(path) {
            let reason = "two disks can't have the same overlay";
            let error = Invalid::new("path", reason).into();
            return Err(SnapshotError::Disk(number, error));
        }
    }
    let mut moves = each(disks, |(block, path)| Move::begin(block, path))?;

    // From here on the queues stand still, until this is dropped.
    let blocks = disks.iter().map(|(block, _)| *block).collect();
    let _frozen = Frozen::freeze(blocks, go_on).map_err(|e| match e {
        FreezeError::Disk(number, error) => SnapshotError::Disk(number, error),
        FreezeError::Timeout => SnapshotError::Timeout,
    })?;
    each(&mut moves, Move::open)?;
    let names = each(&mut moves, Move::name)?;
    // Nothing fails any more.
    names.into_iter().for_each(disk::new_file::Named::keep);
    let commits: Vec<_> = moves.iter().flat_map(Move::commit).collect();
    for commit in commits {
        // A worker that is gone has closed its engine.
        let _ = commit.recv();
    }
    moves.into_iter().for_each(Move::finish);
    Ok(())
}

/// Does it for each; an error says for which it was.
fn each<T, R>(
    all: impl IntoIterator<Item = T>,
    mut what: impl FnMut(T) -> Result<R, BuildError>,
) -> Result<Vec<R>, SnapshotError> {
    let numbered = all.into_iter().enumerate();
    let results =
        numbered.map(|(number, one)| what(one).map_err(|e| SnapshotError::Disk(number, e)));
    results.collect()
}

/// One disk on its way.
struct Move<'a> {
    block: &'a Block,
    path: PathBuf,
    /// What the disk's configuration will be.
    config: DiskConfig,
    /// The overlay without a name.
    file: Option<NewFile>,
    image: Option<Qcow2Image>,
}

impl<'a> Move<'a> {
    fn begin(block: &'a Block, path: &Path) -> Result<Self, BuildError> {
        let Opened { config, image } = &*block.opened();
        if let Some(reason) = refusal(config) {
            return Err(Invalid::new("id", reason).into());
        }
        let below = std::path::absolute(&config.path)
            .map_err(|e| BuildError::host("finding the working directory", e))?;
        if block.has_job() {
            return Err(Invalid::new("id", "there is a job on the disk").into());
        }
        is_still_there(&below, image.as_ref())?;
        let format = match config.image_type {
            ImageType::Raw | ImageType::Unknown => Format::Raw,
            ImageType::Qcow2 => Format::Qcow2,
        };
        let backing = NewBacking {
            name: below,
            format,
        };
        let file = begin_overlay(path, image.size_bytes(), backing).map_err(|e| blame(e, path))?;
        let mut config = config.clone();
        config.path = path.into();
        config.image_type = ImageType::Qcow2;
        config.backing_files = true;
        // Derived from the image's file otherwise: the guest shall know the disk again.
        config.serial.get_or_insert_with(|| image.serial());
        Ok(Self {
            block,
            path: path.into(),
            config,
            file: Some(file),
            image: None,
        })
    }

    /// Opens the overlay, and the image below it, which nobody writes to any more; has the workers
    /// take its engine.
    fn open(&mut self) -> Result<(), BuildError> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let (below, size_bytes) = {
            let old = &self.block.opened().image;
            (old.files(), old.size_bytes())
        };
        let own_name = file.own_name();
        let options = OpenOptions {
            path: own_name.clone(),
            readonly: false,
            direct: self.config.direct,
            disable_io_uring: self.config.disable_io_uring,
            lock: self.config.lock_granularity,
            backing_files: true,
            cache_bytes: self.config.l2_cache_size,
        };
        let image = Qcow2Image::open_overlay(&options, &self.path, &below);
        let image = image.map_err(|error| match blame(error, &self.path) {
            BuildError::Invalid(mut wrong) => {
                let (own, path) = (own_name.to_string_lossy(), self.path.to_string_lossy());
                wrong.reason = wrong.reason.replace(&*own, &path);
                wrong.into()
            }
            other => other,
        })?;
        let block = image.geometry().logical_block;
        let guest_block = self.block.shared.logical_block();
        if block > guest_block {
            let reason = format!(
                "{} is where the host transfers {block} bytes at a time, and the guest uses the \
                 disk in blocks of {guest_block}",
                self.path.display()
            );
            return Err(Invalid::new("path", reason).into());
        }
        if image.size_bytes() != size_bytes {
            return Err(Invalid::new("path", "the overlay has not the size of the disk").into());
        }
        let failed = |e| BuildError::host(format!("opening {}", self.path.display()), e);
        // Kept, whatever becomes of it, until nobody has it staged.
        let image = self.image.insert(image);
        self.block.stage(image).map_err(failed)
    }

    fn name(&mut self) -> Result<disk::new_file::Named, BuildError> {
        match self.file.take() {
            Some(file) => file.finish_durably(),
            None => Err(Invalid::new("path", "there is no overlay").into()),
        }
    }

    fn commit(&self) -> Vec<Answer> {
        self.block.commit_staged()
    }

    /// The old engine is closed: so can the old image be.
    fn finish(self) {
        if let Some(image) = self.image {
            self.block.hold.set_file(image.host_file());
            *self.block.opened() = Opened {
                config: self.config,
                image: Arc::new(image),
            };
        }
    }
}

/// An image can lie below another only under its name, and only if it is a file.
pub(super) fn is_still_there(path: &Path, image: &dyn Image) -> Result<(), BuildError> {
    let file = image.files().into_iter().next();
    let stat = rustix::fs::fstat(file.unwrap_or_else(|| image.host_file()));
    let stat = stat.map_err(|e| BuildError::host("looking at the disk's image", e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        let reason = format!(
            "{} is a block device, and a backing file must be a regular file",
            path.display()
        );
        return Err(Invalid::new("id", reason).into());
    }
    match rustix::fs::stat(path) {
        Ok(found) if (found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino) => Ok(()),
        _ => {
            let reason = format!(
                "the image is no longer at {}, where it would be looked for",
                path.display()
            );
            Err(Invalid::new("id", reason).into())
        }
    }
}

/// Whatever is wrong with the overlay is the fault of where it is.
fn blame(error: BuildError, path: &Path) -> BuildError {
    match error {
        BuildError::Invalid(wrong) if wrong.field != "path" => {
            let reason = format!("{}: {}", path.display(), wrong.reason);
            Invalid::new("path", reason).into()
        }
        other => other,
    }
}

//! Disks that move on to overlays: in the machine first, and then in the configuration.

use std::path::{Path, PathBuf};

use devices::block::snapshot::{DiskSnapshot, SnapshotError, snapshot};
use devices::block::{Block, DiskConfig};
use devices::config::Invalid;

use super::Created;
use crate::error::Error;

/// A disk that has moved on.
#[derive(Debug, PartialEq, Eq)]
pub struct MovedOn {
    /// Its id.
    pub id: String,
    /// Its image.
    pub path: PathBuf,
    /// The image it had, now below that.
    pub backing_path: PathBuf,
}

impl Created {
    /// Moves all of these disks on to new overlays, or none. The VM runs or is paused, and stays so.
    pub fn snapshot_disks(&mut self, disks: &[DiskSnapshot]) -> Result<Vec<MovedOn>, Error> {
        if disks.is_empty() {
            return Err(Invalid::new("disks", "there must be at least one").into());
        }
        let go_on = !self.paused;
        let manager = &self.running()?.devices;
        let mut targets: Vec<(&Block, &Path)> = Vec::new();
        for (number, disk) in disks.iter().enumerate() {
            let field = format!("disks[{number}]");
            if disks.iter().take(number).any(|other| other.id == disk.id) {
                let reason = format!("the disk `{}` is there twice", disk.id);
                return Err(Invalid::new(format!("{field}.id"), reason).into());
            }
            self.jobs.check_free(&disk.id)?;
            let block = manager.disk(&disk.id).map_err(|e| e.within(&field))?;
            targets.push((block, &disk.path));
        }
        snapshot(&targets, go_on).map_err(|error| match error {
            SnapshotError::Disk(number, error) => {
                Error::from(error).within(&format!("disks[{number}]"))
            }
            SnapshotError::Timeout => Error::Timeout("writing out what the disks hold"),
        })?;
        let configs: Vec<_> = targets.iter().map(|(block, _)| block.config()).collect();
        let mut moved = Vec::new();
        for (disk, new) in disks.iter().zip(configs) {
            let Some(old) = self.move_disk(&disk.id, new) else {
                continue;
            };
            moved.push(MovedOn {
                id: disk.id.clone(),
                path: disk.path.clone(),
                backing_path: old,
            });
        }
        Ok(moved)
    }

    /// A disk has the image of the configuration `new` now, and is the same for the guest; says
    /// which it had.
    pub(super) fn move_disk(&mut self, id: &str, new: DiskConfig) -> Option<PathBuf> {
        let mut all = self.config.disks.iter_mut();
        let config = all.find(|config| config.common.id.as_deref() == Some(id))?;
        config.image_type = new.image_type;
        config.backing_files = new.backing_files;
        config.l2_cache_size = new.l2_cache_size;
        config.serial = new.serial;
        Some(std::mem::replace(&mut config.path, new.path))
    }
}

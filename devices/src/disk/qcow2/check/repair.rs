//! Repairs that are more than a number in a refcount block.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::super::super::OpenOptions;
use super::super::super::open::open_file;
use super::super::details::{CORRUPT, DIRTY, Details, ReadError};
use super::refcounts::set;
use super::{Checker, Listener, Repair, WINDOW, check, too_much};
use crate::config::BuildError;

const INCOMPATIBLE: u64 = 72;
const AUTOCLEAR: u64 = 88;
const REFCOUNT_TABLE: u64 = 48;
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// Takes away the marks that the image is dirty or corrupt.
pub fn mark_sound(file: &File, details: &Details) -> io::Result<()> {
    let marks = DIRTY | CORRUPT;
    if details.incompatible & marks == 0 {
        return Ok(());
    }
    file.sync_data()?;
    let sound = details.incompatible & !marks;
    file.write_all_at(&sound.to_be_bytes(), INCOMPATIBLE)
}

impl Checker<'_, '_> {
    /// To be called before anything is written: features that nobody knows are not kept up.
    pub fn before_change(&mut self) -> Result<(), ReadError> {
        self.changed = true;
        let kept = self.details.autoclear_kept();
        if kept != self.details.autoclear {
            self.file.write_all_at(&kept.to_be_bytes(), AUTOCLEAR)?;
        }
        Ok(())
    }

    /// Writes new refcounts behind all that there is, and switches over to them; the old ones are
    /// free afterwards. Should anything fail, nothing has happened.
    pub fn rebuild(&mut self) -> Result<(), ReadError> {
        let end = self.details.file_bytes;
        match self.rebuild_behind(self.clusters.max(self.highest + 1)) {
            Ok(()) => Ok(()),
            Err(error) => {
                // What was appended goes again; if not, it is beyond what is in use.
                let _ = self.file.set_len(end);
                Err(error)
            }
        }
    }

    fn rebuild_behind(&mut self, used: u64) -> Result<(), ReadError> {
        self.before_change()?;
        let cluster = self.details.cluster_bytes();
        let (mut blocks, mut table_clusters) = (0_u64, 0_u64);
        loop {
            let needed = (used + blocks + table_clusters).div_ceil(self.per_block());
            let more = (
                needed.max(blocks),
                (needed * 8).div_ceil(cluster).max(table_clusters),
            );
            if more == (blocks, table_clusters) {
                break;
            }
            (blocks, table_clusters) = more;
        }
        if table_clusters * cluster > MAX_TABLE_BYTES {
            return Err(too_much("it is too large for the refcounts it needs"));
        }
        self.bound(used.div_ceil(WINDOW))?;
        (self.listener.finding)("Rebuilding refcount structure");
        self.without_refcounts = true;
        let total = used + blocks + table_clusters;
        let order = self.details.refcount_order;
        let mut window = u64::MAX;
        let mut table = vec![0; (table_clusters * cluster) as usize];
        for block in 0..blocks {
            self.in_time()?;
            let mut bytes = vec![0; cluster as usize];
            let start = block * self.per_block();
            for number in start..(start + self.per_block()).min(total) {
                if number < used && number / WINDOW != window {
                    window = number / WINDOW;
                    self.count_window(window)?;
                }
                let count = match number < used {
                    true => {
                        let index = (number - self.window_start) as usize;
                        self.window.get(index).copied().unwrap_or(0)
                    }
                    false => 1,
                };
                let index = (number - start) as usize;
                if !set(&mut bytes, order, index, count.into()) {
                    return Err(too_much(
                        "a cluster has more references than a refcount can tell",
                    ));
                }
            }
            let offset = (used + block) * cluster;
            self.file.write_all_at(&bytes, offset)?;
            let entry = block as usize * 8;
            table[entry..entry + 8].copy_from_slice(&offset.to_be_bytes());
        }
        let table_offset = (used + blocks) * cluster;
        self.file.write_all_at(&table, table_offset)?;
        self.file.sync_all()?;
        // Twelve bytes within one sector: there is either the old table or the new.
        let mut field = [0; 12];
        field[..8].copy_from_slice(&table_offset.to_be_bytes());
        field[8..].copy_from_slice(&(table_clusters as u32).to_be_bytes());
        self.file.write_all_at(&field, REFCOUNT_TABLE)?;
        self.file.sync_data()?;
        Ok(())
    }
}

/// Takes all clusters of the disk away from an image, which shows what lies below it then, and
/// gives their space back to the host. Should it be interrupted, space is lost until a repair.
pub fn empty(options: &OpenOptions) -> Result<(), BuildError> {
    let path = options.path.display();
    let failed = |error: ReadError| {
        BuildError::host(
            format!("emptying {path}"),
            io::Error::other(error.to_string()),
        )
    };
    {
        let host = open_file(&OpenOptions {
            readonly: false,
            direct: false,
            ..options.clone()
        })?;
        let details = Details::read(&host.file, host.size_bytes).map_err(failed)?;
        if details.autoclear != 0 {
            // Bitmaps tell what has changed, and this changes all.
            host.file
                .write_all_at(&[0; 8], AUTOCLEAR)
                .and_then(|()| host.file.sync_data())
                .map_err(|e| failed(e.into()))?;
        }
        let zeroes = vec![0; details.l1_entries as usize * 8];
        host.file
            .write_all_at(&zeroes, details.header.l1_offset)
            .and_then(|()| host.file.sync_data())
            .map_err(|e| failed(e.into()))?;
    }
    let mut listener = Listener {
        finding: &mut |_| {},
        progress: &mut |_, _| {},
    };
    let report = check(options, Repair::Leaks, &mut listener)?;
    let host = open_file(&OpenOptions {
        readonly: false,
        direct: false,
        ..options.clone()
    })?;
    punch_unused(&host.file, report.image_end_offset).map_err(|e| failed(e.into()))
}

/// Cuts the file off behind what is in use.
fn punch_unused(file: &File, end: u64) -> io::Result<()> {
    if file.metadata()?.len() > end {
        file.set_len(end)?;
        file.sync_all()?;
    }
    Ok(())
}

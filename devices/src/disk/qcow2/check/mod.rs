//! Checking an image that nobody uses: does every cluster have the refcount that the tables give
//! it, and does every entry make sense; and mending what can be mended without guessing.
//!
//! ```text
//!   L1 tables (active, of snapshots) ─► list of L2 tables ─► references to clusters ─┐ compared,
//!   header, tables, snapshots, bitmaps, refcount structures ─► references ───────────┤ a window
//!   refcount blocks ─► refcounts ────────────────────────────────────────────────────┘ at a time
//! ```
//!
//! Memory is bounded whatever the image: references are counted for a *window* of clusters (256
//! GiB of an image with clusters of 64 KiB), and where there are more of them the tables are walked
//! again for each that holds anything.
//!
//! Repairs keep the image usable at every step: lowering the refcount of what nobody refers to,
//! raising one that is too low, setting the COPIED bits right, or writing new refcounts beside the
//! old ones and switching over with one write to the header. An entry that makes no sense is never
//! mended, since any choice might be the wrong one; while there are such, leaks are left too, for
//! they may be what the entry meant.

mod copied;
mod refcounts;
mod repair;
mod settle;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::time::Instant;

use super::super::OpenOptions;
use super::super::open::open_file;
use super::details::{Details, ReadError};
use crate::config::{BuildError, Invalid};

pub use repair::empty;
pub use settle::{SYSCALLS, reclaim, settle};

/// Clusters whose references are counted at a time; 4 bytes each. Tests have few, so that small
/// images have several windows.
const WINDOW: u64 = if cfg!(test) { 1 << 10 } else { 4 << 20 };

/// The most windows, and the most L2 tables read, all windows taken together: more than any image
/// with its clusters side by side has, where a sparse file can have a window for each entry.
const MAX_WINDOWS: u64 = if cfg!(test) { 1 << 10 } else { 1 << 16 };
const MAX_TABLES_READ: u64 = if cfg!(test) { 1 << 20 } else { 1 << 31 };

/// What is to be mended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: the image is only read.
    #[default]
    Nothing,
    /// Clusters that nobody refers to, and whose space is lost.
    Leaks,
    /// Whatever can be mended without guessing.
    All,
}

/// What a check found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What contradicts the format and is still there.
    pub corruptions: u64,
    /// Clusters whose space is lost.
    pub leaks: u64,
    /// Of these, how many are mended.
    pub corruptions_fixed: u64,
    /// As well.
    pub leaks_fixed: u64,
    /// Where the last cluster that is used ends.
    pub image_end_offset: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Those that have one in the file.
    pub allocated_clusters: u64,
    /// Those that do not follow the one before in the file.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
}

/// Who is told what is found, and how far it is.
pub struct Listener<'a> {
    /// One line for each finding.
    pub finding: &'a mut dyn FnMut(&str),
    /// So much of so much.
    pub progress: &'a mut dyn FnMut(u64, u64),
}

/// Checks a qcow2 image, and repairs it if asked to. What lies below it is not looked at.
///
/// With repairs the report tells what a second look found, beside what was fixed.
pub fn check(
    options: &OpenOptions,
    repair: Repair,
    listener: &mut Listener<'_>,
) -> Result<Report, BuildError> {
    let path = options.path.display();
    let host = open_file(&OpenOptions {
        readonly: repair == Repair::Nothing,
        direct: false,
        ..options.clone()
    })?;
    check_file(&host.file, repair, Limits::default(), listener).map_err(|error| match error {
        ReadError::Io(error) => BuildError::host(format!("checking {path}"), error),
        ReadError::Unusable(why) => Invalid::new("path", format!("{path}: {why}")).into(),
    })
}

/// How much is done before it is given up.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// L2 tables that one walk over all windows reads.
    tables: u64,
    /// When somebody has waited for long enough.
    until: Option<Instant>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            tables: MAX_TABLES_READ,
            until: None,
        }
    }
}

/// The same for a file that is open and locked, and not through O_DIRECT. Where it is given up, what
/// was mended so far stays, and the image has the marks that it had.
fn check_file(
    file: &File,
    repair: Repair,
    limits: Limits,
    listener: &mut Listener<'_>,
) -> Result<Report, ReadError> {
    let details = Details::read(file, file.metadata()?.len())?;
    let mut first = Checker::new(file, &details, repair, listener);
    first.limits = limits;
    first.run()?;
    let rebuild = first.wants_rebuild && repair == Repair::All && first.senseless == 0;
    let (before, mut changed) = (first.report, first.changed);
    if rebuild {
        first.rebuild()?;
        changed = true;
    }
    if repair == Repair::Nothing {
        return Ok(before);
    }
    let mut after = before;
    if changed {
        file.sync_data()?;
        let details = Details::read(file, file.metadata()?.len())?;
        // COPIED bits follow the refcounts, which are right only now.
        let mut second = Checker::new(file, &details, repair, listener);
        second.limits.until = limits.until;
        // A refcount that was too high may have come down to one. That is no guess if all of them
        // are right.
        second.mends_copied |= before.corruptions == 0;
        second.copied()?;
        let copied = second.report.corruptions;
        let mut quiet = |_: &str| {};
        let mut listener = Listener {
            finding: &mut quiet,
            progress: listener.progress,
        };
        let mut last = Checker::new(file, &details, Repair::Nothing, &mut listener);
        last.limits.until = limits.until;
        last.run()?;
        after = last.report;
        let corruptions = before.corruptions + copied;
        after.corruptions_fixed = corruptions.saturating_sub(after.corruptions);
        after.leaks_fixed = before.leaks.saturating_sub(after.leaks);
    }
    if after.corruptions == 0 {
        repair::mark_sound(file, &details)?;
    }
    file.sync_data()?;
    Ok(after)
}

/// One look at an image.
struct Checker<'a, 'l> {
    file: &'a File,
    details: &'a Details,
    repair: Repair,
    listener: &'a mut Listener<'l>,
    report: Report,
    /// Findings that can't be mended, since nobody knows what was meant.
    senseless: u64,
    /// Refcounts are missing, or lie where other things are.
    wants_rebuild: bool,
    changed: bool,
    /// COPIED bits are set right.
    mends_copied: bool,
    /// Clusters in the file; the last may be cut short.
    clusters: u64,
    /// The refcount table.
    table: Vec<u64>,
    /// Offset, how often it is referred to, whether the active L1 table does.
    l2_tables: Vec<(u64, u32, bool)>,
    window_start: u64,
    window: Vec<u32>,
    /// Windows in which there is something.
    touched: BTreeSet<u64>,
    /// The first walk, in which findings are told.
    first: bool,
    /// Leave out the references to the refcount structures, which are to be replaced.
    without_refcounts: bool,
    /// The last cluster that is used.
    highest: u64,
    work: (u64, u64),
    limits: Limits,
}

impl<'a, 'l> Checker<'a, 'l> {
    fn new(
        file: &'a File,
        details: &'a Details,
        repair: Repair,
        listener: &'a mut Listener<'l>,
    ) -> Self {
        let clusters = details.file_bytes.div_ceil(details.cluster_bytes());
        Self {
            file,
            details,
            repair,
            listener,
            report: Report {
                total_clusters: details.header.size_bytes.div_ceil(details.cluster_bytes()),
                ..Report::default()
            },
            senseless: 0,
            wants_rebuild: false,
            changed: false,
            mends_copied: repair == Repair::All,
            clusters,
            table: Vec::new(),
            l2_tables: Vec::new(),
            window_start: 0,
            window: Vec::new(),
            touched: BTreeSet::new(),
            first: true,
            without_refcounts: false,
            highest: 0,
            work: (0, 0),
            limits: Limits::default(),
        }
    }

    fn run(&mut self) -> Result<(), ReadError> {
        self.read_refcount_table()?;
        self.list_l2_tables()?;
        self.work = (0, self.l2_tables.len() as u64 + 1);
        self.touched.insert(0);
        self.bound(1)?;
        self.count_window(0)?;
        self.first = false;
        self.bound(self.touched.len() as u64)?;
        let windows: Vec<u64> = self.touched.iter().copied().collect();
        let tables = self.l2_tables.len() as u64;
        let ahead = self.repair != Repair::Nothing && windows.len() > 1 && !self.wants_rebuild;
        let walks = windows.len() as u64 * if ahead { 2 } else { 1 };
        self.work.1 = tables * walks + 1;
        if ahead {
            self.look_ahead(&windows[1..])?;
        }
        for window in windows {
            if window != 0 {
                self.count_window(window)?;
            }
            self.compare_window()?;
        }
        self.report.image_end_offset = (self.highest + 1) << self.details.header.cluster_bits;
        // With repairs they are looked at when the refcounts are right.
        if self.repair == Repair::Nothing || !self.changed {
            self.copied()?;
        }
        (self.listener.progress)(self.work.1, self.work.1);
        Ok(())
    }

    /// There is something in these clusters.
    fn touch(&mut self, first: u64, last: u64) {
        // Those that are too many already need not be known.
        if self.touched.len() as u64 <= MAX_WINDOWS {
            self.touched.extend(first / WINDOW..=last / WINDOW);
        }
    }

    /// Whether so many windows can be counted in a time that anybody waits for.
    fn bound(&self, windows: u64) -> Result<(), ReadError> {
        let tables = self.l2_tables.len() as u64;
        if windows > MAX_WINDOWS || windows.saturating_mul(tables) > self.limits.tables {
            return Err(too_much(
                "it has too many tables, or its clusters are strewn over too large a file, to be checked",
            ));
        }
        Ok(())
    }

    /// Whether there is time left; asked wherever an image can make something long.
    fn in_time(&self) -> Result<(), ReadError> {
        match self.limits.until {
            Some(until) if Instant::now() >= until => Err(too_much("it takes too long")),
            _ => Ok(()),
        }
    }

    /// Whether any refcount block lies where something else is too: the blocks that are written to
    /// in one window may lie in another.
    fn look_ahead(&mut self, later: &[u64]) -> Result<(), ReadError> {
        for window in later {
            self.count_window(*window)?;
            if !self.shared_blocks().is_empty() {
                self.wants_rebuild = true;
                break;
            }
        }
        self.count_window(0)
    }

    /// Something contradicts the format.
    fn corruption(&mut self, line: &str) {
        self.report.corruptions += 1;
        (self.listener.finding)(&format!("ERROR {line}"));
    }

    /// The same, where nobody knows what was meant.
    fn senseless(&mut self, line: &str) {
        if self.first {
            self.senseless += 1;
            self.corruption(line);
        }
    }

    fn bits(&self) -> u32 {
        self.details.header.cluster_bits
    }

    fn step(&mut self) {
        self.work.0 += 1;
        (self.listener.progress)(self.work.0.min(self.work.1), self.work.1);
    }
}

/// Has `each` look at `count` words of 64 bits from `offset` on, with their numbers; a part at a
/// time. Where the file ends they are zeroes.
fn words(
    file: &File,
    offset: u64,
    count: u64,
    mut each: impl FnMut(u64, u64) -> Result<(), ReadError>,
) -> Result<(), ReadError> {
    const PART: u64 = 8192;
    let mut number = 0;
    while number < count {
        let part = PART.min(count - number);
        let bytes = super::details::read_up_to(file, offset + number * 8, part as usize * 8)?;
        let (words, _) = bytes.as_chunks();
        if words.is_empty() {
            return Ok(());
        }
        for word in words {
            each(number, u64::from_be_bytes(*word))?;
            number += 1;
        }
        if (words.len() as u64) < part {
            return Ok(());
        }
    }
    Ok(())
}

fn too_much(what: &str) -> ReadError {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned()).into()
}

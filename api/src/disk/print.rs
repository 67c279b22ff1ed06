//! Answers for people, in the words of qemu-img.

use std::io::{self, Write};

use devices::disk::qcow2::info::{ImageInfo, Qcow2Info};

use serde::Serialize;
use serde_json::ser::PrettyFormatter;

use super::number::short_size;

/// Shows how far a long operation is, on standard error.
pub struct Progress {
    wanted: bool,
    shown: Option<u64>,
}

impl Progress {
    /// Shows it if it is wanted.
    pub fn new(wanted: bool) -> Self {
        Self {
            wanted,
            shown: None,
        }
    }

    /// `done` of `total` is done.
    pub fn show(&mut self, done: u64, total: u64) {
        // Hundredths of a percent.
        let part = (u128::from(done) * 10_000 / u128::from(total.max(1))) as u64;
        if !self.wanted
            || self
                .shown
                .is_some_and(|shown| part < shown + 100 && part < 10_000)
        {
            return;
        }
        if self.shown != Some(part) {
            eprint!("    ({}.{:02}/100%)\r", part / 100, part % 100);
            self.shown = Some(part);
        }
    }

    /// Goes to the next line.
    pub fn end(&self) {
        if self.shown.is_some() {
            eprintln!();
        }
    }
}

/// An answer for programs.
pub fn json(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    let indent = PrettyFormatter::with_indent(b"    ");
    value.serialize(&mut serde_json::Serializer::with_formatter(
        &mut *out, indent,
    ))?;
    writeln!(out)
}

/// What an image is.
pub fn info(out: &mut dyn Write, info: &ImageInfo) -> io::Result<()> {
    writeln!(out, "image: {}", info.filename)?;
    writeln!(out, "file format: {}", info.format)?;
    let size = info.virtual_size;
    writeln!(out, "virtual size: {} ({size} bytes)", short_size(size))?;
    writeln!(out, "disk size: {}", short_size(info.actual_size))?;
    if let Some(cluster_size) = info.cluster_size {
        writeln!(out, "cluster_size: {cluster_size}")?;
    }
    if info.dirty_flag {
        writeln!(out, "cleanly shut down: no")?;
    }
    if let Some(name) = &info.backing_filename {
        write!(out, "backing file: {name}")?;
        match &info.full_backing_filename {
            Some(full) if full != name => writeln!(out, " (actual path: {full})")?,
            _ => writeln!(out)?,
        }
    }
    if let Some(format) = &info.backing_filename_format {
        writeln!(out, "backing file format: {format}")?;
    }
    if !info.snapshots.is_empty() {
        snapshots(out, info)?;
    }
    match &info.format_specific {
        Some(specific) => {
            writeln!(out, "Format specific information:")?;
            qcow2(out, &specific.data)
        }
        None => Ok(()),
    }
}

/// The features of a qcow2 image.
pub fn qcow2(out: &mut dyn Write, data: &Qcow2Info) -> io::Result<()> {
    writeln!(out, "    compat: {}", data.compat)?;
    writeln!(out, "    compression type: {}", data.compression_type)?;
    if let Some(lazy) = data.lazy_refcounts {
        writeln!(out, "    lazy refcounts: {lazy}")?;
    }
    if !data.bitmaps.is_empty() {
        writeln!(out, "    bitmaps:")?;
        for (index, bitmap) in data.bitmaps.iter().enumerate() {
            writeln!(out, "        [{index}]:")?;
            writeln!(out, "            flags:")?;
            for (index, flag) in bitmap.flags.iter().enumerate() {
                writeln!(out, "                [{index}]: {flag}")?;
            }
            writeln!(out, "            name: {}", bitmap.name)?;
            writeln!(out, "            granularity: {}", bitmap.granularity)?;
        }
    }
    writeln!(out, "    refcount bits: {}", data.refcount_bits)?;
    if let Some(name) = &data.data_file {
        writeln!(out, "    data file: {name}")?;
    }
    if let Some(raw) = data.data_file_raw {
        writeln!(out, "    data file raw: {raw}")?;
    }
    if let Some(corrupt) = data.corrupt {
        writeln!(out, "    corrupt: {corrupt}")?;
    }
    if let Some(extended) = data.extended_l2 {
        writeln!(out, "    extended l2: {extended}")?;
    }
    Ok(())
}

fn snapshots(out: &mut dyn Write, info: &ImageInfo) -> io::Result<()> {
    writeln!(out, "Snapshot list:")?;
    writeln!(
        out,
        "{:<9} {:<16} {:>8} {:>19} {:>12} {:>10}",
        "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"
    )?;
    for snapshot in &info.snapshots {
        let seconds = snapshot.vm_clock_sec;
        let clock = format!(
            "{:02}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            snapshot.vm_clock_nsec / 1_000_000
        );
        let icount = snapshot.icount.map(|count| count.to_string());
        writeln!(
            out,
            "{:<9} {:<16} {:>8} {:>19} {:>12} {:>10}",
            snapshot.id,
            snapshot.name,
            short_size(snapshot.vm_state_size),
            date(snapshot.date_sec),
            clock,
            icount.unwrap_or_default()
        )?;
    }
    Ok(())
}

/// Seconds since 1970 as a date and time, in UTC.
fn date(seconds: u32) -> String {
    let (mut day, second) = (seconds / 86_400, seconds % 86_400);
    let leap = |year: u32| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    while day >= 365 + u32::from(leap(year)) {
        day -= 365 + u32::from(leap(year));
        year += 1;
    }
    let february = 28 + u32::from(leap(year));
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    format!(
        "{year}-{month:02}-{:02} {:02}:{:02}:{:02}",
        day + 1,
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::date;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_795_462_334, "2026-11-23 19:32:14"),
            (4_102_444_800, "2100-01-01 00:00:00"),
            (1_735_689_599, "2024-12-31 23:59:59"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }
}

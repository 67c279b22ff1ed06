//! `info`, `map` and `resize`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use devices::disk::qcow2::extents::{Extent, Extents};
use devices::disk::qcow2::info::info as look;
use devices::disk::resize::resize as change_size;
use serde::Serialize;

use super::DiskError;
use super::arguments::{Info, Map, Output, Resize};
use super::print::{self, Progress, json};

/// Tells what an image is.
pub fn info(options: &Info, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    let mut open = options.image.options(true);
    open.backing_files |= options.backing_chain;
    let found = look(options.image.format, &open, !options.force_share)?;
    match (options.output, open.backing_files, found.as_slice()) {
        (Output::Json, false, [only]) => json(out, only)?,
        (Output::Json, ..) => json(out, &found)?,
        (Output::Human, _, found) => {
            for (index, info) in found.iter().enumerate() {
                if index > 0 {
                    writeln!(out)?;
                }
                print::info(out, info)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Tells which parts of the disk are where.
pub fn map(options: &Map, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    let mut extents = Extents::open(
        options.image.format,
        &options.image.options(true),
        !options.force_share,
    )?;
    let size = extents.size_bytes();
    let start = options.start_offset.unwrap_or(0).min(size);
    let length = options.max_length.unwrap_or(u64::MAX);
    let end = start.saturating_add(length).min(size);
    let mut progress = Progress::new(options.progress);
    let human = options.output == Output::Human;
    match human {
        true => writeln!(
            out,
            "{:<16}{:<16}{:<16}File",
            "Offset", "Length", "Mapped to"
        )?,
        false => write!(out, "[")?,
    }
    let mut position = start;
    while position < end {
        let extent = extents.next(position, end).map_err(|error| {
            DiskError::Usage(format!("{}: {error}", options.image.path.display()))
        })?;
        if human {
            line(out, &extent, extents.path(extent.depth))?;
        } else {
            let separator = if position == start { "" } else { ",\n" };
            write!(out, "{separator}{}", object(&extent))?;
        }
        position += extent.length;
        progress.show(position - start, end - start);
    }
    progress.end();
    if !human {
        writeln!(out, "]")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn line(out: &mut dyn Write, extent: &Extent, path: &Path) -> std::io::Result<()> {
    if !extent.data || extent.zero {
        return Ok(());
    }
    // As C prints it: zero has no 0x before it.
    let hex = |value: u64| match value {
        0 => "0".to_owned(),
        value => format!("{value:#x}"),
    };
    writeln!(
        out,
        "{:<16}{:<16}{:<16}{}",
        hex(extent.start),
        hex(extent.length),
        extent.offset.map_or("compressed".to_owned(), hex),
        path.display()
    )
}

fn object(extent: &Extent) -> String {
    let offset = extent
        .offset
        .map(|offset| format!(", \"offset\": {offset}"));
    format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
         \"data\": {}, \"compressed\": {}{}}}",
        extent.start,
        extent.length,
        extent.depth,
        extent.present,
        extent.zero,
        extent.data,
        extent.compressed,
        offset.unwrap_or_default()
    )
}

/// What `resize` tells programs.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Resized {
    filename: String,
    format: &'static str,
    previous_size: u64,
    virtual_size: u64,
}

/// Gives a disk another size.
pub fn resize(options: &Resize, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    let image = &options.image;
    let open = image.options(false);
    let (previous_size, virtual_size) =
        change_size(image.format, &open, options.size, options.shrink)?;
    match options.output {
        Output::Json => json(
            out,
            &Resized {
                filename: image.path.display().to_string(),
                format: image.format.name(),
                previous_size,
                virtual_size,
            },
        )?,
        Output::Human if options.quiet => {}
        Output::Human => writeln!(out, "Image resized.")?,
    }
    Ok(ExitCode::SUCCESS)
}

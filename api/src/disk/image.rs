//! `create`, `info`, `map`, `convert`, `resize` and `commit`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use devices::config::BuildError;
use devices::disk::commit::commit as write_down;
use devices::disk::copy;
use devices::disk::qcow2::create::{
    CreateOptions, NewBacking, Preallocation, Watch, create_watched as make,
};
use devices::disk::qcow2::extents::{Extent, Extents};
use devices::disk::qcow2::info::info as look;
use devices::disk::resize::resize as change_size;
use serde::Serialize;

use super::DiskError;
use super::arguments::{Commit, Convert, Create, Info, Map, Output, Resize, format};
use super::number::parse_size;
use super::print::{self, Progress, json};
use super::sandbox::interrupted;

/// Makes an image.
pub fn create(options: &Create, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    let mut new = CreateOptions::new(&options.path, options.format);
    new.size_bytes = options.size;
    let mut backing = Backing {
        name: options.backing.clone(),
        format: options.backing_format,
    };
    for (name, value) in pairs(&options.options)? {
        set(&mut new, &mut backing, name, value)?;
    }
    new.backing = backing.complete()?;
    let size = with_progress(options.progress, &options.path, |watch| make(&new, watch))?;
    if !options.quiet {
        let (path, format) = (options.path.display(), options.format.name());
        writeln!(out, "Formatting '{path}', fmt={format} size={size}")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Does what can be long: shows how far it is if that is `wanted`, and ends it, with nothing left
/// of the file, when the user presses Ctrl-C.
fn with_progress<T>(
    wanted: bool,
    path: &Path,
    what: impl FnOnce(&mut Watch<'_>) -> Result<T, BuildError>,
) -> Result<T, BuildError> {
    let mut progress = Progress::new(wanted);
    let result = what(&mut |done, total| {
        progress.show(done, total);
        match interrupted() {
            false => Ok(()),
            true => Err(BuildError::host(
                format!("making {}", path.display()),
                std::io::Error::other("given up, as was asked for"),
            )),
        }
    });
    progress.end();
    result
}

/// What is said of the backing file, in whatever order.
struct Backing {
    name: Option<PathBuf>,
    format: Option<devices::disk::Format>,
}

impl Backing {
    fn complete(self) -> Result<Option<NewBacking>, DiskError> {
        match (self.name, self.format) {
            (Some(name), Some(format)) => Ok(Some(NewBacking { name, format })),
            (None, None) => Ok(None),
            (Some(_), None) => Err(usage(
                "the format of the backing file must be given with -F",
            )),
            (None, Some(_)) => Err(usage("-F is of no use without a backing file (-b)")),
        }
    }
}

/// `name=value` between commas.
fn pairs(options: &[String]) -> Result<Vec<(&str, &str)>, DiskError> {
    options
        .iter()
        .flat_map(|option| option.split(','))
        .map(|pair| {
            let split = pair.split_once('=');
            split.ok_or_else(|| usage(format!("-o `{pair}` has no value")))
        })
        .collect()
}

fn set(
    new: &mut CreateOptions,
    backing: &mut Backing,
    name: &str,
    value: &str,
) -> Result<(), DiskError> {
    let wrong = |expected: &str| usage(format!("-o {name}: `{value}` is not {expected}"));
    let size = || parse_size(value).map_err(|error| usage(format!("-o {name}: `{value}` {error}")));
    let switch = || match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(wrong("on or off")),
    };
    match name {
        "size" => new.size_bytes = Some(size()?),
        "cluster_size" => new.cluster_size = Some(size()?),
        "extended_l2" => new.extended_l2 = Some(switch()?),
        "lazy_refcounts" => new.lazy_refcounts = switch()?,
        "refcount_bits" => {
            new.refcount_bits = Some(value.parse().map_err(|_| wrong("a number"))?);
        }
        "compat" => {
            new.version_2 = match value {
                "0.10" | "v2" => true,
                "1.1" | "v3" => false,
                _ => return Err(wrong("0.10 or 1.1")),
            };
        }
        "preallocation" => {
            new.preallocation = match value {
                "off" => Preallocation::Off,
                "metadata" => Preallocation::Metadata,
                "falloc" => Preallocation::Falloc,
                "full" => Preallocation::Full,
                _ => return Err(wrong("off, metadata, falloc or full")),
            };
        }
        "backing_file" => backing.name = Some(value.into()),
        "backing_fmt" => backing.format = Some(format(value).map_err(usage)?),
        _ => return Err(usage(format!("-o {name}: there is no such option"))),
    }
    Ok(())
}

/// Tells what an image is.
pub fn info(options: &Info, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    let mut open = options.image.options(true);
    open.backing_files |= options.backing_chain;
    let found = look(options.image.format, &open, true)?;
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
    let mut extents = Extents::open(options.image.format, &options.image.options(true), true)?;
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

/// Copies a disk.
pub fn convert(options: &Convert, _: &mut dyn Write) -> Result<ExitCode, DiskError> {
    let mut new = CreateOptions::new(&options.target, options.target_format);
    let mut backing = Backing {
        name: None,
        format: None,
    };
    for (name, value) in pairs(&options.options)? {
        if name == "size" {
            return Err(usage("-o size: a copy is as large as the original"));
        }
        set(&mut new, &mut backing, name, value)?;
    }
    new.backing = backing.complete()?;
    let mut progress = Progress::new(options.progress);
    let source = options.image.options(true);
    let result = copy::convert(options.image.format, &source, &new, &mut |done, total| {
        progress.show(done, total);
    });
    progress.end();
    result?;
    Ok(ExitCode::SUCCESS)
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

/// Writes an overlay into its backing file.
pub fn commit(options: &Commit, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    let mut progress = Progress::new(options.progress);
    let open = options.image.options(true);
    let result = write_down(
        options.image.format,
        &open,
        !options.drop,
        &mut |done, total| {
            progress.show(done, total);
        },
    );
    progress.end();
    result?;
    if !options.quiet {
        writeln!(out, "Image committed.")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn usage(reason: impl Into<String>) -> DiskError {
    DiskError::Usage(reason.into())
}

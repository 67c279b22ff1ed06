//! `create` and `measure`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use devices::config::BuildError;
use devices::disk::Format;
use devices::disk::measure::{measure as count, measure_empty};
use devices::disk::qcow2::create::{CreateOptions, Preallocation, Watch, create_watched as make};
use serde::Serialize;

use super::DiskError;
use super::arguments::{Create, Measure, Output, open_options};
use super::options::{Backing, help, pairs, set, wants_help};
use super::print::{Progress, json};
use super::sandbox::interrupted;

/// Makes an image.
pub fn create(options: &Create, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    if wants_help(&options.options) {
        help(options.format, out)?;
        return Ok(ExitCode::SUCCESS);
    }
    let Some(path) = &options.path else {
        return Err(DiskError::Usage("the name of the image is missing".into()));
    };
    let mut new = CreateOptions::new(path, options.format);
    new.size_bytes = options.size;
    new.unchecked_backing = options.unsafe_backing;
    let mut backing = Backing {
        name: options.backing.clone(),
        format: options.backing_format,
    };
    for (name, value) in pairs(&options.options)? {
        set(&mut new, &mut backing, name, value)?;
    }
    new.backing = backing.complete()?;
    let size = with_progress(options.progress, path, |watch| make(&new, watch))?;
    if !options.quiet {
        formatting(&new, size, out)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Does what can be long: shows how far it is if that is `wanted`, and ends it, with nothing left
/// of the file, when the user presses Ctrl-C.
pub fn with_progress<T>(
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

/// Says what was made, with all that it has, in QEMU's words.
fn formatting(new: &CreateOptions, size: u64, out: &mut dyn Write) -> Result<(), DiskError> {
    let (path, format) = (new.path.display(), new.format.name());
    write!(out, "Formatting '{path}', fmt={format}")?;
    let shape = match new.format {
        Format::Raw => None,
        Format::Qcow2 => Some(new.shape_of(size)?),
    };
    let switch = |on| if on { "on" } else { "off" };
    let preallocation = match new.preallocation {
        Preallocation::Off => "",
        Preallocation::Metadata => " preallocation=metadata",
        Preallocation::Falloc => " preallocation=falloc",
        Preallocation::Full => " preallocation=full",
    };
    if let Some(shape) = &shape {
        let (cluster, extended) = (1_u64 << shape.cluster_bits, switch(shape.extended_l2));
        write!(out, " cluster_size={cluster} extended_l2={extended}")?;
        let compression = if shape.zstd { "zstd" } else { "zlib" };
        write!(out, "{preallocation} compression_type={compression}")?;
    }
    write!(out, " size={size}")?;
    if let Some(backing) = &new.backing {
        let (name, format) = (backing.name.display(), backing.format.name());
        write!(out, " backing_file={name} backing_fmt={format}")?;
    }
    if let Some(name) = &new.data_file {
        write!(out, " data_file={}", name.display())?;
        if new.data_file_raw {
            write!(out, " data_file_raw=on")?;
        }
    }
    match &shape {
        None => writeln!(out, "{preallocation}")?,
        Some(shape) => {
            let compat = if shape.version == 2 {
                " compat=0.10"
            } else {
                ""
            };
            let (lazy, bits) = (switch(shape.lazy_refcounts), 1_u32 << shape.refcount_order);
            writeln!(out, "{compat} lazy_refcounts={lazy} refcount_bits={bits}")?;
        }
    }
    Ok(())
}

/// What `measure` tells programs.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Size {
    required: u64,
    fully_allocated: u64,
}

/// Tells how large an image would become.
pub fn measure(options: &Measure, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    // Nothing is made: the name is of no importance.
    let mut new = CreateOptions::new(Path::new("new"), options.target_format);
    new.size_bytes = options.size;
    let mut backing = Backing::default();
    for (name, value) in pairs(&options.options)? {
        set(&mut new, &mut backing, name, value)?;
    }
    if backing.name.is_some() || backing.format.is_some() {
        let reason = "what a backing file has is not measured: leave it out";
        return Err(DiskError::Usage(reason.into()));
    }
    let measured = match (&options.path, options.format) {
        (Some(path), Some(format)) => {
            let source = open_options(path, true, options.backing_files);
            count(format, &source, &new, !options.force_share)?
        }
        _ => measure_empty(&new)?,
    };
    match options.output {
        Output::Json => json(
            out,
            &Size {
                required: measured.required,
                fully_allocated: measured.fully_allocated,
            },
        )?,
        Output::Human => {
            writeln!(out, "required size: {}", measured.required)?;
            writeln!(out, "fully allocated size: {}", measured.fully_allocated)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

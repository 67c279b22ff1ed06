//! `convert`, `commit` and `compare`.

use std::io::Write;
use std::process::ExitCode;

use devices::disk::commit::{commit as write_down, commit_down_to};
use devices::disk::compare::{Comparison, compare as look};
use devices::disk::copy::into::{copy_into, copy_onto};
use devices::disk::copy::{self, CopyOptions};
use devices::disk::qcow2::create::{CreateOptions, Preallocation};

use super::DiskError;
use super::arguments::{Cache, Commit, Compare, Convert, open_options};
use super::make::with_progress;
use super::options::{Backing, help, pairs, set, wants_help};
use super::print::Progress;

const MIN_HOLE: u64 = 512;
const MAX_HOLE: u64 = 1 << 20;

/// Copies a disk.
pub fn convert(options: &Convert, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    if wants_help(&options.options) {
        help(options.target_format, out)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut new = CreateOptions::new(&options.target, options.target_format);
    let mut backing = Backing {
        name: options.backing.clone(),
        format: options.backing_format,
    };
    let mut given = pairs(&options.options)?.into_iter();
    given.try_for_each(|(name, value)| match name {
        "size" => Err(usage("-o size: a copy is as large as the original")),
        _ => set(&mut new, &mut backing, name, value),
    })?;
    new.backing = backing.complete()?;
    let how = how(options, &mut new)?;
    let mut source = options.image.options(true);
    source.direct = direct(options.source_cache);
    let from = (options.image.format, &source);
    if options.existing {
        if !options.options.is_empty() || new.backing.is_some() {
            return Err(usage(
                "-n: the image is there, and what it is like is settled",
            ));
        }
        let mut target = open_options(&options.target, false, options.image.backing_files);
        target.direct = direct(options.target_cache);
        let to = (options.target_format, &target);
        with_progress(options.progress, &options.target, |watch| {
            copy_into(from, to, watch)
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    if direct(options.target_cache) {
        return Err(usage("-t none and -t directsync are only for -n"));
    }
    if new.backing.is_some() {
        with_progress(options.progress, &options.target, |watch| {
            copy_onto(from, &new, watch)
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut progress = Progress::new(options.progress);
    let result = copy::convert(from.0, from.1, &new, how, &mut |done, total| {
        progress.show(done, total);
    });
    progress.end();
    result?;
    Ok(ExitCode::SUCCESS)
}

/// `-m` and `-S`, of which the engines that write with -n and -B have no need.
fn how(options: &Convert, new: &mut CreateOptions) -> Result<CopyOptions, DiskError> {
    let engine = options.existing || new.backing.is_some();
    if engine && (options.ahead.is_some() || options.sparse.is_some()) {
        return Err(usage(
            "-m and -S are for a new image without a backing file",
        ));
    }
    let mut how = CopyOptions::default();
    how.ahead = options.ahead.unwrap_or(how.ahead);
    match options.sparse {
        None => {}
        Some(0) if new.preallocation == Preallocation::Off => {
            new.preallocation = Preallocation::Full;
        }
        Some(0) => return Err(usage("-S 0 and -o preallocation say two things")),
        Some(size) if (MIN_HOLE..=MAX_HOLE).contains(&size) && size.is_multiple_of(MIN_HOLE) => {
            how.hole_bytes = usize::try_from(size).unwrap_or(how.hole_bytes);
        }
        Some(size) => {
            return Err(usage(format!(
                "-S {size}: must be 0, or a multiple of {MIN_HOLE} up to {MAX_HOLE}"
            )));
        }
    }
    Ok(how)
}

fn direct(cache: Option<Cache>) -> bool {
    cache.is_some_and(|cache| cache.direct)
}

/// Writes an overlay into its backing file, or one further down.
pub fn commit(options: &Commit, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    let mut progress = Progress::new(options.progress);
    let open = options.image.options(true);
    let (format, direct) = (options.image.format, direct(options.cache));
    let show = &mut |done, total| progress.show(done, total);
    let result = match &options.base {
        Some(base) => commit_down_to(base, format, &open, direct, show),
        None => write_down(format, &open, !options.drop, direct, show),
    };
    progress.end();
    result?;
    if !options.quiet {
        writeln!(out, "Image committed.")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Tells whether two images show the same disk.
pub fn compare(options: &Compare, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    let mut first = options.image.options(true);
    first.direct = direct(options.cache);
    let mut second = open_options(&options.second, true, options.image.backing_files);
    second.direct = first.direct;
    let mut progress = Progress::new(options.progress);
    let result = look(
        (options.image.format, &first),
        (options.second_format, &second),
        options.strict,
        &mut |done, total| {
            progress.show(done, total);
            Ok(())
        },
    );
    progress.end();
    let found = result?;
    if !options.quiet {
        tell(&found, out)?;
    }
    Ok(match found {
        Comparison::Identical { .. } => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn tell(found: &Comparison, out: &mut dyn Write) -> std::io::Result<()> {
    let one_ended = match found {
        Comparison::Identical { same_size } => !same_size,
        Comparison::Content { beyond_end, .. } => *beyond_end,
        Comparison::Size | Comparison::Allocation { .. } => false,
    };
    if one_ended {
        writeln!(out, "Warning: Image size mismatch!")?;
    }
    match found {
        Comparison::Identical { .. } => writeln!(out, "Images are identical."),
        Comparison::Content { offset, .. } => {
            writeln!(out, "Content mismatch at offset {offset}!")
        }
        Comparison::Size => writeln!(out, "Strict mode: Image size mismatch!"),
        Comparison::Allocation { offset } => {
            writeln!(out, "Strict mode: Offset {offset} block status mismatch!")
        }
    }
}

fn usage(reason: impl Into<String>) -> DiskError {
    DiskError::Usage(reason.into())
}

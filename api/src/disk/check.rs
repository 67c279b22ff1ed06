//! `check` and `repair`.

use std::io::Write;
use std::process::ExitCode;

use devices::disk::Format;
use devices::disk::qcow2::check::{Listener, Repair, Report, check as look};
use serde_json::{Map, Value};

use super::DiskError;
use super::arguments::{Check, Output, RepairOptions, What};
use super::print::{Progress, json};

/// Looks for errors.
pub fn check(options: &Check, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    if options.image.format == Format::Raw {
        let reason = "a raw image has nothing that could be checked";
        return Err(DiskError::Usage(reason.into()));
    }
    let repair = match options.repair {
        None => Repair::Nothing,
        Some(What::Leaks) => Repair::Leaks,
        Some(What::All) => Repair::All,
    };
    let tell = !options.quiet && options.output == Output::Human;
    let mut progress = Progress::new(options.progress);
    let result = look(
        &options.image.options(repair == Repair::Nothing),
        repair,
        &mut Listener {
            finding: &mut |line| {
                if tell {
                    eprintln!("{line}");
                }
            },
            progress: &mut |done, total| progress.show(done, total),
        },
    );
    progress.end();
    let report = result?;
    if !options.quiet {
        match options.output {
            Output::Human => human(out, &report)?,
            Output::Json => json(out, &fields(&report, options))?,
        }
    }
    Ok(ExitCode::from(match (report.corruptions, report.leaks) {
        (0, 0) => 0,
        (0, _) => 3,
        _ => 2,
    }))
}

/// Looks for errors and mends them.
pub fn repair(options: &RepairOptions, out: &mut dyn Write) -> Result<ExitCode, DiskError> {
    let options = Check {
        image: options.image.clone(),
        repair: Some(options.what),
        quiet: options.quiet,
        progress: options.progress,
        output: options.output,
    };
    check(&options, out)
}

fn human(out: &mut dyn Write, report: &Report) -> std::io::Result<()> {
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        write!(
            out,
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
             {} corruptions\n\nDouble checking the fixed image now...\n",
            report.leaks_fixed, report.corruptions_fixed
        )?;
    }
    if report.corruptions + report.leaks == 0 {
        writeln!(out, "No errors were found on the image.")?;
    }
    if report.corruptions > 0 {
        writeln!(
            out,
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the \
             image may corrupt it.",
            report.corruptions
        )?;
    }
    if report.leaks > 0 {
        writeln!(
            out,
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no \
             harm to data.",
            report.leaks
        )?;
    }
    let (allocated, total) = (report.allocated_clusters, report.total_clusters);
    if allocated > 0 && total > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        writeln!(
            out,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated)
        )?;
    }
    writeln!(out, "Image end offset: {}", report.image_end_offset)
}

/// By the names that qemu-img has; what is optional there is left out where it is 0.
fn fields(report: &Report, options: &Check) -> Map<String, Value> {
    let mut fields = Map::new();
    let mut put = |name: &str, value: Value| fields.insert(name.into(), value);
    put("image-end-offset", report.image_end_offset.into());
    put("total-clusters", report.total_clusters.into());
    put("check-errors", 0.into());
    for (name, value) in [
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
    ] {
        if value > 0 {
            put(name, value.into());
        }
    }
    let path = &options.image.path;
    put("filename", path.display().to_string().into());
    put("format", options.image.format.name().into());
    fields
}

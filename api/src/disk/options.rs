//! What `-o NAME=VALUE,…` says of an image that is to be made.

use std::io::Write;
use std::path::PathBuf;

use devices::disk::Format;
use devices::disk::qcow2::create::{CreateOptions, NewBacking, Preallocation};

use super::DiskError;
use super::arguments::format;
use super::number::parse_size;

/// The options that there are.
const KNOWN: [(&str, &str); 12] = [
    ("backing_file", "name of the image below it"),
    ("backing_fmt", "format of the image below it: raw or qcow2"),
    ("cluster_size", "512 to 2M; 64k, or 128k with subclusters"),
    (
        "compression_type",
        "of clusters that are compressed later: zlib or zstd",
    ),
    ("compat", "version of the format: 1.1 (v3) or 0.10 (v2)"),
    ("data_file", "name of a new file that the data is to be in"),
    (
        "data_file_raw",
        "that file alone is to be the disk, on or off",
    ),
    (
        "extended_l2",
        "subclusters, on or off; on where there is a backing file",
    ),
    ("lazy_refcounts", "refcounts may lag behind, on or off"),
    ("preallocation", "off, metadata, falloc or full"),
    ("refcount_bits", "1 to 64; 16"),
    ("size", "of the disk"),
];

/// Whether it is only asked for what there is (`-o help`).
pub fn wants_help(options: &[String]) -> bool {
    let mut all = options.iter().flat_map(|option| option.split(','));
    all.any(|option| matches!(option, "help" | "?"))
}

/// Tells it.
pub fn help(format: Format, out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(out, "Supported options:")?;
    for (name, text) in KNOWN {
        if format == Format::Qcow2 || matches!(name, "size" | "preallocation") {
            writeln!(out, "  {name:<15} {text}")?;
        }
    }
    Ok(())
}

/// What is said of the backing file, in whatever order.
#[derive(Default)]
pub struct Backing {
    /// Its name.
    pub name: Option<PathBuf>,
    /// Its format.
    pub format: Option<Format>,
}

impl Backing {
    /// Both or neither.
    pub fn complete(self) -> Result<Option<NewBacking>, DiskError> {
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
pub fn pairs(options: &[String]) -> Result<Vec<(&str, &str)>, DiskError> {
    options
        .iter()
        .flat_map(|option| option.split(','))
        .map(|pair| {
            let split = pair.split_once('=');
            split.ok_or_else(|| usage(format!("-o `{pair}` has no value")))
        })
        .collect()
}

/// Notes one of them.
pub fn set(
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
        "compression_type" => {
            new.zstd = match value {
                "zlib" => false,
                "zstd" => true,
                _ => return Err(wrong("zlib or zstd")),
            };
        }
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
        "data_file" => new.data_file = Some(value.into()),
        "data_file_raw" => new.data_file_raw = switch()?,
        "backing_file" => backing.name = Some(value.into()),
        "backing_fmt" => backing.format = Some(format(value).map_err(usage)?),
        _ => return Err(usage(format!("-o {name}: there is no such option"))),
    }
    Ok(())
}

fn usage(reason: impl Into<String>) -> DiskError {
    DiskError::Usage(reason.into())
}

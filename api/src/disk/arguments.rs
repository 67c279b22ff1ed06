//! The options, named as those of qemu-img and qemu-io.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use devices::disk::resize::NewSize;
use devices::disk::{Format, OpenOptions};

pub use super::io::arguments::Io;
use super::number::parse_size;

/// Disk images that no VM uses.
#[derive(Clone, Debug, Subcommand)]
pub enum DiskCommand {
    /// Make a new image
    Create(Create),
    /// Tell what an image is
    Info(Info),
    /// Tell whether two images show the same disk: exits with 0 if so, 1 if not, 2 if it can't tell
    Compare(Compare),
    /// Tell how large a new image would become
    Measure(Measure),
    /// Look for errors: exits with 0 if there are none, 2 for corruption, 3 for leaks only
    Check(Check),
    /// Look for errors and mend them
    Repair(RepairOptions),
    /// Copy a disk into a new image
    Convert(Convert),
    /// Give a disk another size
    Resize(Resize),
    /// Write what an overlay holds into its backing file
    Commit(Commit),
    /// Tell which parts of the disk are where
    Map(Map),
    /// Read and write by commands, as qemu-io does
    Io(Box<Io>),
}

/// How answers look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

/// Which image.
#[derive(Args, Clone, Debug)]
pub struct Image {
    /// The image's format, raw or qcow2: never guessed
    #[arg(short, value_name = "FORMAT", value_parser = format)]
    pub format: Format,
    /// Follow the name of a backing file that the image has
    #[arg(long)]
    pub backing_files: bool,
    /// The image
    #[arg(value_name = "IMAGE")]
    pub path: PathBuf,
}

impl Image {
    /// To open it with.
    pub fn options(&self, readonly: bool) -> OpenOptions {
        open_options(&self.path, readonly, self.backing_files)
    }
}

/// To open an image with.
pub fn open_options(path: &Path, readonly: bool, backing_files: bool) -> OpenOptions {
    OpenOptions {
        readonly,
        backing_files,
        ..OpenOptions::new(path)
    }
}

/// `ballast disk create`.
#[derive(Args, Clone, Debug)]
pub struct Create {
    /// The backing file is not looked at, and need not be there; the size must be given
    #[arg(short = 'u')]
    pub unsafe_backing: bool,
    /// Say nothing
    #[arg(short)]
    pub quiet: bool,
    /// Show how far it is
    #[arg(short)]
    pub progress: bool,
    /// The format to be made, raw or qcow2
    #[arg(short, value_name = "FORMAT", value_parser = format)]
    pub format: Format,
    /// The image below it
    #[arg(short, value_name = "IMAGE")]
    pub backing: Option<PathBuf>,
    /// The format of the image below it, which is recorded
    #[arg(short = 'F', value_name = "FORMAT", value_parser = format)]
    pub backing_format: Option<Format>,
    /// cluster_size, extended_l2, refcount_bits, lazy_refcounts, compat, compression_type,
    /// preallocation, size, backing_file, backing_fmt, data_file, data_file_raw; several with commas
    /// between; `help` tells of them
    #[arg(short, value_name = "NAME=VALUE")]
    pub options: Vec<String>,
    /// Where
    #[arg(value_name = "IMAGE")]
    pub path: Option<PathBuf>,
    /// Size of the disk, with k, M, G or T; that of the backing file if there is one
    #[arg(value_parser = size)]
    pub size: Option<u64>,
}

/// `ballast disk info`.
#[derive(Args, Clone, Debug)]
pub struct Info {
    /// Which.
    #[command(flatten)]
    pub image: Image,
    /// As `--backing-files`, under the name that qemu-img has for it
    #[arg(long)]
    pub backing_chain: bool,
    /// Look at an image that somebody else uses
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// For people or programs
    #[arg(long, value_enum, default_value = "human")]
    pub output: Output,
}

/// `ballast disk check`.
#[derive(Args, Clone, Debug)]
pub struct Check {
    /// Which.
    #[command(flatten)]
    pub image: Image,
    /// Mend what is found: leaks, or all that can be mended without guessing
    #[arg(short, value_enum, value_name = "WHAT")]
    pub repair: Option<What>,
    /// Say nothing
    #[arg(short)]
    pub quiet: bool,
    /// Show how far it is
    #[arg(short)]
    pub progress: bool,
    /// For people or programs
    #[arg(long, value_enum, default_value = "human")]
    pub output: Output,
}

/// `ballast disk repair`: `check -r all`.
#[derive(Args, Clone, Debug)]
pub struct RepairOptions {
    /// Which.
    #[command(flatten)]
    pub image: Image,
    /// What to mend
    #[arg(value_enum, long, default_value = "all")]
    pub what: What,
    /// Say nothing
    #[arg(short)]
    pub quiet: bool,
    /// Show how far it is
    #[arg(short)]
    pub progress: bool,
    /// For people or programs
    #[arg(long, value_enum, default_value = "human")]
    pub output: Output,
}

/// What to mend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// Space that is lost.
    Leaks,
    /// Whatever can be mended without guessing.
    All,
}

/// `ballast disk convert`.
#[derive(Args, Clone, Debug)]
pub struct Convert {
    /// Which.
    #[command(flatten)]
    pub image: Image,
    /// The format to be made, raw or qcow2
    #[arg(short = 'O', value_name = "FORMAT", value_parser = format)]
    pub target_format: Format,
    /// As for `create`
    #[arg(short, value_name = "NAME=VALUE")]
    pub options: Vec<String>,
    /// The image that is to lie below the copy, which gets only what the original has above its own
    /// backing file: both must show the same
    #[arg(short = 'B', value_name = "IMAGE")]
    pub backing: Option<PathBuf>,
    /// The format of the image below the copy, which is recorded
    #[arg(short = 'F', value_name = "FORMAT", value_parser = format)]
    pub backing_format: Option<Format>,
    /// Write into an image that is there
    #[arg(short = 'n')]
    pub existing: bool,
    /// How the original is read: none and directsync bypass the host's page cache
    #[arg(short = 'T', value_name = "CACHE", value_parser = cache)]
    pub source_cache: Option<Cache>,
    /// How the copy is written: none and directsync bypass the host's page cache, with -n only. It
    /// is synced at the end in any case
    #[arg(short = 't', value_name = "CACHE", value_parser = cache)]
    pub target_cache: Option<Cache>,
    /// Pieces that are read ahead, 1 to 16
    #[arg(short = 'm', value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=16))]
    pub ahead: Option<u16>,
    /// The smallest stretch of zeroes that becomes a hole of a raw copy; with 0 the whole copy gets
    /// its space
    #[arg(short = 'S', value_name = "SIZE", value_parser = size)]
    pub sparse: Option<u64>,
    /// Show how far it is
    #[arg(short)]
    pub progress: bool,
    /// Say nothing
    #[arg(short)]
    pub quiet: bool,
    /// Where to; nothing may be there without -n
    #[arg(value_name = "TARGET")]
    pub target: PathBuf,
}

impl Convert {
    /// Whether it has a copy under a name before it is whole.
    pub fn asks_for_signals(&self) -> bool {
        let backing = |option: &String| option.contains("backing_file=");
        self.existing || self.backing.is_some() || self.options.iter().any(backing)
    }
}

/// `ballast disk compare`.
#[derive(Args, Clone, Debug)]
pub struct Compare {
    /// The one.
    #[command(flatten)]
    pub image: Image,
    /// The format of the other, raw or qcow2: never guessed
    #[arg(short = 'F', value_name = "FORMAT", value_parser = format)]
    pub second_format: Format,
    /// The sizes must be equal too, and what is allocated
    #[arg(short)]
    pub strict: bool,
    /// none and directsync bypass the host's page cache
    #[arg(short = 'T', value_name = "CACHE", value_parser = cache)]
    pub cache: Option<Cache>,
    /// Show how far it is
    #[arg(short)]
    pub progress: bool,
    /// Say nothing
    #[arg(short)]
    pub quiet: bool,
    /// The other
    #[arg(value_name = "OTHER")]
    pub second: PathBuf,
}

/// `ballast disk measure`.
#[derive(Args, Clone, Debug)]
pub struct Measure {
    /// The format that is to be made, raw or qcow2
    #[arg(short = 'O', value_name = "FORMAT", value_parser = format)]
    pub target_format: Format,
    /// As for `create`
    #[arg(short, value_name = "NAME=VALUE")]
    pub options: Vec<String>,
    /// Size of an empty disk
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "path")]
    pub size: Option<u64>,
    /// The original's format, raw or qcow2: never guessed
    #[arg(short, value_name = "FORMAT", value_parser = format, requires = "path")]
    pub format: Option<Format>,
    /// Follow the name of a backing file that the original has
    #[arg(long)]
    pub backing_files: bool,
    /// Look at an image that somebody else uses
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// For people or programs
    #[arg(long, value_enum, default_value = "human")]
    pub output: Output,
    /// The disk that would be copied
    #[arg(
        value_name = "IMAGE",
        required_unless_present = "size",
        requires = "format"
    )]
    pub path: Option<PathBuf>,
}

/// `ballast disk resize`.
#[derive(Args, Clone, Debug)]
pub struct Resize {
    /// Which.
    #[command(flatten)]
    pub image: Image,
    /// Size of the disk, with k, M, G or T; after + or - (behind `--`) by how much it changes
    #[arg(value_name = "[+|-]SIZE", value_parser = new_size)]
    pub size: NewSize,
    /// Make it smaller too: a raw image, if there is nothing but zeroes in what is lost
    #[arg(long)]
    pub shrink: bool,
    /// Say nothing
    #[arg(short)]
    pub quiet: bool,
    /// For people or programs
    #[arg(long, value_enum, default_value = "human")]
    pub output: Output,
}

/// `ballast disk commit`.
#[derive(Args, Clone, Debug)]
pub struct Commit {
    /// Which.
    #[command(flatten)]
    pub image: Image,
    /// Leave the overlay as it is, instead of emptying it
    #[arg(short)]
    pub drop: bool,
    /// Down to this image below it, and leave the overlay as it is; those between get its content
    /// too
    #[arg(short, value_name = "IMAGE")]
    pub base: Option<PathBuf>,
    /// none and directsync bypass the host's page cache
    #[arg(short = 't', value_name = "CACHE", value_parser = cache)]
    pub cache: Option<Cache>,
    /// Show how far it is
    #[arg(short)]
    pub progress: bool,
    /// Say nothing
    #[arg(short)]
    pub quiet: bool,
}

/// `ballast disk map`.
#[derive(Args, Clone, Debug)]
pub struct Map {
    /// Which.
    #[command(flatten)]
    pub image: Image,
    /// From where on
    #[arg(long, value_name = "OFFSET", value_parser = size)]
    pub start_offset: Option<u64>,
    /// How far
    #[arg(long, value_name = "LENGTH", value_parser = size)]
    pub max_length: Option<u64>,
    /// Look at an image that somebody else uses
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Show how far it is
    #[arg(short)]
    pub progress: bool,
    /// For people or programs
    #[arg(long, value_enum, default_value = "human")]
    pub output: Output,
}

/// `raw` or `qcow2`.
pub fn format(text: &str) -> Result<Format, String> {
    match text {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        other => Err(format!("`{other}` is neither raw nor qcow2")),
    }
}

/// How an image's file is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cache {
    /// Past the host's page cache.
    pub direct: bool,
}

/// The names that QEMU has for it. Whoever writes syncs at the end whatever this says.
fn cache(text: &str) -> Result<Cache, String> {
    match text {
        "none" | "directsync" => Ok(Cache { direct: true }),
        "writeback" | "writethrough" | "unsafe" => Ok(Cache { direct: false }),
        other => Err(format!(
            "`{other}` is none of none, directsync, writeback, writethrough and unsafe"
        )),
    }
}

fn new_size(text: &str) -> Result<NewSize, String> {
    match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(more), _) => size(more).map(NewSize::More),
        (None, Some(less)) => size(less).map(NewSize::Less),
        (None, None) => size(text).map(NewSize::To),
    }
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
}

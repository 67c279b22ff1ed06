//! The options, named as those of qemu-img and qemu-io.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use devices::disk::resize::NewSize;
use devices::disk::{Format, LockGranularity, OpenOptions};

pub use super::io::arguments::Io;
use super::number::parse_size;

/// Disk images that no VM uses.
#[derive(Clone, Debug, Subcommand)]
pub enum DiskCommand {
    /// Make a new image
    Create(Create),
    /// Tell what an image is
    Info(Info),
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
        OpenOptions {
            path: self.path.clone(),
            readonly,
            direct: false,
            disable_io_uring: false,
            lock: LockGranularity::ByteRange,
            backing_files: self.backing_files,
            cache_bytes: None,
        }
    }
}

/// `ballast disk create`.
#[derive(Args, Clone, Debug)]
pub struct Create {
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
    /// cluster_size, extended_l2, refcount_bits, lazy_refcounts, compat, preallocation, size,
    /// backing_file, backing_fmt; several with commas between
    #[arg(short, value_name = "NAME=VALUE")]
    pub options: Vec<String>,
    /// Where
    #[arg(value_name = "IMAGE")]
    pub path: PathBuf,
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
    /// Show how far it is
    #[arg(short)]
    pub progress: bool,
    /// Where to; nothing may be there
    #[arg(value_name = "TARGET")]
    pub target: PathBuf,
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

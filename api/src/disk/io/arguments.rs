//! The options of the command line, by the names that qemu-io has for them.

use std::path::PathBuf;

use clap::{ArgAction, Args};
use devices::disk::Format;

use super::super::arguments::format;
use super::choices::{Choices, Wrong};

/// `ballast disk io`.
#[derive(Args, Clone, Debug)]
#[command(args_override_self = true)]
pub struct Io {
    /// The image's format, raw or qcow2: never guessed
    #[arg(short, long, value_name = "FORMAT", value_parser = format)]
    pub format: Option<Format>,
    /// Follow the name of a backing file that the image has
    #[arg(long)]
    pub backing_files: bool,
    /// A command; several are done in order. Without, they are read from standard input
    #[arg(short, long = "cmd", value_name = "COMMAND")]
    pub commands: Vec<String>,
    /// Open for reading only
    #[arg(short, long = "read-only")]
    pub readonly: bool,
    /// Bypass the host's page cache: -t none
    #[arg(short, long)]
    pub nocache: bool,
    /// writeback; none, which bypasses the host's page cache; writethrough and directsync, in which
    /// each write is durable; or unsafe, which is taken for writeback: flushes are done
    #[arg(short = 't', long, value_name = "MODE")]
    pub cache: Option<String>,
    /// io_uring, which is used where there is one, or threads: without io_uring
    #[arg(short = 'i', long, value_name = "MODE")]
    pub aio: Option<String>,
    /// unmap, or ignore: nothing is given back to the host
    #[arg(short = 'd', long, value_name = "MODE")]
    pub discard: Option<String>,
    /// Have memory begin 16 bytes behind the beginning of a page
    #[arg(short, long)]
    pub misalign: bool,
    /// IMAGE is a list of options, as behind `open -o`: driver=qcow2,file.filename=…
    #[arg(long)]
    pub image_opts: bool,
    #[command(flatten)]
    absent: Absent,
    /// The image; without, `open` opens one
    #[arg(value_name = "IMAGE")]
    pub path: Option<PathBuf>,
}

/// What qemu-io has and this has not, to be refused by name.
#[derive(Args, Clone, Debug)]
struct Absent {
    #[arg(short = 's', long, hide = true)]
    snapshot: bool,
    #[arg(short = 'C', long, hide = true)]
    copy_on_read: bool,
    #[arg(short = 'k', long, hide = true)]
    native_aio: bool,
    #[arg(short = 'U', long, hide = true)]
    force_share: bool,
    #[arg(short = 'T', long, hide = true, value_name = "WHAT")]
    trace: Option<String>,
    #[arg(long, hide = true, value_name = "OBJECT", action = ArgAction::Append)]
    object: Vec<String>,
}

impl Io {
    /// How `open` opens where it is not told otherwise: this format, with those below.
    pub fn choices(&self) -> Choices {
        Choices {
            misalign: self.misalign,
            ..Choices::new(self.format, self.backing_files)
        }
    }

    /// How the image of the command line is to be opened, if there is one.
    pub fn image(&self) -> Result<Option<Choices>, Wrong> {
        let absent = &self.absent;
        for (given, option) in [
            (absent.snapshot, "--snapshot"),
            (absent.copy_on_read, "--copy-on-read"),
            (absent.native_aio, "--native-aio"),
            (absent.force_share, "--force-share"),
            (absent.trace.is_some(), "--trace"),
            (!absent.object.is_empty(), "--object"),
        ] {
            if given {
                return Err(Wrong(format!("{option} is not supported")));
            }
        }
        let mut choices = self.choices();
        choices.readonly = self.readonly;
        if let Some(mode) = &self.cache {
            choices.cache(mode)?;
        }
        choices.direct |= self.nocache;
        if let Some(mode) = &self.aio {
            choices.aio(mode)?;
        }
        if let Some(mode) = &self.discard {
            choices.discard(mode)?;
        }
        let Some(path) = &self.path else {
            return Ok(None);
        };
        if self.image_opts {
            if self.format.is_some() {
                let reason = "--image-opts and --format are mutually exclusive";
                return Err(Wrong(reason.into()));
            }
            choices.list(&path.to_string_lossy())?;
        } else {
            choices.path = Some(path.clone());
        }
        Ok(Some(choices))
    }
}

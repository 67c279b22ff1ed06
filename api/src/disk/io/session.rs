//! The image that is open, and what is done with it as a whole.

use std::cmp::Ordering;
use std::io::Write;
use std::path::Path;

use devices::config::BuildError;
use devices::disk::blocking::Blocking;
use devices::disk::qcow2::extents::Extents;
use devices::disk::qcow2::info::{ImageInfo, info};
use devices::disk::{Format, OpenOptions};

use super::super::number::long_size;
use super::super::print;
use super::Failure;
use super::arguments::Io;
use super::asynchronous::Pending;
use super::choices::{Choices, Wrong, mentions};
use super::options::Options;
use super::report;

/// How far misaligned memory is from the beginning of a page.
const SKEW: usize = 16;

/// See the module.
pub struct Session {
    /// What `open` begins with.
    default: Choices,
    pub open: Option<Open>,
    pub pending: Pending,
}

/// An image that is open.
pub struct Open {
    pub choices: Choices,
    pub format: Format,
    pub options: OpenOptions,
    pub disk: Blocking,
}

impl Open {
    fn new(choices: Choices) -> Result<Self, Wrong> {
        let (format, options) = choices.complete()?;
        let path = options.path.display();
        if let Err(error) = std::fs::metadata(&options.path) {
            let reason = report::error(&error);
            let message = format!("can't open device {path}: Could not open '{path}': {reason}");
            return Err(Wrong(message));
        }
        let mut disk = Blocking::open(format, &options).map_err(|error| {
            let reason = match error {
                // Which option is to blame has been said.
                BuildError::Invalid(wrong) if wrong.field == "path" => wrong.reason,
                other => other.to_string(),
            };
            Wrong(format!("can't open device {path}: {reason}"))
        })?;
        if choices.misalign {
            disk.set_skew(SKEW);
        }
        Ok(Self {
            choices,
            format,
            options,
            disk,
        })
    }
}

impl Session {
    /// Opens the image of the command line, if there is one.
    pub fn new(arguments: &Io) -> Result<Self, Wrong> {
        Ok(Self {
            default: arguments.choices(),
            open: arguments.image()?.map(Open::new).transpose()?,
            pending: Pending::default(),
        })
    }

    /// Whether there is one.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    pub fn image(&mut self) -> Result<&mut Open, Failure> {
        let message = "no file open, try 'help open'";
        self.open
            .as_mut()
            .ok_or_else(|| Failure::Error(message.into()))
    }

    /// Lets go of what is under way and of the image.
    pub fn finish(&mut self, out: &mut dyn Write) -> std::io::Result<()> {
        self.reap(out, true)?;
        if let Some(mut open) = self.open.take()
            && !open.options.readonly
            && let Err(error) = open.disk.flush()
        {
            eprintln!("qemu-io: {}", report::error(&error));
        }
        Ok(())
    }

    /// `close`.
    pub fn close(&mut self, out: &mut dyn Write) -> Result<(), Failure> {
        self.finish(out)?;
        Ok(())
    }

    /// `open`.
    pub fn open(&mut self, given: &Options<'_>) -> Result<(), Failure> {
        if self.is_open() {
            let message = "qemu-io: file open already, try 'help close'";
            return Err(Failure::Error(message.into()));
        }
        for (letter, what) in [
            ('U', "sharing with a writer"),
            ('s', "a snapshot"),
            ('C', "copying on read"),
        ] {
            if given.has(letter) {
                return Err(Failure::Error(format!("qemu-io: {what} is not supported")));
            }
        }
        let mut choices = self.default.clone();
        if let [path] = given.rest.as_slice() {
            choices.path = Some(path.into());
        }
        for (letter, argument) in given.all() {
            match letter {
                'r' => choices.readonly = true,
                'n' => choices.direct = true,
                't' => choices.cache(argument)?,
                'd' => choices.discard(argument)?,
                'o' => choices.list(argument)?,
                'k' => choices.aio("native")?,
                _ => {}
            }
        }
        if choices.path.is_none() || given.rest.len() > 1 {
            return Err(Failure::Usage);
        }
        self.open = Some(Open::new(choices)?);
        Ok(())
    }

    /// `reopen`.
    pub fn reopen(&mut self, given: &Options<'_>, out: &mut dyn Write) -> Result<(), Failure> {
        if !given.rest.is_empty() {
            return Err(Failure::Usage);
        }
        let before = self.image()?.choices.clone();
        let mut choices = before.clone();
        choices.readonly = match (given.has('r'), given.has('w')) {
            (false, false) => choices.readonly,
            (readonly, write) if readonly != write => readonly,
            _ => return Err(Failure::Said("Only one of -r/-w can be given.\n".into())),
        };
        let list = given.get('o').unwrap_or("");
        if (given.has('r') || given.has('w')) && mentions(list, "read-only") {
            return Err(Wrong("Cannot set both -r/-w and 'read-only'".into()).into());
        }
        if given.has('c') && mentions(list, "cache.") {
            return Err(Wrong("Cannot set both -c and the cache options".into()).into());
        }
        if let Some(mode) = given.get('c') {
            choices.cache(mode)?;
        }
        choices.change(list)?;
        self.finish(out)?;
        match Open::new(choices) {
            Ok(open) => self.open = Some(open),
            Err(wrong) => {
                // As it was, if that is still possible.
                self.open = Open::new(before).ok();
                return Err(wrong.into());
            }
        }
        Ok(())
    }

    /// `flush`.
    pub fn flush(&mut self) -> Result<(), Failure> {
        let flushed = self.image()?.disk.flush();
        flushed.map_err(|error| Failure::Error(format!("qemu-io: {}", report::error(&error))))
    }

    /// `length`.
    pub fn length(&mut self, out: &mut dyn Write) -> Result<(), Failure> {
        let size = self.image()?.disk.size_bytes();
        writeln!(out, "{}", long_size(size as f64))?;
        Ok(())
    }

    /// `truncate`: qcow2 images grow only, raw ones are also cut off.
    pub fn truncate(&mut self, given: &Options<'_>, out: &mut dyn Write) -> Result<(), Failure> {
        let [size] = given.rest.as_slice() else {
            return Err(Failure::Usage);
        };
        let size = report::number(size).map_err(Failure::Said)?;
        self.reap(out, true)?;
        let open = self.image()?;
        if given.get('m').is_some_and(|mode| mode != "off") {
            return Err(Wrong("preallocation is not supported".into()).into());
        }
        if open.options.readonly {
            return Err(Wrong("Image is read-only".into()).into());
        }
        if size == 0 || !size.is_multiple_of(512) {
            let reason = "a disk has a multiple of 512 bytes, and is not empty";
            return Err(Wrong(reason.into()).into());
        }
        if open.format == Format::Qcow2 {
            return match size.cmp(&open.disk.size_bytes()) {
                Ordering::Less => Err(Wrong("qcow2 images can't be made smaller".into()).into()),
                Ordering::Equal => Ok(()),
                Ordering::Greater => {
                    let grown = open.disk.grow(size);
                    grown.map_err(|error| Wrong(error.to_string()).into())
                }
            };
        }
        let choices = open.choices.clone();
        self.finish(out)?;
        let path = choices.path.as_deref().unwrap_or(Path::new(""));
        let file = std::fs::OpenOptions::new().write(true).open(path);
        let result = file.and_then(|file| file.set_len(size));
        self.open = Some(Open::new(choices)?);
        result.map_err(|error| Wrong(report::error(&error)).into())
    }

    /// Where things are, by the file as it is after a flush.
    fn extents(&mut self) -> Result<Extents, Failure> {
        let open = self.image()?;
        if !open.options.readonly {
            let flushed = open.disk.flush();
            flushed
                .map_err(|error| Failure::Error(format!("qemu-io: {}", report::error(&error))))?;
        }
        let alone = OpenOptions {
            backing_files: false,
            ..open.options.clone()
        };
        let extents = Extents::open(open.format, &alone, false);
        extents.map_err(|error| Failure::Error(format!("qemu-io: {error}")))
    }

    /// `alloc`.
    pub fn alloc(&mut self, given: &Options<'_>, out: &mut dyn Write) -> Result<(), Failure> {
        let offset = report::number(given.rest[0]).map_err(Failure::Said)?;
        let count = match given.rest.get(1) {
            Some(text) => report::number(text).map_err(Failure::Said)?,
            None => 512,
        };
        let mut extents = self.extents()?;
        let failed = |_| Failure::Said("is_allocated failed: Input/output error\n".into());
        let end = offset.saturating_add(count).min(extents.size_bytes());
        let mut position = offset;
        let mut sum = 0;
        while position < end {
            let (allocated, length) = extents.allocated(position, end).map_err(failed)?;
            sum += if allocated { length } else { 0 };
            position += length;
        }
        let place = long_size(offset as f64);
        writeln!(out, "{sum}/{count} bytes allocated at offset {place}")?;
        Ok(())
    }

    /// `map`.
    pub fn map(&mut self, out: &mut dyn Write) -> Result<(), Failure> {
        let mut extents = self.extents()?;
        let end = extents.size_bytes();
        let mut position = 0;
        while position < end {
            let found = extents.allocated(position, end);
            let (allocated, length) = found
                .map_err(|_| Failure::Error("qemu-io: Failed to get allocation status".into()))?;
            writeln!(
                out,
                "{} ({length:#x}) bytes {} at offset {} ({position:#x})",
                long_size(length as f64),
                if allocated {
                    "    allocated"
                } else {
                    "not allocated"
                },
                long_size(position as f64)
            )?;
            position += length;
        }
        Ok(())
    }

    /// `info`.
    pub fn info(&mut self, out: &mut dyn Write) -> Result<(), Failure> {
        let open = self.image()?;
        writeln!(out, "format name: {}", open.format.name())?;
        if open.format == Format::Raw {
            return Ok(());
        }
        let found = self.image_info()?;
        if let (Some(specific), Some(cluster)) = (&found.format_specific, found.cluster_size) {
            let entry = if specific.data.extended_l2 == Some(true) {
                16
            } else {
                8
            };
            let per_table = u128::from(cluster) * u128::from(cluster / entry);
            let state = u128::from(found.virtual_size).div_ceil(per_table) * per_table;
            writeln!(out, "cluster size: {}", long_size(cluster as f64))?;
            writeln!(out, "vm state offset: {}", long_size(state as f64))?;
            writeln!(out, "Format specific information:")?;
            print::qcow2(out, &specific.data)?;
        }
        Ok(())
    }

    /// Read by another opening, which needs no lock: the image is ours.
    fn image_info(&mut self) -> Result<ImageInfo, Failure> {
        let open = self.image()?;
        let alone = OpenOptions {
            backing_files: false,
            readonly: true,
            ..open.options.clone()
        };
        let found = info(open.format, &alone, false);
        let found = found.map_err(|error| Failure::Error(format!("qemu-io: {error}")))?;
        let first = found.into_iter().next();
        first.ok_or_else(|| Failure::Error("qemu-io: there is no image".into()))
    }
}

//! The image that is open, and what is done with it as a whole.

use std::io::Write;
use std::path::PathBuf;

use devices::disk::blocking::Blocking;
use devices::disk::qcow2::extents::Extents;
use devices::disk::qcow2::info::{ImageInfo, info};
use devices::disk::{Format, LockGranularity, OpenOptions};

use super::super::DiskError;
use super::super::arguments::{Io, format};
use super::super::number::long_size;
use super::super::print;
use super::Failure;
use super::asynchronous::Pending;
use super::options::Options;
use super::report;

/// See the module.
pub struct Session {
    /// What `open` uses where it is not told otherwise.
    format: Option<Format>,
    backing_files: bool,
    pub open: Option<Open>,
    pub pending: Pending,
}

/// An image that is open.
pub struct Open {
    pub format: Format,
    pub options: OpenOptions,
    pub disk: Blocking,
}

impl Open {
    fn new(format: Format, options: OpenOptions) -> Result<Self, String> {
        let disk = Blocking::open(format, &options);
        let disk = disk.map_err(|error| {
            format!(
                "qemu-io: can't open device {}: {error}",
                options.path.display()
            )
        })?;
        Ok(Self {
            format,
            options,
            disk,
        })
    }
}

impl Session {
    /// Opens the image of the command line, if there is one.
    pub fn new(arguments: &Io) -> Result<Self, DiskError> {
        let mut session = Self {
            format: arguments.format,
            backing_files: arguments.backing_files,
            open: None,
            pending: Pending::default(),
        };
        if let Some(path) = &arguments.path {
            let Some(format) = arguments.format else {
                let reason = "the format must be given with -f: it is never guessed";
                return Err(DiskError::Usage(reason.into()));
            };
            let mut options = session.options(path.clone(), arguments.readonly);
            options.direct =
                arguments.nocache || arguments.cache.as_deref().is_some_and(bypasses_cache);
            session.open = Some(Open::new(format, options).map_err(DiskError::Usage)?);
        }
        Ok(session)
    }

    fn options(&self, path: PathBuf, readonly: bool) -> OpenOptions {
        OpenOptions {
            path,
            readonly,
            direct: false,
            disable_io_uring: false,
            lock: LockGranularity::ByteRange,
            backing_files: self.backing_files,
            cache_bytes: None,
        }
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
        let mut chosen = self.format;
        let mut path = given.rest.first().map(PathBuf::from);
        for pair in given.get('o').into_iter().flat_map(|list| list.split(',')) {
            match pair.split_once('=') {
                Some(("driver", name)) => {
                    chosen =
                        Some(format(name).map_err(|e| Failure::Error(format!("qemu-io: {e}")))?);
                }
                Some(("file.filename" | "filename", name)) => path = Some(name.into()),
                _ => {
                    let message = format!("qemu-io: -o {pair} is not supported");
                    return Err(Failure::Error(message));
                }
            }
        }
        let (Some(path), [] | [_]) = (path, given.rest.as_slice()) else {
            return Err(Failure::Usage);
        };
        let Some(chosen) = chosen else {
            let message = "qemu-io: the format must be given (-o driver=…): it is never guessed";
            return Err(Failure::Error(message.into()));
        };
        let mut options = self.options(path, given.has('r'));
        options.direct = given.has('n') || given.get('t').is_some_and(bypasses_cache);
        self.open = Some(Open::new(chosen, options).map_err(Failure::Error)?);
        Ok(())
    }

    /// `reopen`.
    pub fn reopen(&mut self, given: &Options<'_>, out: &mut dyn Write) -> Result<(), Failure> {
        if given.has('o') || !given.rest.is_empty() {
            return Err(Failure::Usage);
        }
        let open = self.image()?;
        let (chosen, mut options) = (open.format, open.options.clone());
        options.readonly = match (given.has('r'), given.has('w')) {
            (false, false) => options.readonly,
            (readonly, write) if readonly != write => readonly,
            _ => return Err(Failure::Said("Only one of -r/-w can be given.\n".into())),
        };
        if let Some(cache) = given.get('c') {
            options.direct = bypasses_cache(cache);
        }
        self.finish(out)?;
        self.open = Some(Open::new(chosen, options).map_err(Failure::Error)?);
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

    /// `truncate`, of raw images.
    pub fn truncate(&mut self, given: &Options<'_>, out: &mut dyn Write) -> Result<(), Failure> {
        let [size] = given.rest.as_slice() else {
            return Err(Failure::Usage);
        };
        let size = report::number(size).map_err(Failure::Said)?;
        let open = self.image()?;
        let failed = |reason: &str| Failure::Error(format!("qemu-io: {reason}"));
        if given.get('m').is_some_and(|mode| mode != "off") {
            return Err(failed("preallocation is not supported"));
        }
        if open.options.readonly {
            return Err(failed("Image is read-only"));
        }
        if open.format != Format::Raw {
            return Err(failed("truncating qcow2 images is not supported"));
        }
        if size == 0 || !size.is_multiple_of(512) {
            return Err(failed(
                "a disk has a multiple of 512 bytes, and is not empty",
            ));
        }
        let options = open.options.clone();
        self.finish(out)?;
        let file = std::fs::OpenOptions::new().write(true).open(&options.path);
        let result = file.and_then(|file| file.set_len(size));
        self.open = Some(Open::new(Format::Raw, options).map_err(Failure::Error)?);
        result.map_err(|error| failed(&report::error(&error)))
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

fn bypasses_cache(mode: &str) -> bool {
    matches!(mode, "none" | "directsync")
}

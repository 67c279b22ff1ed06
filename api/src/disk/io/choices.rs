//! How an image is to be opened, by the words that QEMU has for it: those of the command line's
//! `-t`, `-i` and `-d`, and those of option lists (`driver=qcow2,file.filename=…`).
//!
//! ```text
//!   cache         page cache   each write durable
//!   writeback     used         no
//!   none          bypassed     no
//!   writethrough  used         yes
//!   directsync    bypassed     yes
//!   unsafe        used         no: flushes need not be done then, and are
//! ```

use std::path::PathBuf;

use devices::disk::{Format, LockGranularity, OpenOptions};

use super::super::arguments::format;
use super::super::number::parse_size;

/// What is wrong with a choice.
#[derive(Debug, PartialEq, Eq)]
pub struct Wrong(pub String);

impl From<Wrong> for super::Failure {
    fn from(wrong: Wrong) -> Self {
        Self::Error(format!("qemu-io: {}", wrong.0))
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choices {
    pub format: Option<Format>,
    pub path: Option<PathBuf>,
    pub readonly: bool,
    /// Follow names in headers.
    pub backing_files: bool,
    pub direct: bool,
    /// Each write is durable.
    pub writethrough: bool,
    /// What is discarded is given back to the host.
    pub unmap: bool,
    /// Without io_uring.
    pub threads: bool,
    pub cache_bytes: Option<u64>,
    /// Memory begins where O_DIRECT does not want it.
    pub misalign: bool,
}

impl Choices {
    pub fn new(format: Option<Format>, backing_files: bool) -> Self {
        Self {
            format,
            path: None,
            readonly: false,
            backing_files,
            direct: false,
            writethrough: false,
            unmap: true,
            threads: false,
            cache_bytes: None,
            misalign: false,
        }
    }

    /// A cache mode.
    pub fn cache(&mut self, mode: &str) -> Result<(), Wrong> {
        (self.direct, self.writethrough) = match mode {
            "writeback" | "unsafe" => (false, false),
            "none" | "off" => (true, false),
            "writethrough" => (false, true),
            "directsync" => (true, true),
            _ => return Err(Wrong(format!("Invalid cache option: {mode}"))),
        };
        Ok(())
    }

    /// How requests reach the host.
    pub fn aio(&mut self, mode: &str) -> Result<(), Wrong> {
        self.threads = match mode {
            "threads" => true,
            "io_uring" => false,
            "native" => {
                let reason = "aio=native is not supported: there are io_uring and threads";
                return Err(Wrong(reason.into()));
            }
            _ => return Err(Wrong(format!("Invalid aio option: {mode}"))),
        };
        Ok(())
    }

    /// What becomes of discards.
    pub fn discard(&mut self, mode: &str) -> Result<(), Wrong> {
        self.unmap = match mode {
            "unmap" | "on" => true,
            "ignore" | "off" => false,
            _ => return Err(Wrong(format!("Invalid discard option: {mode}"))),
        };
        Ok(())
    }

    /// A list of options with commas between; two commas are one within a value. Nothing that is
    /// not understood is passed over.
    pub fn list(&mut self, list: &str) -> Result<(), Wrong> {
        for pair in split(list) {
            let (name, value) = pair.split_once('=').unwrap_or((&pair, "on"));
            self.option(name, value)?;
        }
        Ok(())
    }

    /// The same for an image that is open, and is to be opened anew.
    pub fn change(&mut self, list: &str) -> Result<(), Wrong> {
        let (format, path) = (self.format, self.path.clone());
        self.list(list)?;
        let changed = [
            ("driver", self.format != format),
            ("filename", self.path != path),
        ];
        match changed.iter().find(|(_, changed)| *changed) {
            Some((name, _)) => Err(Wrong(format!("Cannot change the option '{name}'"))),
            None => Ok(()),
        }
    }

    fn option(&mut self, name: &str, value: &str) -> Result<(), Wrong> {
        match name {
            "driver" => self.format = Some(format(value).map_err(Wrong)?),
            "file.filename" | "filename" => self.path = Some(value.into()),
            "file.driver" if value == "file" => {}
            "read-only" => self.readonly = switch(name, value)?,
            "cache.direct" => self.direct = switch(name, value)?,
            "cache.writeback" => self.writethrough = !switch(name, value)?,
            // Allows flushes to be left out: they are done.
            "cache.no-flush" => _ = switch(name, value)?,
            "auto-read-only" if !switch(name, value)? => {}
            "discard" => self.discard(value)?,
            "aio" | "file.aio" => self.aio(value)?,
            "l2-cache-size" => {
                let bytes = parse_size(value);
                let bytes = bytes.map_err(|error| Wrong(format!("{name}: {error}")))?;
                self.cache_bytes = Some(bytes);
            }
            _ => return Err(Wrong(format!("{name}={value} is not supported"))),
        }
        Ok(())
    }

    /// The format and the path, if both are known, and what to open them with.
    pub fn complete(&self) -> Result<(Format, OpenOptions), Wrong> {
        let Some(format) = self.format else {
            let reason = "the format must be given (-f, or driver=…): it is never guessed";
            return Err(Wrong(reason.into()));
        };
        let Some(path) = self.path.clone() else {
            return Err(Wrong("there is no file.filename=…".into()));
        };
        let options = OpenOptions {
            path,
            readonly: self.readonly,
            direct: self.direct,
            disable_io_uring: self.threads,
            lock: LockGranularity::ByteRange,
            backing_files: self.backing_files,
            cache_bytes: self.cache_bytes,
        };
        Ok((format, options))
    }
}

fn switch(name: &str, value: &str) -> Result<bool, Wrong> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(Wrong(format!("Parameter '{name}' expects 'on' or 'off'"))),
    }
}

/// Whether a list has an option that begins so.
pub fn mentions(list: &str, name: &str) -> bool {
    split(list).iter().any(|part| part.starts_with(name))
}

/// The parts between single commas.
fn split(list: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut letters = list.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            ',' if letters.next_if_eq(&',').is_none() => parts.push(std::mem::take(&mut part)),
            letter => part.push(letter),
        }
    }
    parts.push(part);
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_options_are_understood_whole_or_refused() {
        let mut choices = Choices::new(None, false);
        let list = "driver=qcow2,file.driver=file,file.filename=a,,b=c,read-only,cache.direct=on,\
                    cache.writeback=off,cache.no-flush=on,auto-read-only=off,discard=ignore,file.aio=threads,l2-cache-size=64k";
        choices.list(list).unwrap();
        assert_eq!(choices.path, Some("a,b=c".into()));
        let (format, options) = choices.complete().unwrap();
        assert_eq!(format, Format::Qcow2);
        assert!(options.readonly && options.direct && options.disable_io_uring);
        assert_eq!(options.cache_bytes, Some(65536));
        assert!(choices.writethrough && !choices.unmap && !options.backing_files);

        for wrong in [
            "driver=vmdk",
            "file.driver=nbd",
            "read-only=maybe",
            "discard=some",
            "aio=native",
            "aio=x",
            "l2-cache-size=x",
            "lazy-refcounts=on",
            "cache.no-flush=maybe",
            "auto-read-only",
            "backing.driver=raw",
            "x",
        ] {
            let mut choices = Choices::new(Some(Format::Raw), false);
            assert!(choices.list(wrong).is_err(), "{wrong}");
        }
        assert!(Choices::new(Some(Format::Raw), false).complete().is_err());
        let mut choices = Choices::new(None, false);
        choices.list("filename=x").unwrap();
        assert!(choices.complete().unwrap_err().0.contains("never guessed"));
    }

    #[test]
    fn cache_modes_are_those_of_qemu() {
        for (mode, direct, writethrough) in [
            ("writeback", false, false),
            ("unsafe", false, false),
            ("none", true, false),
            ("off", true, false),
            ("writethrough", false, true),
            ("directsync", true, true),
        ] {
            let mut choices = Choices::new(None, false);
            choices.cache(mode).unwrap();
            assert_eq!(
                (choices.direct, choices.writethrough),
                (direct, writethrough)
            );
        }
        let wrong = Choices::new(None, false).cache("x");
        assert_eq!(wrong, Err(Wrong("Invalid cache option: x".into())));
    }
}

//! The files of a new image: its own, and maybe one for its data.
//!
//! Neither has a name before both are whole. The data file gets its name first, for an image that
//! names a file that there is not can't be opened; where the image then gets none, the name of the
//! data file goes again. Neither ever replaces a file.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::super::Format;
use super::super::new_file::NewFile;
use super::chain::beside;
use super::create::{CreateOptions, Preallocation};
use super::header::{ExternalData, OFFSET_LIMIT};
use crate::config::{BuildError, Invalid};

const MAX_NAME: usize = 1023;

/// See the module.
pub struct NewImage {
    file: NewFile,
    data: Option<NewFile>,
}

impl NewImage {
    /// Begins the files. Without `may_have_name` they are made on a thread that may not make files
    /// with names.
    pub fn begin(options: &CreateOptions, may_have_name: bool) -> Result<Self, BuildError> {
        let begin = |path: &Path| match may_have_name {
            true => NewFile::begin(path),
            false => NewFile::begin_nameless(path),
        };
        let data = match external(options)? {
            None => None,
            Some(data) => {
                // It was looked at.
                let path = beside(&options.path, &data.name);
                let path = path.ok_or_else(|| invalid("data_file", "is not the name of a file"))?;
                if path == options.path {
                    return Err(invalid("data_file", "is the image itself"));
                }
                Some(begin(&path).map_err(blame)?)
            }
        };
        Ok(Self {
            file: begin(&options.path)?,
            data,
        })
    }

    /// That of the image.
    pub fn file(&self) -> &File {
        self.file.file()
    }

    /// That of its data, if that is another one.
    pub fn data(&self) -> Option<&File> {
        self.data.as_ref().map(NewFile::file)
    }

    /// Makes them durable and gives them their names.
    pub fn finish(self) -> Result<(), BuildError> {
        let named = match self.data {
            None => None,
            Some(data) => Some(data.finish_durably().map_err(blame)?),
        };
        self.file.finish()?;
        if let Some(named) = named {
            named.keep();
        }
        Ok(())
    }
}

/// What the options say of a data file.
pub fn external(options: &CreateOptions) -> Result<Option<ExternalData>, BuildError> {
    let raw = options.data_file_raw;
    let Some(name) = &options.data_file else {
        return match raw {
            true => Err(invalid("data_file_raw", "is of no use without `data_file`")),
            false => Ok(None),
        };
    };
    if options.version_2 {
        return Err(invalid("data_file", "needs version 3 (compat=1.1)"));
    }
    if raw && options.backing.is_some() {
        let reason =
            "says that the data file has all of the disk, and a backing file has some of it";
        return Err(invalid("data_file_raw", reason));
    }
    if options.size_bytes.is_some_and(|size| size >= OFFSET_LIMIT) {
        return Err(invalid("size", "is too much for an external data file"));
    }
    let name = name.as_os_str().as_bytes();
    if !(1..=MAX_NAME).contains(&name.len()) {
        let reason = format!("its name must have 1 to {MAX_NAME} bytes");
        return Err(invalid("data_file", reason));
    }
    if beside(&options.path, name).is_none() {
        let reason = format!("`{}` is not the name of a file", name.escape_ascii());
        return Err(invalid("data_file", reason));
    }
    Ok(Some(ExternalData {
        name: name.to_vec(),
        raw,
    }))
}

/// With what comes of them. Where the data file is said to be the disk there are entries for all of
/// it, as with QEMU: none has to be made, and flushed, before data can get there.
pub fn settled(options: &CreateOptions) -> CreateOptions {
    let mut options = options.clone();
    let raw = options.data_file_raw && options.format == Format::Qcow2;
    if raw && options.preallocation == Preallocation::Off {
        options.preallocation = Preallocation::Metadata;
    }
    options
}

/// What is wrong with the data file is not wrong with the image.
fn blame(error: BuildError) -> BuildError {
    match error {
        BuildError::Invalid(wrong) => invalid("data_file", wrong.reason),
        other => other,
    }
}

fn invalid(field: &str, reason: impl Into<String>) -> BuildError {
    Invalid::new(field, reason).into()
}

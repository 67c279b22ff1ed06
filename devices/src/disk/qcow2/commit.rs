//! Opening what lies below an image to be written to, beside the image that is in use.

use std::path::Path;
use std::sync::Arc;

use super::super::open::{checked, open_beside_reader};
use super::super::raw::RawImage;
use super::super::{BackingInfo, Commit, Format, Image, OpenOptions};
use super::chain::Chain;
use super::{Opened, Qcow2Image};
use crate::config::{BuildError, Invalid};

impl Qcow2Image {
    /// See [`Image::begin_commit`].
    pub(super) fn open_base(&self) -> Result<Commit, BuildError> {
        let steps = self.steps()?;
        let path = self.options.path.display();
        let refuse = |reason: String| BuildError::from(Invalid::new("id", reason));
        let (Some(control), Some(layer)) = (&self.control, self.chain.images().get(1)) else {
            return Err(refuse(format!("{path} has no backing file")));
        };
        let below = std::path::absolute(&layer.path)
            .map_err(|e| BuildError::host("finding the working directory", e))?;
        let shown = below.display();
        let size_bytes = self.size_bytes();
        if layer.disk_bytes() > size_bytes {
            return Err(refuse(format!(
                "the backing file {shown} has {} bytes, more than the disk, which would become \
                 larger",
                layer.disk_bytes()
            )));
        }
        if layer.layout().is_some_and(|layout| layout.external) {
            return Err(refuse(format!(
                "not supported yet: writing the backing file {shown}, whose data is in another file"
            )));
        }
        // Another file may have come where it was.
        let found = rustix::fs::stat(&below);
        let stat = rustix::fs::fstat(&layer.file)
            .map_err(|e| BuildError::host("looking at a backing file", e))?;
        let identity = (stat.st_dev, stat.st_ino);
        if !found.is_ok_and(|found| (found.st_dev, found.st_ino) == identity) {
            return Err(refuse(format!("the backing file is no longer at {shown}")));
        }
        let options = OpenOptions {
            path: below.clone(),
            ..self.options.clone()
        };
        let format = match layer.layout() {
            Some(_) => Format::Qcow2,
            None => Format::Raw,
        };
        let base = || -> Result<Arc<dyn Image>, BuildError> {
            let host = open_beside_reader(&options, layer.lock())?;
            if host.identity != identity {
                return Err(refuse(format!("the backing file is no longer at {shown}")));
            }
            Ok(match format {
                Format::Raw => Arc::new(RawImage::of(checked(host, &options)?, &options)),
                Format::Qcow2 => {
                    let (chain, top) = Chain::open_again(&options, &host, None)?;
                    Arc::new(Self::of(chain, top, &options, Opened::BesideReader)?)
                }
            })
        };
        let base = base().map_err(|error| blame(error, &below))?;
        let block = u64::from(base.geometry().logical_block);
        if !size_bytes.is_multiple_of(block) {
            return Err(refuse(format!(
                "{shown} is where the host transfers {block} bytes at a time, and the disk's size \
                 is no multiple of it"
            )));
        }
        Ok(Commit {
            steps,
            dirty: control.dirty.clone(),
            base,
            info: BackingInfo {
                path: below,
                format,
            },
        })
    }
}

/// Whatever is wrong with it is the fault of what is below the disk.
fn blame(error: BuildError, below: &Path) -> BuildError {
    match error {
        BuildError::Invalid(wrong) if wrong.field != "id" => {
            let reason = format!("backing file {}: {}", below.display(), wrong.reason);
            Invalid::new("id", reason).into()
        }
        other => other,
    }
}

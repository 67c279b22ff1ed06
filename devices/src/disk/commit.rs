//! Writing what an overlay holds into its backing file, while nobody uses either.
//!
//! What is in the overlay is copied down and flushed before anything is taken away from the
//! overlay, so that wherever it is interrupted the overlay still shows the same disk.

use super::blocking::Blocking;
use super::qcow2::check::empty;
use super::qcow2::extents::Extents;
use super::{Format, OpenOptions};
use crate::config::{BuildError, Invalid};

/// Copied at a time.
const PIECE: u64 = 1 << 20;

/// Writes what `options.path` holds into the image below it; with `drain`, empties it afterwards.
/// Needs `options.backing_files`, for the name of the backing file stands in its header.
pub fn commit(
    format: Format,
    options: &OpenOptions,
    drain: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), BuildError> {
    let invalid = |field: &str, reason: String| BuildError::from(Invalid::new(field, reason));
    let path = options.path.display();
    let mut top = Extents::open_top(format, options)?;
    let Some((below, below_format)) = top.backing_file(options)? else {
        return Err(invalid("path", format!("{path} has no backing file")));
    };
    if let Some(data) = top.data_path() {
        let reason = format!(
            "not supported yet: committing {path}, whose data is in the file {}",
            data.display()
        );
        return Err(invalid("path", reason));
    }
    let target = OpenOptions {
        path: below.clone(),
        readonly: false,
        ..options.clone()
    };
    let mut base = Blocking::open(below_format, &target)?;
    let size = top.size_bytes();
    if size > base.size_bytes() {
        let reason = format!(
            "{path} is larger than {}, which would have to grow first",
            below.display()
        );
        return Err(invalid("path", reason));
    }
    let reading = |error| BuildError::host(format!("reading {path}"), error);
    let writing = |error| BuildError::host(format!("writing {}", below.display()), error);
    let mut position = 0;
    while position < size {
        let extent = top.next(position, size).map_err(reading)?;
        let end = extent.start + extent.length;
        if extent.data {
            let mut at = position;
            while at < end {
                let len = PIECE.min(end - at);
                let bytes = top.read_top(at, len as usize).map_err(reading)?;
                base.write(at, &bytes, false).map_err(writing)?;
                at += len;
                progress(at, size);
            }
        } else if extent.present {
            base.write_zeroes(position, extent.length, true, false)
                .map_err(writing)?;
        }
        position = end;
        progress(position, size);
    }
    base.flush().map_err(writing)?;
    // Both are let go of: who empties it takes it for itself.
    drop(base);
    drop(top);
    match drain {
        true => empty(options),
        false => Ok(()),
    }
}

//! Opening a chain: which files it has, and what is found out about each.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::super::super::open::{HostFile, open_beside_own, open_file};
use super::super::super::{DEFAULT_CACHE_BYTES, Format, OpenOptions, SECTOR};
use super::super::cache::{Lookups, SliceCache};
use super::super::data_file;
use super::super::details::{self, ReadError, Snapshot};
use super::super::header::{self, Backing, Header, MAX_CLUSTER, Unusable};
use super::super::map::Layout;
use super::{Chain, Layer, Tables, Top, alignment, read_file};
use crate::config::{BuildError, Invalid};

/// The most images one on top of another.
const MAX_DEPTH: usize = 64;
/// The most bytes of L1 tables in a chain: twice what the largest image has.
const MAX_L1_BYTES: usize = 64 << 20;
/// Bytes of a table of snapshots that are read at a time: more than any of them has.
const SNAPSHOT_PIECE: usize = 256 << 10;

impl Chain {
    /// Opens and locks all of them; those below the topmost for reading.
    pub fn open(options: &OpenOptions) -> Result<(Self, Top), BuildError> {
        Self::open_as(options, Start::Path)
    }

    /// The same for an overlay of an image that this process is writing to.
    pub fn open_over_own(options: &OpenOptions) -> Result<(Self, Top), BuildError> {
        Self::open_as(options, Start::OverOwn)
    }

    /// Opens an image anew that this process has open, and has written to, under the same lock.
    /// So with its external data file.
    pub fn open_again(
        options: &OpenOptions,
        host: &HostFile,
        data: Option<&HostFile>,
    ) -> Result<(Self, Top), BuildError> {
        let again = |host: &HostFile| {
            let stat = rustix::fs::fstat(&host.file);
            let stat = stat.map_err(|e| failed(&options.path, e.into()))?;
            Ok::<_, BuildError>(HostFile {
                size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
                ..host.clone()
            })
        };
        let data = data.map(again).transpose()?;
        Self::open_as(options, Start::Again(again(host)?, data))
    }

    fn open_as(options: &OpenOptions, start: Start) -> Result<(Self, Top), BuildError> {
        let mut layers: Vec<Layer> = Vec::new();
        let mut seen = Vec::new();
        let mut data_files: Vec<(usize, Layer)> = Vec::new();
        let mut l1_bytes = 0;
        let mut top = None;
        let mut next = Some((options.path.clone(), Format::Qcow2));
        while let Some((path, format)) = next.take() {
            let host = match (layers.len(), &start) {
                (0, Start::Again(host, _)) => host.clone(),
                (0, _) => open_host(options, &path, Opening::Top)?,
                (1, Start::OverOwn) => open_host(options, &path, Opening::Own)?,
                _ => open_host(options, &path, Opening::Below)?,
            };
            if seen.contains(&host.identity) {
                return Err(refused(&path, "it is its own backing file"));
            }
            if layers.len() == MAX_DEPTH {
                let reason = format!("more than {MAX_DEPTH} images lie one on top of another");
                return Err(refused(&options.path, reason));
            }
            seen.push(host.identity);
            let (size_bytes, tables) = match format {
                Format::Raw => (host.size_bytes, None),
                Format::Qcow2 => {
                    let header = read_header(&host, &path)?;
                    let mut data = None;
                    if let Some(external) = &header.data {
                        let data_path = data_file::path(external, &path, options)?;
                        let found = match (layers.len(), &start) {
                            (0, Start::Again(_, Some(found))) => found.clone(),
                            (0, _) => data_file::open(options, &data_path, Opening::Top, &seen)?,
                            (1, Start::OverOwn) => {
                                data_file::open(options, &data_path, Opening::Own, &seen)?
                            }
                            _ => data_file::open(options, &data_path, Opening::Below, &seen)?,
                        };
                        seen.push(found.identity);
                        data_files.push((layers.len(), Layer::of_data(data_path, &found)));
                        data = Some(found);
                    }
                    if top.is_none() {
                        let (snapshots, snapshot_table_bytes) =
                            read_snapshots(&host, &header, &path)?;
                        top = Some(Top {
                            host: host.clone(),
                            data,
                            snapshots,
                            snapshot_table_bytes,
                            header: header.clone(),
                        });
                    }
                    l1_bytes += header.l1_entries * 8;
                    if l1_bytes > MAX_L1_BYTES {
                        return Err(refused(&path, "the L1 tables of the chain are too large"));
                    }
                    next = match &header.backing {
                        Some(backing) => Some(backing_file(backing, &path, options)?),
                        None => None,
                    };
                    let tables = Tables {
                        layout: Layout::new(&header),
                        l1: read_l1(&host, &header, &path)?,
                        data: None,
                    };
                    (header.size_bytes, Some(tables))
                }
            };
            layers.push(Layer {
                size_bytes,
                tables,
                ..Layer::of_data(path, &host)
            });
        }
        let images = layers.len();
        for (of, file) in data_files {
            let number = u16::try_from(layers.len()).ok();
            if let Some(tables) = layers.get_mut(of).and_then(|layer| layer.tables.as_mut()) {
                tables.data = number;
            }
            layers.push(file);
        }
        let (chain_bytes, pages_bytes) = divide(&layers, options);
        let slice_bytes = layers
            .iter()
            .filter_map(Layer::layout)
            .map(Layout::slice_bytes);
        let capacity = chain_bytes / slice_bytes.max().unwrap_or(SECTOR as usize).max(1);
        let chain = Self {
            layers,
            images,
            cache: Mutex::new(SliceCache::new(capacity)),
            lookups: Lookups::default(),
            pages_bytes,
        };
        let top = top.ok_or_else(|| refused(&options.path, "there is no image"))?;
        Ok((chain, top))
    }
}

/// How the memory for tables is divided: what the chain's cache has of it, and what is left for the
/// one of a topmost image that is written to.
fn divide(layers: &[Layer], options: &OpenOptions) -> (usize, usize) {
    let all = options.cache_bytes.unwrap_or(DEFAULT_CACHE_BYTES);
    let all = usize::try_from(all).unwrap_or(usize::MAX);
    if options.readonly {
        return (all, 0);
    }
    let tables_below = layers.iter().skip(1).any(|layer| layer.tables.is_some());
    let chain = if tables_below { all / 2 } else { 0 };
    (chain, all - chain)
}

/// How the topmost image comes to be open.
enum Start {
    /// By its path.
    Path,
    /// The same, and the image below it is one that this process is writing to.
    OverOwn,
    /// It is, and so is its external data file.
    Again(HostFile, Option<HostFile>),
}

/// What an image is in its chain.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    Top,
    /// Below, and this process is still writing to it.
    Own,
    Below,
}

/// Opens a file of a chain as what it is in it; only what is at the top is written to.
pub fn open_file_as(
    options: &OpenOptions,
    path: &Path,
    how: Opening,
) -> Result<HostFile, BuildError> {
    let options = OpenOptions {
        path: path.into(),
        readonly: options.readonly || how != Opening::Top,
        ..options.clone()
    };
    match how {
        Opening::Own => open_beside_own(&options),
        Opening::Top | Opening::Below => open_file(&options),
    }
}

fn open_host(options: &OpenOptions, path: &Path, how: Opening) -> Result<HostFile, BuildError> {
    let host = open_file_as(options, path, how);
    if how == Opening::Top {
        return host;
    }
    match host {
        Ok(host) if host.block_device => {
            Err(refused(path, "a backing file must be a regular file"))
        }
        Err(BuildError::Invalid(invalid)) => Err(Invalid::new(
            invalid.field,
            format!("backing file {}: {}", path.display(), invalid.reason),
        )
        .into()),
        other => other,
    }
}

fn read_header(host: &HostFile, path: &Path) -> Result<Header, BuildError> {
    let read = |len| read(host, 0, len).map_err(|e| failed(path, e));
    let unusable = |unusable: Unusable| refused(path, unusable.to_string());
    if host.size_bytes == 0 {
        // Files of /proc have no size either, and reading them can fail in odd ways.
        return Err(unusable(Unusable::TooShort("header")));
    }
    let start = read(512)?;
    let cluster = header::cluster_bytes(&start).map_err(unusable)?;
    let header = Header::parse(&read(cluster.min(MAX_CLUSTER))?).map_err(unusable)?;
    if header.corrupt {
        let path = path.display();
        tracing::warn!("{path} is marked as corrupt");
    }
    Ok(header)
}

fn read_l1(host: &HostFile, header: &Header, path: &Path) -> Result<Box<[u64]>, BuildError> {
    let bytes = read(host, header.l1_offset, header.l1_entries * 8).map_err(|e| failed(path, e))?;
    if bytes.len() < header.l1_entries * 8 {
        return Err(refused(path, Unusable::TooShort("L1 table").to_string()));
    }
    let (entries, _) = bytes.as_chunks();
    Ok(entries.iter().copied().map(u64::from_be_bytes).collect())
}

/// Those inside an image, as its table has them; the table is read in pieces.
fn read_snapshots(
    host: &HostFile,
    header: &Header,
    path: &Path,
) -> Result<(Vec<Snapshot>, u64), BuildError> {
    let (mut start, mut piece) = (0, Vec::new());
    let fill = |bytes: &mut [u8], offset: u64| {
        let within = |piece: &[u8], start: u64| {
            let at = usize::try_from(offset.checked_sub(start)?).ok()?;
            let found = piece.get(at..)?.get(..bytes.len())?;
            Some(found.to_vec())
        };
        let found = match within(&piece, start) {
            Some(found) => found,
            None => {
                (start, piece) = (offset, read(host, offset, SNAPSHOT_PIECE)?);
                within(&piece, start).ok_or(Unusable::TooShort("snapshot table"))?
            }
        };
        bytes.copy_from_slice(&found);
        Ok(())
    };
    let writing = &header.writing;
    match details::snapshots(writing.snapshots_offset, writing.snapshots, fill) {
        Ok(found) => Ok(found),
        Err(ReadError::Unusable(unusable)) => Err(refused(path, unusable.to_string())),
        Err(ReadError::Io(error)) => Err(failed(path, error)),
    }
}

fn read(host: &HostFile, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    read_file(&host.file, alignment(host), offset, len)
}

/// Path and format of the backing file that the header of `overlay` names.
pub fn backing_file(
    backing: &Backing,
    overlay: &Path,
    options: &OpenOptions,
) -> Result<(PathBuf, Format), BuildError> {
    let name = backing.name.escape_ascii();
    if !options.backing_files {
        return Err(Invalid::new(
            "backing_files",
            format!(
                "must be true for {}, which has the backing file `{name}`",
                overlay.display()
            ),
        )
        .into());
    }
    let format = match backing.format.as_deref() {
        Some(b"raw") => Format::Raw,
        Some(b"qcow2") => Format::Qcow2,
        Some(other) => {
            let reason = format!(
                "its backing file `{name}` has the format `{}`; only raw and qcow2 are supported",
                other.escape_ascii()
            );
            return Err(refused(overlay, reason));
        }
        None => {
            let reason = format!(
                "it does not record the format of its backing file `{name}`, and a format is never \
                 guessed (`qemu-img rebase -u -F` records it)"
            );
            return Err(refused(overlay, reason));
        }
    };
    match beside(overlay, &backing.name) {
        Some(path) => Ok((path, format)),
        None => {
            let reason = format!("the name of its backing file, `{name}`, is not that of a file");
            Err(refused(overlay, reason))
        }
    }
}

/// Where the file is that the header of `image` names, relative to its folder; `None` where that is
/// not the name of a file.
pub fn beside(image: &Path, name: &[u8]) -> Option<PathBuf> {
    let is_protocol = name
        .iter()
        .find(|byte| matches!(byte, b':' | b'/'))
        .is_some_and(|byte| *byte == b':');
    if is_protocol || name.contains(&0) {
        return None;
    }
    // An absolute name replaces the folder.
    let folder = image.parent().unwrap_or(Path::new(""));
    Some(folder.join(OsStr::from_bytes(name)))
}

pub fn refused(path: &Path, reason: impl AsRef<str>) -> BuildError {
    let reason = format!("{}: {}", path.display(), reason.as_ref());
    Invalid::new("path", reason).into()
}

pub fn failed(path: &Path, error: io::Error) -> BuildError {
    BuildError::host(format!("reading {}", path.display()), error)
}

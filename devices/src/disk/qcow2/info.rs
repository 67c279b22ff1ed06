//! What there is to know about an image, with the field names of `qemu-img info --output json`.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;
use utoipa::ToSchema;

use super::super::{Format, OpenOptions};
use super::chain::backing_file;
use super::details::{DIRTY, Details};
use super::extents::open_layer;
use super::header::Compression;
use crate::config::{BuildError, Invalid};

const MAX_DEPTH: usize = 64;

/// One image.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// Internal snapshots.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotInfo>,
    /// The format that the header records of the backing file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// Size of the disk.
    pub virtual_size: u64,
    /// As it was given.
    pub filename: String,
    /// Smallest unit of allocation, without subclusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// As it was given.
    pub format: String,
    /// What the file takes of its file system.
    pub actual_size: u64,
    /// What the format has beside all this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<FormatSpecific>,
    /// Where the backing file is, seen from here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// As it stands in the header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// Refcounts may be too low, because whoever wrote last did not end properly.
    pub dirty_flag: bool,
}

/// Of a qcow2 image.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FormatSpecific {
    /// `qcow2`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The rest.
    pub data: Qcow2Info,
}

/// Features of a qcow2 image.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Info {
    /// `0.10` for version 2, `1.1` for version 3.
    pub compat: String,
    /// Of compressed clusters.
    pub compression_type: String,
    /// Name of the file that has its data, as it stands in the header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// Whether that file, read as a raw image, is the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file_raw: Option<bool>,
    /// Refcounts may lag behind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// Persistent bitmaps.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<BitmapInfo>,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// Somebody found that it contradicts itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<bool>,
    /// Whether there are subclusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
}

/// A persistent bitmap.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BitmapInfo {
    /// `in-use`, `auto`.
    pub flags: Vec<String>,
    /// Its name.
    pub name: String,
    /// Bytes of the disk for each bit.
    pub granularity: u64,
}

/// An internal snapshot.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Guest instructions that had been executed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
    /// Time that the guest had been running: nanoseconds within the second.
    pub vm_clock_nsec: u64,
    /// Its name.
    pub name: String,
    /// When it was taken, in seconds since 1970.
    pub date_sec: u32,
    /// Nanoseconds within that second.
    pub date_nsec: u32,
    /// Seconds that the guest had been running.
    pub vm_clock_sec: u64,
    /// Its number.
    pub id: String,
    /// Bytes of the machine's state.
    pub vm_state_size: u64,
}

/// Tells about an image, and with `options.backing_files` about those below it, the topmost first.
///
/// `locked` is false for one who has the image open already.
pub fn info(
    format: Format,
    options: &OpenOptions,
    locked: bool,
) -> Result<Vec<ImageInfo>, BuildError> {
    let mut found = Vec::new();
    let mut seen = Vec::new();
    let mut next = Some((options.path.clone(), format));
    while let Some((path, format)) = next.take() {
        let host = open_layer(&path, options, found.is_empty(), locked)?;
        let refused = |reason: &str| {
            BuildError::from(Invalid::new(
                "path",
                format!("{}: {reason}", path.display()),
            ))
        };
        if seen.contains(&host.identity) {
            return Err(refused("it is its own backing file"));
        }
        if found.len() == MAX_DEPTH {
            return Err(refused("too many images lie one on top of another"));
        }
        seen.push(host.identity);
        let mut info = plain(&path, format, host.size_bytes, &host.file)
            .map_err(|e| BuildError::host(format!("looking at {}", path.display()), e))?;
        if format == Format::Qcow2 {
            let details = Details::read(&host.file, host.size_bytes)
                .map_err(|error| refused(&error.to_string()))?;
            if options.backing_files
                && let Some(backing) = &details.header.backing
            {
                next = Some(backing_file(backing, &path, options)?);
            }
            tell(&mut info, &details, &path);
        }
        found.push(info);
    }
    Ok(found)
}

fn plain(path: &Path, format: Format, size: u64, file: &File) -> std::io::Result<ImageInfo> {
    Ok(ImageInfo {
        snapshots: Vec::new(),
        backing_filename_format: None,
        virtual_size: size,
        filename: path.display().to_string(),
        cluster_size: None,
        format: format.name().into(),
        actual_size: file.metadata()?.blocks() * 512,
        format_specific: None,
        full_backing_filename: None,
        backing_filename: None,
        dirty_flag: false,
    })
}

fn tell(info: &mut ImageInfo, details: &Details, path: &Path) {
    let header = &details.header;
    info.virtual_size = header.size_bytes;
    info.cluster_size = Some(details.cluster_bytes());
    info.dirty_flag = details.incompatible & DIRTY != 0;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if let Some(backing) = &header.backing {
        let name = text(&backing.name);
        let folder = path.parent().unwrap_or(Path::new(""));
        info.full_backing_filename = Some(folder.join(&name).display().to_string());
        info.backing_filename = Some(name);
        info.backing_filename_format = backing.format.as_deref().map(text);
    }
    info.snapshots = details
        .snapshots
        .iter()
        .map(|snapshot| SnapshotInfo {
            icount: snapshot.icount,
            vm_clock_nsec: snapshot.vm_clock_nsec % 1_000_000_000,
            name: snapshot.name.clone(),
            date_sec: snapshot.date_sec,
            date_nsec: snapshot.date_nsec,
            vm_clock_sec: snapshot.vm_clock_nsec / 1_000_000_000,
            id: snapshot.id.clone(),
            vm_state_size: snapshot.vm_state_size,
        })
        .collect();
    let v3 = header.version >= 3;
    info.format_specific = Some(FormatSpecific {
        kind: "qcow2".into(),
        data: Qcow2Info {
            compat: if v3 { "1.1" } else { "0.10" }.into(),
            compression_type: match header.compression {
                Compression::Zlib => "zlib".into(),
                Compression::Zstd => "zstd".into(),
            },
            data_file: header.data.as_ref().map(|data| text(&data.name)),
            data_file_raw: header.data.as_ref().map(|data| data.raw),
            lazy_refcounts: v3.then_some(details.lazy_refcounts),
            bitmaps: details
                .bitmaps
                .iter()
                .map(|bitmap| BitmapInfo {
                    flags: [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")]
                        .into_iter()
                        .filter(|(set, _)| *set)
                        .map(|(_, name)| name.to_owned())
                        .collect(),
                    name: bitmap.name.clone(),
                    granularity: bitmap.granularity,
                })
                .collect(),
            refcount_bits: 1 << details.refcount_order,
            corrupt: v3.then_some(header.corrupt),
            extended_l2: v3.then_some(header.extended_l2),
        },
    });
}

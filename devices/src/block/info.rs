//! `vm.disk-info`: how a disk stands on the host.

use std::path::PathBuf;

use serde::Serialize;
use utoipa::ToSchema;

use super::{Block, ImageType, OnEnospc, Opened};
use crate::config::BuildError;
use crate::disk::{Format, space};

/// How a disk of a booted VM stands on the host. What its image's engine does not know, or its
/// format does not have, is null.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct DiskInfo {
    /// The disk's id.
    #[schema(example = "_disk0")]
    pub id: String,
    /// The image.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Its format.
    pub image_type: ImageType,
    /// Bytes of the disk the guest sees.
    pub virtual_size: u64,
    /// Bytes that the host keeps for the image's file; null for a block device.
    pub allocated_size: Option<u64>,
    /// Bytes up to the end of the image's file; null for a block device.
    pub file_size: Option<u64>,
    /// Bytes for the taking on the file system of that file; null for a block device. A quota may
    /// end sooner.
    pub host_free: Option<u64>,
    /// Bytes of that file system, taken or for the taking; null for a block device.
    pub host_total: Option<u64>,
    /// The images below it, the nearest first.
    pub backing_chain: Vec<Backing>,
    /// The unit in which the image allocates; null for raw images.
    pub cluster_size: Option<u64>,
    /// Clusters known to be allocated and not in use.
    pub leaked_clusters: Option<u64>,
    /// How many of the look-ups of where data is the cache of tables (`l2_cache_size`) could answer,
    /// from 0 to 1; null before the first, and for raw images.
    pub cache_hit_ratio: Option<f64>,
    /// Names of the snapshots inside the image.
    pub snapshots: Option<Vec<String>>,
    /// As configured.
    pub write_threshold: Option<u64>,
    /// As configured.
    pub on_enospc: OnEnospc,
    /// Writes that are held because the host has no space for them.
    pub held_requests: u64,
    /// Bytes of these.
    pub held_bytes: u64,
}

/// What a disk takes of the host and holds, for who watches all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskReading {
    /// The disk's id.
    pub id: String,
    /// Whether the guest may write to it, so that its image may grow.
    pub writable: bool,
    /// Bytes of the disk the guest sees.
    pub virtual_bytes: u64,
    /// Its image's file; `None` for a block device, an error where the host failed.
    pub place: Result<Option<space::Place>, String>,
    /// Writes that are held because the host has no space for them.
    pub held_requests: u64,
    /// Bytes of these.
    pub held_bytes: u64,
    /// Look-ups of where data is: those that the cache could answer, and all.
    pub cache: Option<(u64, u64)>,
}

/// An image on which another lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Backing {
    /// The image.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Its format.
    pub image_type: ImageType,
}

impl From<Format> for ImageType {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

impl Block {
    /// How the disk stands. Called on the VMM thread.
    pub fn info(&self, id: &str) -> Result<DiskInfo, BuildError> {
        let failed = |e| BuildError::host(format!("looking at the image of {id}"), e);
        let (file, host) = self.space().map_err(failed)?;
        let Opened { config, image } = &*self.opened();
        let image = image.info().map_err(failed)?;
        let (held_requests, held_bytes) = self.hold.held();
        let backing = image.backing.into_iter().map(|backing| Backing {
            path: backing.path,
            image_type: backing.format.into(),
        });
        let ratio = |(hits, all): (u64, u64)| (all > 0).then(|| hits as f64 / all as f64);
        Ok(DiskInfo {
            id: id.to_owned(),
            path: config.path.clone(),
            image_type: image.format.into(),
            virtual_size: image.virtual_bytes,
            allocated_size: file.map(|file| file.allocated),
            file_size: file.map(|file| file.length),
            host_free: host.map(|host| host.free),
            host_total: host.map(|host| host.total),
            backing_chain: backing.collect(),
            cluster_size: image.cluster_bytes,
            leaked_clusters: image.leaked_clusters,
            cache_hit_ratio: image.cache.and_then(ratio),
            snapshots: image.snapshots,
            write_threshold: config.write_threshold,
            on_enospc: config.on_enospc,
            held_requests,
            held_bytes,
        })
    }

    /// What it takes and holds: two system calls, which a file system that hangs can hold up. Called
    /// on the VMM thread.
    pub fn reading(&self, id: &str) -> DiskReading {
        let Opened { config, image } = &*self.opened();
        let (held_requests, held_bytes) = self.hold.held();
        let place = space::place(&image.host_file());
        DiskReading {
            id: id.to_owned(),
            writable: !config.readonly,
            virtual_bytes: image.size_bytes(),
            place: place.map_err(|error| format!("looking at the image of {id}: {error}")),
            held_requests,
            held_bytes,
            cache: image.info().ok().and_then(|info| info.cache),
        }
    }

    /// What the image takes, and what its file system has.
    pub(super) fn space(
        &self,
    ) -> std::io::Result<(Option<space::FileSpace>, Option<space::FileSystemSpace>)> {
        let file = self.opened().image.host_file();
        Ok((space::of_file(&file)?, space::of_file_system(&file)?))
    }
}

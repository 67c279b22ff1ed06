//! How large a new image would become, with the meaning that `qemu-img measure` gives it: the most
//! that a copy takes, and what it takes when all of the disk has been written.
//!
//! Sizes of tables follow from the format (`docs/interop/qcow2.txt`): tables that describe all of
//! the disk, and refcounts for those, for the data, and for themselves.

use super::qcow2::create::{CreateOptions, Preallocation, shape_for};
use super::qcow2::extents::Extents;
use super::qcow2::writer::Shape;
use super::{Format, OpenOptions};
use crate::config::BuildError;

/// Bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// With what is to be copied into it.
    pub required: u64,
    /// With all of the disk written to.
    pub fully_allocated: u64,
}

/// Of an image of `target.size_bytes`, into which nothing is copied.
pub fn measure_empty(target: &CreateOptions) -> Result<Measured, BuildError> {
    let size = target.size_bytes.unwrap_or(0);
    measured(target, size, 0)
}

/// Of a copy of a disk. `locked` is false for one who looks at an image that another uses.
pub fn measure(
    format: Format,
    source: &OpenOptions,
    target: &CreateOptions,
    locked: bool,
) -> Result<Measured, BuildError> {
    let mut extents = Extents::open(format, source, locked)?;
    let size = extents.size_bytes();
    let unit = match target.format {
        Format::Raw => 1,
        Format::Qcow2 => 1 << shape_for(target, size)?.cluster_bits,
    };
    let (mut position, mut data, mut counted) = (0, 0, 0);
    while position < size {
        let extent = extents.next(position, size).map_err(|error| {
            BuildError::host(format!("reading {}", source.path.display()), error)
        })?;
        let end = extent.start + extent.length;
        if extent.data {
            // Whole clusters, each once.
            let (first, last) = (position - position % unit, end.next_multiple_of(unit));
            data += last - first.max(counted).min(last);
            counted = last;
        }
        position = end;
    }
    measured(target, size, data)
}

fn measured(target: &CreateOptions, size: u64, data: u64) -> Result<Measured, BuildError> {
    let shape = shape_for(target, size)?;
    let everything = match target.format {
        Format::Raw => size,
        Format::Qcow2 => tables_bytes(&shape).saturating_add(whole_clusters(&shape)),
    };
    let required = match (target.format, target.preallocation) {
        // Whatever is a hole in it, the file is as long.
        (Format::Raw, _) | (_, Preallocation::Falloc | Preallocation::Full) => everything,
        _ => tables_bytes(&shape).saturating_add(data),
    };
    Ok(Measured {
        required,
        fully_allocated: everything,
    })
}

fn whole_clusters(shape: &Shape) -> u64 {
    shape.size_bytes.next_multiple_of(1 << shape.cluster_bits)
}

/// Header, tables and refcounts of an image whose clusters are all in use.
fn tables_bytes(shape: &Shape) -> u64 {
    let cluster = 1_u64 << shape.cluster_bits;
    let data = whole_clusters(shape) / cluster;
    let entry = if shape.extended_l2 { 16 } else { 8 };
    let l2_tables = data.div_ceil(cluster / entry);
    let l1_clusters = (l2_tables * 8).div_ceil(cluster);
    let used = 1 + l2_tables + l1_clusters + data;
    let per_block = (cluster * 8) >> shape.refcount_order;
    let (mut blocks, mut table) = (0_u64, 0_u64);
    loop {
        // Only ever more, and never more than twice what it describes.
        let next_blocks = (used + blocks + table).div_ceil(per_block).max(blocks);
        let next_table = (next_blocks * 8).div_ceil(cluster).max(table);
        if (next_blocks, next_table) == (blocks, table) {
            break;
        }
        (blocks, table) = (next_blocks, next_table);
    }
    (used - data + blocks + table) * cluster
}

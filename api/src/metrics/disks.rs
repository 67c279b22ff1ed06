//! The families of disks: what was promised, what the host has for it, and what is held.

use devices::block::DiskReading;
use devices::disk::space::Place;
use vmm::status::Observation;

use super::page::{Kind, Page};

/// All disks together, and each; nothing where there is none.
pub(super) fn add(page: &mut Page, observation: &Observation) {
    let totals = &observation.view.disks;
    if totals.count == 0 {
        return;
    }
    page.amount(
        "disks_virtual_bytes",
        "What the guest sees of all disks whose images are files.",
        totals.virtual_size,
    );
    page.amount(
        "disks_allocated_bytes",
        "What the host keeps for these files.",
        totals.allocated_size,
    );
    page.amount(
        "disks_unallocated_bytes",
        "What these files may yet come to take.",
        totals.unallocated_size,
    );
    page.amount(
        "disks_host_free_bytes",
        "What is for the taking on their file systems, each counted once.",
        totals.host_free,
    );
    page.one(
        "disks_age_seconds",
        "How old all that is told of disks' space is.",
        &[],
        totals.age_ms as f64 / 1e3,
    );
    each(page, &observation.disks);
}

fn each(page: &mut Page, disks: &[DiskReading]) {
    let mut family = |name, help, kind, value: &dyn Fn(&DiskReading) -> Option<u64>| {
        let samples = disks.iter().filter_map(|disk| {
            let labels = vec![("device", disk.id.clone())];
            Some((labels, value(disk)? as f64))
        });
        page.family(name, help, kind, samples);
    };
    let of_file = |disk: &DiskReading, value: fn(&Place) -> Option<u64>| {
        let place = disk.place.as_ref().ok()?.as_ref()?;
        value(place)
    };
    family(
        "disk_virtual_bytes",
        "What the guest sees of the disk.",
        Kind::Gauge,
        &|disk| Some(disk.virtual_bytes),
    );
    family(
        "disk_allocated_bytes",
        "What the host keeps for the image's file.",
        Kind::Gauge,
        &|disk| of_file(disk, |place| Some(place.file.allocated)),
    );
    family(
        "disk_file_bytes",
        "How long the image's file is.",
        Kind::Gauge,
        &|disk| of_file(disk, |place| Some(place.file.length)),
    );
    family(
        "disk_host_free_bytes",
        "What is for the taking on the file system of the image.",
        Kind::Gauge,
        &|disk| of_file(disk, |place| Some(place.system?.free)),
    );
    family(
        "disk_host_total_bytes",
        "That, and what is in use there.",
        Kind::Gauge,
        &|disk| of_file(disk, |place| Some(place.system?.total)),
    );
    family(
        "disk_held_requests",
        "Writes that are held because the host has no space for them.",
        Kind::Gauge,
        &|disk| Some(disk.held_requests),
    );
    family("disk_held_bytes", "Bytes of these.", Kind::Gauge, &|disk| {
        Some(disk.held_bytes)
    });
    family(
        "disk_cache_lookups_total",
        "Look-ups of where data is, in the tables of a qcow2 image, since that was opened.",
        Kind::Counter,
        &|disk| disk.cache.map(|(_, all)| all),
    );
    family(
        "disk_cache_misses_total",
        "Those of them for which a table had to be read.",
        Kind::Counter,
        &|disk| disk.cache.map(|(hits, all)| all.saturating_sub(hits)),
    );
}

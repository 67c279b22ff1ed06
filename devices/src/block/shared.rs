//! What the registers of a disk (vCPU threads), its control (VMM thread) and its queues' threads
//! share: a few atomics, and the configuration space made of them (virtio 1.3 §5.2.4).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::disk::{Geometry, SECTOR};

/// Sectors one DISCARD may cover (2 GiB): long enough for `fstrim`, short enough that a reset does
/// not wait long.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Sectors one WRITE_ZEROES may cover (256 MiB); they may have to be written.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 19;

/// Offset of `writeback` in the configuration space.
const WRITEBACK: u64 = 32;
/// Size of the configuration space up to and with `write_zeroes_may_unmap`.
const SIZE: usize = 60;

/// See the module.
pub struct Shared {
    /// The features offered.
    pub features: u64,
    capacity_sectors: AtomicU64,
    /// Whether a write may be completed while it is in the host's cache.
    writeback: AtomicBool,
    config_wce: AtomicBool,
    seg_max: u32,
    num_queues: u16,
    geometry: Geometry,
    sparse: bool,
}

/// What the shared half is made from.
pub struct Offer {
    /// Size of the disk.
    pub size_bytes: u64,
    /// Its units.
    pub geometry: Geometry,
    /// Refuse writes.
    pub readonly: bool,
    /// Space may be given back to the host.
    pub sparse: bool,
    /// Number of queues.
    pub num_queues: u16,
    /// Descriptors of each.
    pub queue_size: u16,
}

impl Shared {
    /// The state of a device that no driver has touched.
    pub fn new(offer: &Offer) -> Self {
        let mut features = bit(VIRTIO_BLK_F_SEG_MAX)
            | bit(VIRTIO_BLK_F_BLK_SIZE)
            | bit(VIRTIO_BLK_F_TOPOLOGY)
            | bit(VIRTIO_BLK_F_FLUSH)
            | bit(VIRTIO_BLK_F_CONFIG_WCE);
        if offer.num_queues > 1 {
            features |= bit(VIRTIO_BLK_F_MQ);
        }
        if offer.readonly {
            features |= bit(VIRTIO_BLK_F_RO);
        } else {
            features |= bit(VIRTIO_BLK_F_WRITE_ZEROES);
            if offer.sparse {
                features |= bit(VIRTIO_BLK_F_DISCARD);
            }
        }
        Self {
            features,
            capacity_sectors: AtomicU64::new(offer.size_bytes / SECTOR),
            writeback: AtomicBool::new(true),
            config_wce: AtomicBool::new(false),
            seg_max: seg_max(offer.queue_size),
            num_queues: offer.num_queues,
            geometry: offer.geometry,
            sparse: offer.sparse,
        }
    }

    /// The unit in which the guest uses the disk, in bytes.
    pub fn logical_block(&self) -> u32 {
        self.geometry.logical_block
    }

    /// Size of the disk in sectors.
    pub fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors.load(Ordering::Relaxed)
    }

    /// Says that the disk has grown. The transport sees to it that a driver which reads the
    /// capacity meanwhile notices.
    pub fn set_size(&self, size_bytes: u64) {
        self.capacity_sectors
            .store(size_bytes / SECTOR, Ordering::Relaxed);
    }

    /// Whether writes are refused.
    pub fn readonly(&self) -> bool {
        self.features & bit(VIRTIO_BLK_F_RO) != 0
    }

    /// Whether writes must survive a power cut before they are completed.
    pub fn writethrough(&self) -> bool {
        !self.writeback.load(Ordering::Relaxed)
    }

    /// The driver accepted these features, or 0 on reset (virtio 1.3 §5.2.5.2: with neither
    /// CONFIG_WCE nor FLUSH the driver has no way to flush, so writes go through; with CONFIG_WCE
    /// alone `writeback` starts at 0 as well).
    pub fn features_accepted(&self, features: u64) {
        let flush = features & bit(VIRTIO_BLK_F_FLUSH) != 0;
        let config_wce = features & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0;
        self.config_wce.store(config_wce, Ordering::Relaxed);
        self.writeback
            .store(flush || features == 0, Ordering::Relaxed);
    }

    /// The configuration space as it is now.
    pub fn image(&self) -> [u8; SIZE] {
        let mut image = [0; SIZE];
        let mut put = |offset: usize, bytes: &[u8]| {
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        let logical = self.geometry.logical_block;
        let physical = self.geometry.physical_block.max(logical);
        put(0, &self.capacity_sectors().to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        put(20, &logical.to_le_bytes());
        // Topology: logical blocks per physical one, as an exponent; the alignment offset is 0;
        // the smallest good I/O is a physical block; no opinion on the best.
        put(24, &[(physical / logical).ilog2() as u8]);
        put(26, &((physical / logical) as u16).to_le_bytes());
        put(32, &[u8::from(!self.writethrough())]);
        put(34, &self.num_queues.to_le_bytes());
        if self.features & bit(VIRTIO_BLK_F_DISCARD) != 0 {
            let granularity = self.geometry.discard_granularity.max(logical) / SECTOR as u32;
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &1_u32.to_le_bytes());
            put(44, &granularity.to_le_bytes());
        }
        if self.features & bit(VIRTIO_BLK_F_WRITE_ZEROES) != 0 {
            put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
            put(52, &1_u32.to_le_bytes());
            put(56, &[u8::from(self.sparse)]);
        }
        image
    }

    /// A write to the configuration space: only `writeback` takes one, and only if the driver
    /// has accepted CONFIG_WCE.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let value = WRITEBACK
            .checked_sub(offset)
            .and_then(|at| data.get(usize::try_from(at).ok()?));
        if let Some(value) = value
            && self.config_wce.load(Ordering::Relaxed)
        {
            self.writeback.store(*value != 0, Ordering::Relaxed);
        }
    }
}

/// Data segments per request: what fits a queue beside header and status.
pub fn seg_max(queue_size: u16) -> u32 {
    u32::from(queue_size.saturating_sub(2).max(1))
}

/// The mask of a feature.
pub fn bit(feature: u32) -> u64 {
    1 << feature
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::config_space;

    fn offer() -> Offer {
        Offer {
            size_bytes: 1 << 20,
            geometry: Geometry {
                logical_block: 512,
                physical_block: 4096,
                discard_granularity: 4096,
            },
            readonly: false,
            sparse: true,
            num_queues: 4,
            queue_size: 128,
        }
    }

    fn read<const N: usize>(shared: &Shared, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        config_space::read(&shared.image(), offset, &mut data);
        data
    }

    #[test]
    fn the_configuration_space_has_every_field_in_its_place() {
        let shared = Shared::new(&offer());
        assert_eq!(u64::from_le_bytes(read(&shared, 0)), 2048);
        assert_eq!(u32::from_le_bytes(read(&shared, 12)), 126);
        assert_eq!(u32::from_le_bytes(read(&shared, 20)), 512);
        assert_eq!(read(&shared, 24), [3, 0, 8, 0, 0, 0, 0, 0]);
        assert_eq!(read(&shared, 32), [1]);
        assert_eq!(u16::from_le_bytes(read(&shared, 34)), 4);
        assert_eq!(u32::from_le_bytes(read(&shared, 36)), MAX_DISCARD_SECTORS);
        assert_eq!(u32::from_le_bytes(read(&shared, 40)), 1);
        assert_eq!(u32::from_le_bytes(read(&shared, 44)), 8);
        assert_eq!(
            u32::from_le_bytes(read(&shared, 48)),
            MAX_WRITE_ZEROES_SECTORS
        );
        assert_eq!(read(&shared, 56), [1, 0, 0, 0]);
        assert_eq!(read(&shared, u64::MAX), [0; 8]);
    }

    #[test]
    fn a_disk_that_is_readonly_or_not_sparse_offers_less() {
        let offers = |offer: Offer, feature| Shared::new(&offer).features & bit(feature) != 0;
        let readonly = || Offer {
            readonly: true,
            ..offer()
        };
        assert!(offers(readonly(), VIRTIO_BLK_F_RO));
        assert!(!offers(readonly(), VIRTIO_BLK_F_DISCARD));
        assert!(!offers(readonly(), VIRTIO_BLK_F_WRITE_ZEROES));
        let thick = || Offer {
            sparse: false,
            ..offer()
        };
        assert!(!offers(thick(), VIRTIO_BLK_F_DISCARD));
        assert!(offers(thick(), VIRTIO_BLK_F_WRITE_ZEROES));
        assert_eq!(read(&Shared::new(&thick()), 56), [0]);
    }

    #[test]
    fn the_write_cache_follows_the_features_and_the_driver() {
        let shared = Shared::new(&offer());
        let (flush, wce) = (bit(VIRTIO_BLK_F_FLUSH), bit(VIRTIO_BLK_F_CONFIG_WCE));
        for (features, writethrough) in [(flush, false), (0, false), (1 << 32, true), (wce, true)] {
            shared.features_accepted(features);
            assert_eq!(shared.writethrough(), writethrough, "{features:#x}");
        }
        shared.features_accepted(flush);
        shared.write(32, &[0]);
        assert!(!shared.writethrough(), "CONFIG_WCE was not accepted");
        shared.features_accepted(flush | wce);
        shared.write(32, &[0]);
        assert!(shared.writethrough());
        assert_eq!(read(&shared, 32), [0]);
        shared.write(28, &[0, 0, 0, 0, 1, 0, 0, 0]);
        assert!(!shared.writethrough(), "a wide write covers it too");
        for (offset, len) in [(33, 1), (u64::MAX, 8), (24, 8), (0, 0)] {
            shared.write(offset, &vec![0; len]);
            assert!(!shared.writethrough(), "{offset}");
        }
        shared.write(32, &[0]);
        shared.features_accepted(0);
        assert!(!shared.writethrough(), "a reset restores it");
    }
}

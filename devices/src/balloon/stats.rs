//! What the guest tells of its memory (virtio 1.3 §5.5.6.3): a buffer of tagged values, sent when
//! the device gives the previous one back.
//!
//! All of it is the guest's word. Tags this does not know are skipped: Linux has added some six
//! times.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use utoipa::ToSchema;

/// Known tags.
pub const TAGS: usize = 16;
/// Bytes of a tag (le16) and its value (le64).
const ENTRY: usize = 10;
/// Bytes of a buffer that are looked at: many more tags than there are.
pub const MAX_BYTES: usize = 256 * ENTRY;

/// The tags' names, which are those of [`GuestStatistics`], by number.
pub const NAMES: [&str; TAGS] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kills",
    "alloc_stalls",
    "async_scans",
    "direct_scans",
    "async_reclaims",
    "direct_reclaims",
];

/// What the guest tells of its memory, by Cloud Hypervisor's names. A value that the guest does
/// not send is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct GuestStatistics {
    /// Bytes swapped in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Bytes not used for anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    /// Bytes the guest's kernel manages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    /// Bytes that programs could have without swapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    /// Bytes of files that could be read again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    /// Huge pages allocated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be allocated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    /// Processes killed for lack of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kills: Option<u64>,
    /// Allocations that had to wait for reclaim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alloc_stalls: Option<u64>,
    /// Pages scanned in the background.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_scans: Option<u64>,
    /// Pages scanned by allocations that waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_scans: Option<u64>,
    /// Pages reclaimed in the background.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_reclaims: Option<u64>,
    /// Pages reclaimed by allocations that waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_reclaims: Option<u64>,
}

/// A value and how old it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Sample {
    /// What the guest told.
    pub value: u64,
    /// Milliseconds since then.
    pub age_ms: u64,
}

/// The latest value of each tag and when it came; shared between the worker and who asks.
#[derive(Default)]
pub struct Statistics {
    values: [AtomicU64; TAGS],
    /// Milliseconds of the device's clock, plus one; 0 where none has come.
    times: [AtomicU64; TAGS],
}

impl Statistics {
    /// Takes a buffer of the guest, at `now_ms` of the device's clock.
    pub fn update(&self, buffer: &[u8], now_ms: u64) {
        let (entries, _) = buffer.as_chunks::<ENTRY>();
        for entry in entries {
            let [tag_low, tag_high, value @ ..] = *entry;
            let tag = usize::from(u16::from_le_bytes([tag_low, tag_high]));
            if let (Some(to), Some(time)) = (self.values.get(tag), self.times.get(tag)) {
                to.store(u64::from_le_bytes(value), Ordering::Relaxed);
                time.store(now_ms + 1, Ordering::Relaxed);
            }
        }
    }

    /// Forgets all.
    pub fn clear(&self) {
        for time in &self.times {
            time.store(0, Ordering::Relaxed);
        }
    }

    /// Each value that has come, with its age.
    pub fn samples(&self, now_ms: u64) -> BTreeMap<&'static str, Sample> {
        let all = NAMES.iter().zip(&self.values).zip(&self.times);
        all.filter_map(|((name, value), time)| {
            let came_ms = time.load(Ordering::Relaxed).checked_sub(1)?;
            let sample = Sample {
                value: value.load(Ordering::Relaxed),
                age_ms: now_ms.saturating_sub(came_ms),
            };
            Some((*name, sample))
        })
        .collect()
    }

    /// The latest values, however old.
    pub fn latest(&self) -> GuestStatistics {
        let value = |tag: usize| {
            let came = self.times.get(tag)?.load(Ordering::Relaxed) != 0;
            came.then(|| self.values[tag].load(Ordering::Relaxed))
        };
        GuestStatistics {
            swap_in: value(0),
            swap_out: value(1),
            major_faults: value(2),
            minor_faults: value(3),
            free_memory: value(4),
            total_memory: value(5),
            available_memory: value(6),
            disk_caches: value(7),
            hugetlb_allocations: value(8),
            hugetlb_failures: value(9),
            oom_kills: value(10),
            alloc_stalls: value(11),
            async_scans: value(12),
            direct_scans: value(13),
            async_reclaims: value(14),
            direct_reclaims: value(15),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn every_tag_linux_sends_is_known_and_others_are_skipped() {
        let statistics = Statistics::default();
        let mut buffer: Vec<u8> = (0..16).flat_map(|tag| entry(tag, tag.into())).collect();
        buffer.extend(entry(16, 99));
        buffer.extend(entry(u16::MAX, 99));
        buffer.extend([4, 0, 1]);
        statistics.update(&buffer, 1000);
        let samples = statistics.samples(1250);
        assert_eq!(samples.len(), TAGS);
        for (tag, name) in NAMES.iter().enumerate() {
            let expected = Sample {
                value: tag as u64,
                age_ms: 250,
            };
            assert_eq!(samples[name], expected);
        }
        let latest = serde_json::to_value(statistics.latest()).unwrap();
        for (tag, name) in NAMES.iter().enumerate() {
            assert_eq!(latest[name], tag);
        }
    }

    #[test]
    fn a_value_that_no_longer_comes_grows_old_by_itself() {
        let statistics = Statistics::default();
        statistics.update(&[entry(4, 1), entry(5, 2)].concat(), 0);
        statistics.update(&entry(4, 3), 700);
        let samples = statistics.samples(1000);
        assert_eq!(samples["free_memory"].age_ms, 300);
        assert_eq!(samples["total_memory"].age_ms, 1000);
        assert_eq!(statistics.latest().swap_in, None);
        statistics.clear();
        assert!(statistics.samples(1000).is_empty());
    }
}

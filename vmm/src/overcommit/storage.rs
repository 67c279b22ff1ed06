//! What the disks were promised, and what the host has for them: thin images let a host promise more
//! than it has, as balloons do with memory.
//!
//! Free space is that of file systems, which several images share; each is counted once. They are
//! told apart by `st_dev`: subvolumes of btrfs, which draw on one space, have one each, and differ in
//! `f_fsid` too.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use devices::block::DiskReading;
use serde::Serialize;
use utoipa::ToSchema;

/// How long a reading serves at most, however slow the file systems are.
const MAX_AGE: Duration = Duration::from_secs(60);

/// All disks of a booted VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct DiskTotals {
    /// How many there are.
    pub count: u32,
    /// Bytes that the guest sees of those whose images are files.
    pub virtual_size: u64,
    /// Bytes that the host keeps for these files; what lies below overlays is not in it.
    pub allocated_size: u64,
    /// Bytes that images may yet come to take for what the guest writes, beside their own tables.
    pub unallocated_size: u64,
    /// Bytes of disks on block devices, which are there as a whole and in no other number.
    pub block_device_size: u64,
    /// Bytes for the taking on the file systems of these files, each counted once. A quota may end
    /// sooner.
    pub host_free: u64,
    /// These file systems.
    pub file_systems: Vec<FileSystem>,
    /// Why some disks are in none of the sizes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unavailable: Option<String>,
    /// How old that is.
    pub age_ms: u64,
}

/// A file system with images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = DiskFileSystem)]
pub struct FileSystem {
    /// Ids of the disks whose images are there.
    #[schema(example = json!(["_disk0"]))]
    pub disks: Vec<String>,
    /// Bytes that these may yet come to take.
    pub unallocated_size: u64,
    /// Bytes for the taking. Absent where it does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_free: Option<u64>,
    /// Those, and those in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_total: Option<u64>,
}

impl DiskTotals {
    /// Adds them up.
    pub fn of(seen: &Seen) -> Self {
        let mut totals = Self {
            count: u32::try_from(seen.disks.len()).unwrap_or(u32::MAX),
            age_ms: seen.age_ms,
            ..Self::default()
        };
        let mut systems: BTreeMap<u64, FileSystem> = BTreeMap::new();
        let mut files = BTreeSet::new();
        for disk in &seen.disks {
            let place = match &disk.place {
                Ok(Some(place)) => place,
                Ok(None) => {
                    add(&mut totals.block_device_size, disk.virtual_bytes);
                    continue;
                }
                Err(reason) => {
                    totals.unavailable.get_or_insert_with(|| reason.clone());
                    continue;
                }
            };
            add(&mut totals.virtual_size, disk.virtual_bytes);
            // Several disks may read one file.
            if files.insert((place.device, place.inode)) {
                add(&mut totals.allocated_size, place.file.allocated);
            }
            let system = systems.entry(place.device).or_default();
            if disk.writable {
                let more = disk.virtual_bytes.saturating_sub(place.file.allocated);
                add(&mut totals.unallocated_size, more);
                add(&mut system.unallocated_size, more);
            }
            system.disks.push(disk.id.clone());
            system.host_free = place.system.map(|space| space.free);
            system.host_total = place.system.map(|space| space.total);
        }
        for system in systems.values() {
            add(&mut totals.host_free, system.host_free.unwrap_or_default());
        }
        totals.file_systems = systems.into_values().collect();
        totals
    }
}

fn add(sum: &mut u64, more: u64) {
    *sum = sum.saturating_add(more);
}

/// Disks, and how long ago they were looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Each of them.
    pub disks: Vec<DiskReading>,
    /// Milliseconds.
    pub age_ms: u64,
}

/// The last look, which is taken again when somebody asks, but not so often that it takes more than
/// a twentieth of the thread's time: a file system may be far away.
#[derive(Debug, Default)]
pub struct Cached {
    last: Option<(Instant, Duration, Vec<DiskReading>)>,
}

impl Cached {
    /// The disks with these `ids`; `read` is called when the last look is too old or was at others,
    /// and says how long it took.
    pub fn get<'a>(
        &mut self,
        now: Instant,
        ids: impl Iterator<Item = &'a str>,
        read: impl FnOnce() -> (Vec<DiskReading>, Duration),
    ) -> Seen {
        if let Some((at, took, disks)) = &self.last {
            let age = now.saturating_duration_since(*at);
            let same = disks.iter().map(|disk| disk.id.as_str()).eq(ids);
            if same && age < took.saturating_mul(20).min(MAX_AGE) {
                return Seen {
                    disks: disks.clone(),
                    age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
                };
            }
        }
        let (disks, took) = read();
        self.last = Some((now, took, disks.clone()));
        Seen { disks, age_ms: 0 }
    }

    /// Forgets it: the VM is not what it was.
    pub fn clear(&mut self) {
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use devices::disk::space::{FileSpace, FileSystemSpace, Place};

    use super::*;

    fn disk(id: &str, virtual_bytes: u64, place: Option<(u64, u64, u64)>) -> DiskReading {
        DiskReading {
            id: id.to_owned(),
            writable: true,
            virtual_bytes,
            place: Ok(place.map(|(device, inode, allocated)| Place {
                device,
                inode,
                file: FileSpace {
                    length: allocated,
                    allocated,
                },
                system: Some(FileSystemSpace {
                    free: 1000 * device,
                    total: 5000,
                }),
            })),
            held_requests: 0,
            held_bytes: 0,
            cache: None,
        }
    }

    #[test]
    fn a_file_system_and_a_file_count_once_however_many_disks_are_there() {
        let mut readers = [
            disk("b", 100, Some((1, 7, 40))),
            disk("c", 100, Some((1, 7, 40))),
        ];
        readers.iter_mut().for_each(|disk| disk.writable = false);
        let mut broken = disk("e", 1 << 40, None);
        broken.place = Err("EIO".to_owned());
        let mut disks = vec![disk("a", 500, Some((1, 6, 200)))];
        disks.extend(readers);
        disks.push(disk("d", 50, Some((2, 6, 80))));
        disks.push(disk("f", 9, None));
        disks.push(broken);
        let totals = DiskTotals::of(&Seen { disks, age_ms: 3 });
        assert_eq!((totals.count, totals.age_ms), (6, 3));
        assert_eq!(totals.virtual_size, 750);
        assert_eq!(totals.allocated_size, 320);
        // What has more than the disk, as tables, is owed nothing.
        assert_eq!(totals.unallocated_size, 300);
        assert_eq!(totals.block_device_size, 9);
        assert_eq!(totals.host_free, 3000);
        assert_eq!(totals.unavailable.as_deref(), Some("EIO"));
        let [first, second] = &totals.file_systems[..] else {
            panic!("{totals:?}");
        };
        assert_eq!(first.disks, ["a", "b", "c"]);
        assert_eq!((first.unallocated_size, first.host_free), (300, Some(1000)));
        assert_eq!((second.unallocated_size, second.host_free), (0, Some(2000)));
    }

    #[test]
    fn numbers_that_are_too_large_do_not_overflow() {
        let disks = vec![
            disk("a", u64::MAX, Some((1, 1, 1))),
            disk("b", u64::MAX, Some((1, 2, u64::MAX))),
        ];
        let totals = DiskTotals::of(&Seen { disks, age_ms: 0 });
        assert_eq!(totals.virtual_size, u64::MAX);
        assert_eq!(totals.allocated_size, u64::MAX);
    }

    #[test]
    fn slow_file_systems_are_asked_for_a_twentieth_of_the_time_at_most() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut cached = Cached::default();
        let mut get_of = |now, took_ms, id: &str| {
            let mut asked = false;
            let seen = cached.get(now, [id].into_iter(), || {
                asked = true;
                (vec![disk(id, 1, None)], Duration::from_millis(took_ms))
            });
            assert_eq!(seen.disks[0].id, id);
            (asked, seen.age_ms)
        };
        let mut get = |now, took_ms| get_of(now, took_ms, "a");
        assert_eq!(get(at(0), 50), (true, 0));
        assert_eq!(get(at(999), 50), (false, 999));
        assert_eq!(get(at(1000), 0), (true, 0));
        assert_eq!(get(at(1000), 100_000), (true, 0), "it was fast");
        assert_eq!(get(at(60_999), 0), (false, 59_999));
        assert_eq!(get(at(61_000), 100_000), (true, 0), "not for ever");
        assert_eq!(get_of(at(61_001), 0, "b"), (true, 0), "another disk");
    }
}

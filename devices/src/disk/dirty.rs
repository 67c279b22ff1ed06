//! Which parts of a disk have been changed since somebody looked at them, while somebody wants to
//! know.
//!
//! A part is noted when what changes it has ended, before that is told. So whoever takes a part out
//! and *then* reads it misses nothing: what has ended by then is read, and what has not is noted
//! again. Used by the disk's queue and by a job's thread; what is locked is never waited for.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::Operation;

/// What a bit stands for, unless the disk is so large that there would be too many.
const UNIT_BITS: u32 = 16;
/// The most bits: 64 MiB.
const MAX_BITS: u64 = 1 << 29;

/// See the module.
#[derive(Default)]
pub struct DirtyMap {
    /// Whether there is a map: looked at for every request.
    on: AtomicBool,
    map: Mutex<Option<Map>>,
}

struct Map {
    unit_bits: u32,
    size_bytes: u64,
    words: Vec<u64>,
    /// Bits that are set.
    count: u64,
}

impl DirtyMap {
    fn map(&self) -> MutexGuard<'_, Option<Map>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on what changes on a disk of this size is noted, until the result is dropped. EBUSY
    /// if it is already.
    pub fn track(self: &Arc<Self>, size_bytes: u64) -> io::Result<Tracking> {
        let mut unit_bits = UNIT_BITS;
        while size_bytes >> unit_bits >= MAX_BITS {
            unit_bits += 1;
        }
        let bits = (size_bytes >> unit_bits) + 1;
        let len = usize::try_from(bits.div_ceil(64)).map_err(|_| Errno::NOMEM)?;
        let mut map = self.map();
        if map.is_some() {
            return Err(Errno::BUSY.into());
        }
        let mut words = Vec::new();
        words.try_reserve_exact(len).map_err(|_| Errno::NOMEM)?;
        words.resize(len, 0);
        *map = Some(Map {
            unit_bits,
            size_bytes,
            words,
            count: 0,
        });
        self.on.store(true, Ordering::SeqCst);
        Ok(Tracking(self.clone()))
    }

    /// Something that may change a range; noted when the result is dropped.
    pub fn change(&self, operation: Operation, offset: u64, length: u64) -> Change<'_> {
        let length = match operation {
            Operation::Read | Operation::Flush => 0,
            Operation::Write { .. } | Operation::WriteZeroes { .. } | Operation::Discard => length,
        };
        Change {
            map: self,
            offset,
            length,
        }
    }

    fn note(&self, offset: u64, length: u64) {
        if length == 0 || !self.on.load(Ordering::SeqCst) {
            return;
        }
        if let Some(map) = &mut *self.map() {
            let last = offset.saturating_add(length - 1) >> map.unit_bits;
            for unit in offset >> map.unit_bits..=last {
                let Some(word) = map.words.get_mut((unit / 64) as usize) else {
                    return;
                };
                let bit = 1 << (unit % 64);
                map.count += u64::from(*word & bit == 0);
                *word |= bit;
            }
        }
    }
}

/// See [`DirtyMap::change`].
pub struct Change<'a> {
    map: &'a DirtyMap,
    offset: u64,
    length: u64,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.map.note(self.offset, self.length);
    }
}

/// Changes are noted for as long as this lives.
pub struct Tracking(Arc<DirtyMap>);

impl Tracking {
    /// About how many bytes have changed.
    pub fn bytes(&self) -> u64 {
        let map = self.0.map();
        map.as_ref().map_or(0, |map| map.count << map.unit_bits)
    }

    /// Takes out the first range that has changed at or behind `from`, which is 0 or where one that
    /// was taken out ended, of about `most` bytes at most: where it begins and ends.
    pub fn take(&self, from: u64, most: u64) -> Option<(u64, u64)> {
        let mut map = self.0.map();
        let map = map.as_mut()?;
        // Where the disk ends within a unit, that is one which was taken out already.
        let first = map.first_at(from.div_ceil(1 << map.unit_bits))?;
        let units = (most >> map.unit_bits).max(1);
        let mut end = first;
        while end < first + units && map.clear(end) {
            end += 1;
        }
        let end = (end << map.unit_bits).min(map.size_bytes);
        Some((first << map.unit_bits, end))
    }
}

impl Map {
    fn first_at(&self, from: u64) -> Option<u64> {
        let (first, skip) = ((from / 64) as usize, from % 64);
        let words = self.words.iter().copied().enumerate().skip(first);
        for (index, mut word) in words {
            if index == first {
                word &= u64::MAX << skip;
            }
            if word != 0 {
                return Some(index as u64 * 64 + u64::from(word.trailing_zeros()));
            }
        }
        None
    }

    /// Whether it was set.
    fn clear(&mut self, unit: u64) -> bool {
        let Some(word) = self.words.get_mut((unit / 64) as usize) else {
            return false;
        };
        let bit = 1 << (unit % 64);
        let was = *word & bit != 0;
        *word &= !bit;
        self.count -= u64::from(was);
        was
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        self.0.on.store(false, Ordering::SeqCst);
        *self.0.map() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: Operation = Operation::Write { durable: false };

    fn all(tracking: &Tracking, most: u64) -> Vec<(u64, u64)> {
        let mut from = 0;
        std::iter::from_fn(|| {
            let range = tracking.take(from, most)?;
            from = range.1;
            Some(range)
        })
        .collect()
    }

    #[test]
    fn what_changes_is_noted_at_its_end_and_taken_out_once() {
        let map = Arc::new(DirtyMap::default());
        drop(map.change(WRITE, 0, 512));
        let tracking = map.track(10 << 20).unwrap();
        assert_eq!(tracking.bytes(), 0);
        assert!(map.track(512).is_err(), "it is tracked already");
        let change = map.change(WRITE, 65_535, 2);
        assert_eq!(tracking.bytes(), 0);
        drop(change);
        assert_eq!(tracking.bytes(), 2 << 16);
        for operation in [Operation::Read, Operation::Flush] {
            drop(map.change(operation, 5 << 20, 4096));
        }
        drop(map.change(Operation::Discard, (10 << 20) - 512, 512));
        let zeroes = Operation::WriteZeroes {
            unmap: true,
            durable: false,
        };
        drop(map.change(zeroes, 2 << 20, 5 << 20));
        assert_eq!(
            all(&tracking, 4 << 20),
            [
                (0, 2 << 16),
                (2 << 20, 6 << 20),
                (6 << 20, 7 << 20),
                ((10 << 20) - 65_536, 10 << 20)
            ]
        );
        assert_eq!((tracking.bytes(), tracking.take(0, 1)), (0, None));
        drop(map.change(WRITE, 0, 1));
        assert_eq!(tracking.take(65_536, 1), None);
        drop(tracking);
        drop(map.change(WRITE, 0, 512));
        assert_eq!(map.track(512).unwrap().bytes(), 0);
    }

    #[test]
    fn a_disk_of_any_size_has_a_map_that_ends_with_it() {
        let map = Arc::new(DirtyMap::default());
        for size in [512, 65_536, 65_537 << 9, 1 << 40] {
            let tracking = map.track(size).unwrap();
            drop(map.change(WRITE, size - 512, 512));
            let (start, end) = tracking.take(0, u64::MAX).unwrap();
            assert!(start < size && end == size, "{size}");
            // Changed once more, it is for the next round.
            drop(map.change(WRITE, size - 512, 512));
            assert_eq!(tracking.take(end, u64::MAX), None, "{size}");
            assert_eq!(tracking.take(0, u64::MAX), Some((start, end)));
            // What is beyond the end changes nothing.
            drop(map.change(WRITE, u64::MAX - 512, u64::MAX));
            assert_eq!(tracking.bytes(), 0);
        }
        let tracking = map.track(1 << 60).unwrap();
        drop(map.change(WRITE, (1 << 60) - 512, 512));
        let words = map.map().as_ref().unwrap().words.len();
        assert!(words <= 1 << 23, "{words}");
        assert_eq!(tracking.take(0, 1).unwrap().1, 1 << 60);
    }
}

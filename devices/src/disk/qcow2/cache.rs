//! The L2 slices that were read last, of all images of a chain: a bounded number, looked up in
//! constant time, evicted by the CLOCK rule.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Names a slice: the layer, and where it stands in that layer's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SliceKey {
    /// Index of the image in its chain.
    pub layer: u16,
    /// Offset in the image file.
    pub offset: u64,
}

struct Entry {
    key: SliceKey,
    bytes: Box<[u8]>,
    /// Looked up since the hand last came by.
    used: bool,
}

/// How often the slices in memory were asked where data is, and how often one had to be read for it.
/// Any thread may count and ask.
#[derive(Debug, Default)]
pub struct Lookups {
    answered: AtomicU64,
    missed: AtomicU64,
}

impl Lookups {
    /// So many slices have been looked at, and the question is answered.
    pub fn answered(&self, slices: u64) {
        self.answered.fetch_add(slices, Relaxed);
    }

    /// A slice was not there; the same question will be put again.
    pub fn missed(&self) {
        self.missed.fetch_add(1, Relaxed);
    }

    /// Look-ups so far: those for which nothing had to be read, and all.
    pub fn counts(&self) -> (u64, u64) {
        let missed = self.missed.load(Relaxed);
        let all = self.answered.load(Relaxed);
        (all.saturating_sub(missed), all)
    }
}

/// See the module.
pub struct SliceCache {
    entries: Vec<Entry>,
    index: HashMap<SliceKey, usize>,
    hand: usize,
    capacity: usize,
}

impl SliceCache {
    /// One that holds up to `capacity` slices (at least one).
    pub fn new(capacity: usize) -> Self {
        Self {
            entries: Vec::new(),
            index: HashMap::new(),
            hand: 0,
            capacity: capacity.max(1),
        }
    }

    /// A slice, if it is here.
    pub fn get(&mut self, key: SliceKey) -> Option<&[u8]> {
        let entry = self.entries.get_mut(*self.index.get(&key)?)?;
        entry.used = true;
        Some(&entry.bytes)
    }

    /// Takes in a slice, in place of one that was not used lately.
    pub fn insert(&mut self, key: SliceKey, bytes: Box<[u8]>) {
        // Another thread may have read it at the same time.
        if self.index.contains_key(&key) {
            return;
        }
        let entry = Entry {
            key,
            bytes,
            used: true,
        };
        if self.entries.len() < self.capacity {
            self.index.insert(key, self.entries.len());
            self.entries.push(entry);
            return;
        }
        while std::mem::take(&mut self.entries[self.hand].used) {
            self.advance();
        }
        self.index.remove(&self.entries[self.hand].key);
        self.index.insert(key, self.hand);
        self.entries[self.hand] = entry;
        self.advance();
    }

    fn advance(&mut self) {
        self.hand = (self.hand + 1) % self.entries.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(offset: u64) -> SliceKey {
        SliceKey { layer: 0, offset }
    }

    #[test]
    fn what_was_used_outlives_what_was_not() {
        let mut cache = SliceCache::new(3);
        for offset in 0..3 {
            cache.insert(key(offset), Box::new([offset as u8]));
        }
        cache.insert(key(3), Box::new([3]));
        assert_eq!(cache.get(key(0)), None, "all were used, the first went");
        assert_eq!(cache.get(key(1)), Some(&[1_u8][..]));
        cache.insert(key(4), Box::new([4]));
        assert_eq!(cache.get(key(2)), None);
        for offset in [1, 3, 4] {
            assert_eq!(cache.get(key(offset)), Some(&[offset as u8][..]));
        }
    }

    #[test]
    fn the_cache_stays_bounded_and_a_slice_is_there_once() {
        let mut cache = SliceCache::new(8);
        for offset in 0..1000 {
            cache.insert(key(offset % 50), Box::new([(offset % 50) as u8]));
            assert_eq!(cache.entries.len(), cache.index.len());
            assert!(cache.entries.len() <= 8);
            assert_eq!(
                cache.get(key(offset % 50)),
                Some(&[(offset % 50) as u8][..])
            );
        }
    }
}

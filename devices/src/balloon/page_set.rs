//! A set of guest pages, with a bitmap for each 2 MiB that has any of them. Pure.
//!
//! What goes in must be RAM: then the set is never larger than some 40 bytes for each MiB of that.

use std::collections::BTreeMap;
use std::ops::Range;

use super::pages::PAGE;
use super::partial::{for_each_word, parts};
use super::pending::runs;

/// Bytes that share a bitmap.
pub const BLOCK: u64 = 2 << 20;
/// Words of a bitmap.
pub const WORDS: usize = (BLOCK / PAGE / 64) as usize;

/// See the module.
#[derive(Default)]
pub struct PageSet {
    blocks: BTreeMap<u64, [u64; WORDS]>,
    count: u64,
}

impl PageSet {
    /// Adds the pages of `ranges`.
    pub fn insert(&mut self, ranges: &[Range<u64>]) {
        let parts = ranges.iter().flat_map(|range| parts(BLOCK, range));
        let mut parts = parts.peekable();
        while let Some((index, part)) = parts.next() {
            let block = self.blocks.entry(index).or_default();
            self.count += u64::from(set(block, &part));
            // Where every other page is one of them, a block is looked up once.
            while let Some((_, part)) = parts.next_if(|next| next.0 == index) {
                self.count += u64::from(set(block, &part));
            }
        }
    }

    /// Takes the pages of `ranges` out.
    pub fn remove(&mut self, ranges: &[Range<u64>]) {
        if self.is_empty() {
            return;
        }
        for (index, part) in ranges.iter().flat_map(|range| parts(BLOCK, range)) {
            let Some(block) = self.blocks.get_mut(&index) else {
                continue;
            };
            for_each_word(BLOCK, &part, |word, mask| {
                if let Some(word) = block.get_mut(word) {
                    self.count -= u64::from((mask & *word).count_ones());
                    *word &= !mask;
                }
            });
            if block.iter().all(|word| *word == 0) {
                self.blocks.remove(&index);
            }
        }
    }

    /// Moves the pages of the first `most` blocks to `ranges`, which ascend and do not touch; of more
    /// blocks where pages of the host, of `host_page` bytes, would be torn.
    pub fn take(&mut self, most: usize, host_page: u64, ranges: &mut Vec<Range<u64>>) {
        ranges.clear();
        let (mut taken, mut last) = (0, None);
        while let Some(entry) = self.blocks.first_entry() {
            let within = Some(entry.key() * BLOCK / host_page);
            if taken >= most && within != last {
                return;
            }
            (taken, last) = (taken + 1, within);
            let (index, block) = entry.remove_entry();
            let pages = block.iter().map(|word| u64::from(word.count_ones()));
            self.count -= pages.sum::<u64>();
            runs(index * BLOCK, &block, ranges);
        }
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        self.count * PAGE
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

/// Sets the bits of a part of a block; says how many were not set before.
fn set(block: &mut [u64; WORDS], part: &Range<u64>) -> u32 {
    let mut new = 0;
    for_each_word(BLOCK, part, |word, mask| {
        if let Some(word) = block.get_mut(word) {
            new += (mask & !*word).count_ones();
            *word |= mask;
        }
    });
    new
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_is_taken_in_pieces_of_bounded_size() {
        let mut set = PageSet::default();
        set.insert(&[0..PAGE, BLOCK - PAGE..BLOCK + PAGE, 9 * BLOCK..10 * BLOCK]);
        let mut ranges = vec![0..1, 7..8];
        set.take(2, PAGE, &mut ranges);
        assert_eq!(ranges, [0..PAGE, BLOCK - PAGE..BLOCK + PAGE]);
        assert_eq!((set.bytes(), set.is_empty()), (BLOCK, false));
        set.take(2, PAGE, &mut ranges);
        assert_eq!(ranges.len(), 1);
        assert_eq!((set.bytes(), set.is_empty()), (0, true));
    }

    #[test]
    fn a_page_of_the_host_is_taken_whole_however_large_it_is() {
        let gib = 1 << 30;
        let mut set = PageSet::default();
        set.insert(&[PAGE..2 * PAGE, gib..3 * gib]);
        let mut ranges = Vec::new();
        set.take(32, gib, &mut ranges);
        assert_eq!(ranges, [PAGE..2 * PAGE, gib..2 * gib]);
        set.take(32, gib, &mut ranges);
        assert_eq!(ranges.len(), 1);
        assert!(set.is_empty());
    }

    proptest! {
        #[test]
        fn it_has_what_went_in_and_did_not_come_out(
            steps in prop::collection::vec((0u8..6, 0u64..1536, 1u64..700), 0..60)
        ) {
            let mut set = PageSet::default();
            let mut model = BTreeSet::new();
            for (kind, start, len) in steps {
                let range = start * PAGE..(start + len) * PAGE;
                match kind {
                    0..3 => {
                        let far = (start + 4096) * PAGE..(start + 4096 + len) * PAGE;
                        model.extend((start..start + len).chain(start + 4096..start + 4096 + len));
                        set.insert(&[range, far]);
                    }
                    3..5 => {
                        model.retain(|page| !(start..start + len).contains(page));
                        set.remove(&[range]);
                    }
                    _ => {
                        let mut ranges = Vec::new();
                        set.take(1, PAGE, &mut ranges);
                        prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
                        for page in ranges.iter().flat_map(|r| r.start / PAGE..r.end / PAGE) {
                            prop_assert!(model.remove(&page));
                        }
                    }
                }
                prop_assert_eq!(set.bytes(), model.len() as u64 * PAGE);
                prop_assert_eq!(set.is_empty(), model.is_empty());
            }
        }
    }
}

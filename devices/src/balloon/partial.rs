//! Which huge pages of the host the balloon covers in whole. Pure.
//!
//! A guest balloons pages of 4 KiB; where its memory is made of huge pages of hugetlb, one of
//! those can be given back only when the balloon has all of it. So each huge page that the
//! balloon has touched has a bitmap, and no number of them in between makes one forgotten.
//!
//! The bitmap of a page counts on being told when a part of it leaves the balloon *before* it is
//! used: without VIRTIO_BALLOON_F_MUST_TELL_HOST it must not be kept.

use std::collections::BTreeMap;
use std::ops::Range;

use super::pages::PAGE;

/// Bytes of bitmaps kept at most, which is enough for 512 GiB of guest RAM.
const BUDGET: usize = 16 << 20;

/// The huge pages that the balloon has a part of.
pub struct Partials {
    huge: u64,
    pages: BTreeMap<u64, Box<[u64]>>,
    most: usize,
}

impl Partials {
    /// For huge pages of `huge` bytes, a multiple of 64 times 4 KiB.
    pub fn new(huge: u64) -> Self {
        let bitmap = (huge / PAGE / 8).max(1) as usize;
        Self {
            huge,
            pages: BTreeMap::new(),
            most: BUDGET / bitmap,
        }
    }

    /// `ranges` have come into the balloon. Replaces them by the huge pages that have thereby
    /// become whole; says how many bytes are left, waiting for the rest of their huge page.
    pub fn inflate(&mut self, ranges: &mut Vec<Range<u64>>) -> u64 {
        let mut whole: Vec<Range<u64>> = Vec::new();
        let mut waiting = 0;
        for range in ranges.iter() {
            for (huge, part) in parts(self.huge, range) {
                if self.pages.len() >= self.most && !self.pages.contains_key(&huge) {
                    // As if it were the last of it, if it is all of it.
                    if part.end - part.start == self.huge {
                        join(&mut whole, part);
                    } else {
                        waiting += part.end - part.start;
                    }
                    continue;
                }
                let words = (self.huge / PAGE / 64) as usize;
                let bits = self
                    .pages
                    .entry(huge)
                    .or_insert_with(|| vec![0; words].into_boxed_slice());
                for_each_word(self.huge, &part, |index, mask| {
                    if let Some(word) = bits.get_mut(index) {
                        *word |= mask;
                    }
                });
                if bits.iter().all(|word| *word == u64::MAX) {
                    let start = huge * self.huge;
                    join(&mut whole, start..start + self.huge);
                } else {
                    waiting += part.end - part.start;
                }
            }
        }
        *ranges = whole;
        waiting
    }

    /// `ranges` have left the balloon.
    pub fn deflate(&mut self, ranges: &[Range<u64>]) {
        for range in ranges {
            for (huge, part) in parts(self.huge, range) {
                let Some(bits) = self.pages.get_mut(&huge) else {
                    continue;
                };
                for_each_word(self.huge, &part, |index, mask| {
                    if let Some(word) = bits.get_mut(index) {
                        *word &= !mask;
                    }
                });
                if bits.iter().all(|word| *word == 0) {
                    self.pages.remove(&huge);
                }
            }
        }
    }
}

/// The parts of a range by huge page.
pub(super) fn parts(huge: u64, range: &Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> {
    let end = range.end;
    let mut start = range.start;
    std::iter::from_fn(move || {
        (start < end).then(|| {
            let index = start / huge;
            let part = start..end.min((index + 1) * huge);
            start = part.end;
            (index, part)
        })
    })
}

/// The words of a huge page's bitmap that a part of it falls into, with the bits.
pub(super) fn for_each_word(huge: u64, part: &Range<u64>, mut then: impl FnMut(usize, u64)) {
    let first = part.start % huge / PAGE;
    let end = first + (part.end - part.start) / PAGE;
    let mut bit = first;
    while bit < end {
        let count = (64 - bit % 64).min(end - bit);
        let mask = (u64::MAX >> (64 - count)) << (bit % 64);
        then((bit / 64) as usize, mask);
        bit += count;
    }
}

fn join(ranges: &mut Vec<Range<u64>>, next: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        // Two pieces of one huge page, which was whole with the first.
        Some(last) if last.end >= next.end => {}
        _ => ranges.push(next),
    }
}

#[cfg(test)]
mod tests {
    #![expect(
        clippy::single_range_in_vec_init,
        reason = "lists of ranges are what is tested"
    )]

    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const HUGE: u64 = 2 << 20;

    fn inflate(partials: &mut Partials, range: Range<u64>) -> (Vec<Range<u64>>, u64) {
        let mut ranges = vec![range];
        let waiting = partials.inflate(&mut ranges);
        (ranges, waiting)
    }

    #[test]
    fn a_huge_page_is_whole_when_its_last_piece_comes_whatever_came_in_between() {
        let mut partials = Partials::new(HUGE);
        let half = HUGE / 2;
        for index in 0..100 {
            let start = index * HUGE;
            assert_eq!(
                inflate(&mut partials, start..start + half),
                (vec![], half),
                "{index}"
            );
        }
        let mut rest: Vec<_> = (0..100).map(|i| i * HUGE + half..(i + 1) * HUGE).collect();
        assert_eq!(partials.inflate(&mut rest), 0);
        assert_eq!(rest, [0..100 * HUGE]);
    }

    #[test]
    fn a_piece_that_left_in_between_is_missing() {
        let mut partials = Partials::new(HUGE);
        inflate(&mut partials, 0..HUGE - PAGE);
        partials.deflate(&[0..PAGE]);
        assert_eq!(inflate(&mut partials, HUGE - PAGE..HUGE), (vec![], PAGE));
        assert_eq!(inflate(&mut partials, 0..PAGE), (vec![0..HUGE], 0));
        // And a page that was whole, lost a piece and gets it back is whole again.
        partials.deflate(&[PAGE..2 * PAGE]);
        assert_eq!(inflate(&mut partials, PAGE..2 * PAGE), (vec![0..HUGE], 0));
        partials.deflate(&[0..HUGE]);
        assert!(partials.pages.is_empty());
    }

    #[test]
    fn beyond_the_budget_whole_pages_still_go_and_parts_wait() {
        let mut partials = Partials::new(HUGE);
        partials.most = 1;
        inflate(&mut partials, 0..PAGE);
        assert_eq!(
            inflate(&mut partials, HUGE..3 * HUGE + PAGE),
            (vec![HUGE..3 * HUGE], PAGE)
        );
        assert_eq!(partials.pages.len(), 1);
    }

    proptest! {
        #[test]
        fn what_is_given_back_is_in_the_balloon_as_a_whole(
            steps in prop::collection::vec((any::<bool>(), 0u64..16, 1u64..12), 0..60)
        ) {
            // Pages of 64 small ones would take long to fill by chance: pieces of eight.
            let piece = PAGE * 8;
            let huge = PAGE * 64;
            let mut partials = Partials::new(huge);
            let mut ballooned = BTreeSet::new();
            for (into, start, len) in steps {
                let range = start * piece..(start + len) * piece;
                if into {
                    ballooned.extend(start..start + len);
                    let (whole, _) = inflate(&mut partials, range);
                    for page in whole.iter().flat_map(|w| w.start / piece..w.end / piece) {
                        prop_assert!(ballooned.contains(&page));
                    }
                    for first in (0..32).step_by(8) {
                        let full = (first..first + 8).all(|page| ballooned.contains(&page));
                        let touched = first < start + len && start < first + 8;
                        let address = first * piece;
                        let given = whole.iter().any(|w| w.contains(&address));
                        prop_assert_eq!(given, full && touched);
                    }
                } else {
                    for page in start..start + len {
                        ballooned.remove(&page);
                    }
                    partials.deflate(&[range]);
                }
            }
        }
    }
}

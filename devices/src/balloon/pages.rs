//! From the page numbers of inflate requests to as few ranges of addresses as possible. Pure.
//!
//! Linux sends at most 256 numbers a request, of pages it allocated one by one: mostly runs, in
//! either direction. Numbers are 32 bits in units of 4 KiB, whatever the guest's page size
//! (virtio 1.3 §5.5.6), so what lies beyond 16 TiB can't be named.

use std::ops::Range;

/// Bytes of the pages that are numbered.
pub const PAGE: u64 = 4096;
/// The most bytes of guest RAM that page numbers reach.
pub const REACH: u64 = PAGE << 32;

/// Page numbers gathered from one or more requests.
#[derive(Default)]
pub struct Pages {
    numbers: Vec<u32>,
}

impl Pages {
    /// Adds numbers as they lie in the guest's memory, little-endian; a last piece of less than
    /// four bytes is none.
    pub fn extend_from_bytes(&mut self, bytes: &[u8]) {
        let (numbers, _) = bytes.as_chunks::<4>();
        self.numbers
            .extend(numbers.iter().map(|number| u32::from_le_bytes(*number)));
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Forgets them.
    pub fn clear(&mut self) {
        self.numbers.clear();
    }

    /// Turns the numbers into ascending ranges of addresses that neither touch nor overlap, and
    /// forgets the numbers.
    pub fn drain_into(&mut self, ranges: &mut Vec<Range<u64>>) {
        // Runs in either direction are found by the sort in one pass.
        self.numbers.sort_unstable();
        ranges.clear();
        for number in self.numbers.drain(..) {
            let start = u64::from(number) * PAGE;
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end += PAGE,
                // The same page twice.
                Some(last) if last.end > start => {}
                _ => ranges.push(start..start + PAGE),
            }
        }
    }
}

/// The same for ranges: sorts them and merges those that touch or overlap.
pub fn merge(ranges: &mut Vec<Range<u64>>) {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let joins = next.start <= last.end;
        if joins {
            last.end = last.end.max(next.end);
        }
        joins
    });
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

    fn ranges(numbers: &[u32]) -> Vec<Range<u64>> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        let mut pages = Pages::default();
        pages.extend_from_bytes(&bytes);
        assert_eq!(pages.len(), numbers.len());
        let mut ranges = Vec::new();
        pages.drain_into(&mut ranges);
        assert_eq!(pages.len(), 0);
        ranges
    }

    fn numbers(ranges: &[Range<u64>]) -> Vec<u32> {
        let pages = ranges
            .iter()
            .flat_map(|r| (r.start / PAGE)..(r.end / PAGE))
            .map(|page| u32::try_from(page).unwrap());
        pages.collect()
    }

    #[test]
    fn runs_in_either_direction_and_repeated_pages_make_one_range() {
        assert_eq!(ranges(&[]), []);
        assert_eq!(ranges(&[3, 4, 5]), [0x3000..0x6000]);
        assert_eq!(ranges(&[5, 4, 3, 4]), [0x3000..0x6000]);
        assert_eq!(ranges(&[1, 3]), [0x1000..0x2000, 0x3000..0x4000]);
        assert_eq!(ranges(&[u32::MAX]), [REACH - PAGE..REACH]);
    }

    #[test]
    fn a_torn_number_is_none() {
        let mut pages = Pages::default();
        pages.extend_from_bytes(&[1, 0, 0, 0, 9, 9, 9]);
        assert_eq!(pages.len(), 1);
    }

    proptest! {
        #[test]
        fn the_ranges_are_just_the_pages_and_as_few_as_can_be(
            some in prop::collection::vec(prop_oneof![0u32..64, any::<u32>()], 0..300)
        ) {
            let ranges = ranges(&some);
            let expected: Vec<u32> = BTreeSet::from_iter(some).into_iter().collect();
            prop_assert_eq!(numbers(&ranges), expected);
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
        }

        #[test]
        fn merged_ranges_cover_the_same_and_do_not_touch(
            some in prop::collection::vec((0u64..64, 1u64..8), 0..30)
        ) {
            let mut ranges: Vec<_> = some.iter().map(|(s, l)| s * PAGE..(s + l) * PAGE).collect();
            let expected = BTreeSet::from_iter(numbers(&ranges));
            merge(&mut ranges);
            prop_assert_eq!(numbers(&ranges), expected.into_iter().collect::<Vec<_>>());
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
        }
    }
}

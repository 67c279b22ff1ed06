//! Pages in the balloon that are not discarded yet, because their neighbours may follow. Pure.
//!
//! Linux sends 1 MiB at a time, where a transparent huge page has 2 MiB. To drop a part of one
//! takes it apart: the part stays with the host until all of it is gone, its mappings are made
//! anew page by page, and for all of that the guest's processors are interrupted. So pages are
//! remembered by the 2 MiB they lie in, for many of those at once, and go when they are whole;
//! what does not become whole goes after a while, when the guest has reached its target, when it
//! is paused, or when there are too many.
//!
//! Only for drivers that tell of pages before they use them again (VIRTIO_BALLOON_F_MUST_TELL_HOST,
//! see [`super::partial`]): until then a page that was acknowledged is still the balloon's.

use std::collections::BTreeMap;
use std::ops::Range;

use super::pages::PAGE;
use super::partial::{for_each_word, parts};

/// Bytes that are discarded together: a huge page of x86-64.
const HUGE: u64 = 2 << 20;
const WORDS: usize = (HUGE / PAGE / 64) as usize;
/// Huge pages remembered at most, which are 512 MiB.
const MOST: usize = 256;

/// The pages of 2 MiB that wait.
#[derive(Default)]
struct Waiting {
    bits: [u64; WORDS],
    /// The [`Pending::age`] during which the first of them came, …
    since: u64,
    /// … and the step at which the last of them did.
    touched: u64,
}

impl Waiting {
    fn count(&self) -> u64 {
        self.bits.iter().map(|w| u64::from(w.count_ones())).sum()
    }
}

/// See the module.
#[derive(Default)]
pub struct Pending {
    pages: BTreeMap<u64, Waiting>,
    /// How many small pages that is.
    count: u64,
    age: u64,
    step: u64,
}

impl Pending {
    /// `ranges`, which ascend and do not overlap, have come into the balloon. Replaces them by
    /// those that are to be discarded now.
    pub fn inflate(&mut self, ranges: &mut Vec<Range<u64>>) {
        self.step += 1;
        let mut now = Vec::new();
        for range in ranges.iter() {
            for (index, part) in parts(HUGE, range) {
                if part.end - part.start == HUGE {
                    self.forget(index);
                    now.push(part);
                    continue;
                }
                if self.pages.len() >= MOST && !self.pages.contains_key(&index) {
                    self.evict(&mut now);
                }
                let (since, touched) = (self.age, self.step);
                let waiting = self.pages.entry(index).or_insert_with(|| Waiting {
                    since,
                    ..Waiting::default()
                });
                waiting.touched = touched;
                for_each_word(HUGE, &part, |word, mask| {
                    if let Some(word) = waiting.bits.get_mut(word) {
                        self.count += u64::from((mask & !*word).count_ones());
                        *word |= mask;
                    }
                });
                if waiting.bits.iter().all(|word| *word == u64::MAX) {
                    self.forget(index);
                    now.push(index * HUGE..(index + 1) * HUGE);
                }
            }
        }
        // Those that were evicted lie anywhere.
        super::pages::merge(&mut now);
        *ranges = now;
    }

    /// `ranges` have left the balloon: what waits of them is forgotten.
    pub fn deflate(&mut self, ranges: &[Range<u64>]) {
        for (index, part) in ranges.iter().flat_map(|range| parts(HUGE, range)) {
            let Some(waiting) = self.pages.get_mut(&index) else {
                continue;
            };
            for_each_word(HUGE, &part, |word, mask| {
                if let Some(word) = waiting.bits.get_mut(word) {
                    self.count -= u64::from((mask & *word).count_ones());
                    *word &= !mask;
                }
            });
            if waiting.bits.iter().all(|word| *word == 0) {
                self.pages.remove(&index);
            }
        }
    }

    /// Time has passed: what has waited since before the last time is to be discarded now.
    pub fn tick(&mut self, ranges: &mut Vec<Range<u64>>) {
        let age = self.age;
        self.age += 1;
        self.take(ranges, |waiting| waiting.since < age);
    }

    /// All that waits is to be discarded now.
    pub fn flush(&mut self, ranges: &mut Vec<Range<u64>>) {
        self.take(ranges, |_| true);
    }

    /// Bytes that wait.
    pub fn bytes(&self) -> u64 {
        self.count * PAGE
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    fn forget(&mut self, index: u64) {
        if let Some(waiting) = self.pages.remove(&index) {
            self.count -= waiting.count();
        }
    }

    /// Makes room: the half to which nothing has come for longest is to be discarded.
    fn evict(&mut self, ranges: &mut Vec<Range<u64>>) {
        let mut touched: Vec<u64> = self.pages.values().map(|w| w.touched).collect();
        touched.sort_unstable();
        let Some(&middle) = touched.get(touched.len() / 2) else {
            return;
        };
        let mut evicted = Vec::new();
        self.take(&mut evicted, |waiting| waiting.touched <= middle);
        ranges.append(&mut evicted);
    }

    fn take(&mut self, ranges: &mut Vec<Range<u64>>, which: impl Fn(&Waiting) -> bool) {
        ranges.clear();
        self.pages.retain(|index, waiting| {
            let take = which(waiting);
            if take {
                self.count -= waiting.count();
                runs(index * HUGE, &waiting.bits, ranges);
            }
            !take
        });
    }
}

/// Adds the runs of set bits as ranges of addresses from `start` on.
pub(super) fn runs(start: u64, bits: &[u64; WORDS], ranges: &mut Vec<Range<u64>>) {
    for (page, word) in (start..).step_by(64 * PAGE as usize).zip(bits) {
        let mut bit = 0;
        while bit < 64 {
            bit += (word >> bit).trailing_zeros();
            if bit >= 64 {
                break;
            }
            let count = (word >> bit).trailing_ones();
            let at = page + u64::from(bit) * PAGE;
            let end = at + u64::from(count) * PAGE;
            match ranges.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => ranges.push(at..end),
            }
            bit += count;
        }
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

    fn inflate(pending: &mut Pending, range: Range<u64>) -> Vec<Range<u64>> {
        let mut ranges = vec![range];
        pending.inflate(&mut ranges);
        ranges
    }

    fn flushed(pending: &mut Pending) -> Vec<Range<u64>> {
        let mut ranges = vec![0..PAGE];
        pending.flush(&mut ranges);
        assert!(pending.is_empty() && pending.bytes() == 0);
        ranges
    }

    #[test]
    fn two_halves_go_as_one_whatever_came_in_between() {
        let mut pending = Pending::default();
        let half = HUGE / 2;
        for index in 0..100 {
            let start = index * HUGE + half;
            assert_eq!(inflate(&mut pending, start..start + half), []);
        }
        assert_eq!(pending.bytes(), 100 * half);
        let mut rest: Vec<_> = (0..100).map(|i| i * HUGE..i * HUGE + half).collect();
        pending.inflate(&mut rest);
        assert_eq!(rest, [0..100 * HUGE]);
        assert_eq!(flushed(&mut pending), []);
    }

    #[test]
    fn whole_huge_pages_go_at_once_and_their_edges_wait() {
        let mut pending = Pending::default();
        let now = inflate(&mut pending, HUGE - PAGE..3 * HUGE + PAGE);
        assert_eq!(now, [HUGE..3 * HUGE]);
        let edges = [HUGE - PAGE..HUGE, 3 * HUGE..3 * HUGE + PAGE];
        assert_eq!(flushed(&mut pending), edges);
    }

    #[test]
    fn a_page_that_left_the_balloon_is_forgotten() {
        let mut pending = Pending::default();
        inflate(&mut pending, 0..HUGE - PAGE);
        pending.deflate(&[PAGE..3 * PAGE]);
        // The last piece does not make it whole any more.
        assert_eq!(inflate(&mut pending, HUGE - PAGE..HUGE), []);
        assert_eq!(flushed(&mut pending), [0..PAGE, 3 * PAGE..HUGE]);
        inflate(&mut pending, 0..PAGE);
        pending.deflate(&[0..4 * HUGE]);
        assert!(pending.is_empty());
    }

    #[test]
    fn nothing_waits_for_more_than_two_ticks_however_often_more_comes() {
        let mut pending = Pending::default();
        let mut ranges = Vec::new();
        inflate(&mut pending, 0..PAGE);
        pending.tick(&mut ranges);
        assert_eq!(ranges, []);
        inflate(&mut pending, 2 * PAGE..3 * PAGE);
        inflate(&mut pending, HUGE..HUGE + PAGE);
        pending.tick(&mut ranges);
        assert_eq!(ranges, [0..PAGE, 2 * PAGE..3 * PAGE]);
        pending.tick(&mut ranges);
        assert_eq!(ranges, [HUGE..HUGE + PAGE]);
        assert!(pending.is_empty());
    }

    #[test]
    fn where_there_are_too_many_those_that_nothing_comes_to_go_first() {
        let mut pending = Pending::default();
        for index in 0..MOST as u64 {
            assert_eq!(inflate(&mut pending, index * HUGE..index * HUGE + PAGE), []);
        }
        // The first of all is in use again.
        inflate(&mut pending, PAGE..2 * PAGE);
        let next = MOST as u64 * HUGE;
        let now = inflate(&mut pending, next..next + PAGE);
        assert_eq!(now.first(), Some(&(HUGE..HUGE + PAGE)));
        assert!(now.len() > MOST / 4 && now.len() < MOST);
        assert!(pending.pages.contains_key(&0));
        assert!(pending.pages.len() <= MOST);
    }

    proptest! {
        #[test]
        fn each_page_in_the_balloon_goes_once_and_no_other_ever(
            steps in prop::collection::vec((0u8..8, 0u64..1536, 1u64..700), 0..60)
        ) {
            let mut pending = Pending::default();
            // In the balloon and not discarded yet.
            let mut waiting = BTreeSet::new();
            let mut ranges = Vec::new();
            for (kind, start, len) in steps {
                let range = start * PAGE..(start + len) * PAGE;
                match kind {
                    0..4 => {
                        waiting.extend(start..start + len);
                        ranges = vec![range];
                        pending.inflate(&mut ranges);
                    }
                    4..6 => {
                        waiting.retain(|page| !(start..start + len).contains(page));
                        pending.deflate(&[range]);
                        ranges.clear();
                    }
                    6 => pending.tick(&mut ranges),
                    _ => pending.flush(&mut ranges),
                }
                for page in ranges.iter().flat_map(|r| r.start / PAGE..r.end / PAGE) {
                    prop_assert!(waiting.remove(&page), "{}", page);
                }
                prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
                prop_assert_eq!(pending.bytes(), waiting.len() as u64 * PAGE);
            }
        }
    }
}

//! Runs of free clusters.

use std::collections::BTreeMap;

/// The most runs that are remembered; the clusters of others stay unused until the image is opened
/// anew.
const MAX_RUNS: usize = 1 << 16;

/// Some clusters in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first, by its number in the file.
    pub first: u64,
    pub count: u64,
    /// They are known to read as zeroes.
    pub zero: bool,
}

/// See the module.
#[derive(Default)]
pub struct Extents {
    runs: BTreeMap<u64, (u64, bool)>,
}

impl Extents {
    /// Adds a run; it is not there yet.
    pub fn insert(&mut self, run: Run) {
        let Run {
            mut first,
            mut count,
            zero,
        } = run;
        if count == 0 {
            return;
        }
        if let Some((&before, &(len, same))) = self.runs.range(..first).next_back()
            && before + len == first
            && same == zero
        {
            first = before;
            count += len;
        }
        if let Some(&(len, same)) = self.runs.get(&(run.first + run.count))
            && same == zero
        {
            self.runs.remove(&(run.first + run.count));
            count += len;
        }
        if self.runs.len() < MAX_RUNS || self.runs.contains_key(&first) {
            self.runs.insert(first, (count, zero));
        }
    }

    /// A run of up to `want` clusters: the lowest of those that have so many, as far as a short look
    /// tells.
    pub fn find(&self, want: u64) -> Option<Run> {
        let run = |(&first, &(count, zero)): (&u64, &(u64, bool))| Run {
            first,
            count: count.min(want),
            zero,
        };
        let long = self.runs.iter().take(64).find(|(_, run)| run.0 >= want);
        long.or_else(|| self.runs.first_key_value()).map(run)
    }

    /// Takes away the first `count` clusters of the run that begins at `first`.
    pub fn take(&mut self, first: u64, count: u64) {
        if let Some((len, zero)) = self.runs.remove(&first)
            && len > count
        {
            self.runs.insert(first + count, (len - count, zero));
        }
    }

    /// Where the run begins that ends just before cluster `end`.
    pub fn tail(&self, end: u64) -> Option<u64> {
        let mut start = end;
        for (&first, &(count, _)) in self.runs.iter().rev() {
            if first + count != start {
                break;
            }
            start = first;
        }
        (start < end).then_some(start)
    }

    /// Clusters in all of them.
    #[cfg(test)]
    pub fn clusters(&self) -> u64 {
        self.runs.values().map(|(count, _)| count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64, zero: bool) -> Run {
        Run { first, count, zero }
    }

    #[test]
    fn neighbours_of_a_kind_become_one() {
        let mut extents = Extents::default();
        extents.insert(run(10, 5, true));
        extents.insert(run(20, 5, true));
        extents.insert(run(15, 5, true));
        assert_eq!(extents.find(99), Some(run(10, 15, true)));
        extents.insert(run(25, 5, false));
        assert_eq!(extents.clusters(), 20);
        assert_eq!(extents.tail(30), Some(10));
        assert_eq!(extents.tail(31), None);
    }

    #[test]
    fn the_lowest_that_is_long_enough_is_found() {
        let mut extents = Extents::default();
        extents.insert(run(1, 2, false));
        extents.insert(run(10, 8, true));
        assert_eq!(extents.find(2), Some(run(1, 2, false)));
        assert_eq!(extents.find(4), Some(run(10, 4, true)));
        assert_eq!(extents.find(9), Some(run(1, 2, false)));
        extents.take(10, 3);
        assert_eq!(extents.find(4), Some(run(13, 4, true)));
        extents.take(1, 2);
        assert_eq!(extents.clusters(), 5);
    }
}

//! How full a disk's place on the host is, in a few steps that have hysteresis: told when it passes
//! a mark on the way up, and when it has come clearly below one on the way down.
//!
//! ```text
//!   used    ──74──75──76──74──73──72──71──
//!   level     0   1   1   1   1   1   0     with a mark at 75 and a slack of 3
//! ```
//!
//! [`level`] is pure. [`Watermarks`] holds the last levels of one disk; it is asked on the VMM
//! thread, every few seconds, so that no I/O pays for it.

use super::{Block, DiskConfig};

/// Percentage points by which a level must be fallen below before it is left.
const SLACK: u64 = 3;

/// The number of `marks` (percentages, ascending) that `used` of `total` has reached, as seen by
/// who said `before` the last time.
pub fn level(marks: &[u8], before: usize, used: u64, total: u64) -> usize {
    let reached = |percent: u64| {
        let wanted = u128::from(total) * u128::from(percent);
        total > 0 && u128::from(used) * 100 >= wanted
    };
    let up = marks.iter().take_while(|mark| reached(u64::from(**mark)));
    let up = up.count();
    let kept = marks
        .iter()
        .take(before)
        .take_while(|mark| reached(u64::from(**mark).saturating_sub(SLACK).max(1)));
    up.max(kept.count())
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// The host's file system.
    HostFileSystem,
    /// The image, by `write_threshold`.
    WriteThreshold,
}

impl Measure {
    /// Its name in events.
    pub fn name(self) -> &'static str {
        match self {
            Self::HostFileSystem => "host-file-system",
            Self::WriteThreshold => "write-threshold",
        }
    }
}

/// A mark was passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    /// Of what.
    pub of: Measure,
    /// The highest mark that is reached now, in percent; 0 below the lowest.
    pub level_percent: u8,
    /// Whether it was passed on the way up.
    pub rising: bool,
    /// Bytes in use.
    pub used: u64,
    /// Bytes that are all.
    pub total: u64,
}

/// The levels at which a disk was seen last.
#[derive(Debug, Default)]
pub struct Watermarks {
    host: usize,
    threshold: usize,
}

impl Watermarks {
    /// Looks at a disk, and says what has been passed since. What can't be found out is as it was.
    pub fn look(&mut self, block: &Block) -> Vec<Passed> {
        let Ok((file, host)) = block.space() else {
            return Vec::new();
        };
        let config = &block.opened().config;
        let mut passed = Vec::new();
        if let Some(host) = host {
            let used = host.total.saturating_sub(host.free);
            passed.extend(step(
                Measure::HostFileSystem,
                &config.space_watermarks,
                &mut self.host,
                (used, host.total),
            ));
        }
        if let (Some(file), Some(threshold)) = (file, config.write_threshold) {
            let marks = threshold_marks(config);
            passed.extend(step(
                Measure::WriteThreshold,
                &marks,
                &mut self.threshold,
                (file.allocated, threshold),
            ));
        }
        passed
    }
}

impl Block {
    /// Whether there is anything for [`Watermarks::look`] to tell.
    pub fn is_watched(&self) -> bool {
        let config = &self.opened().config;
        !config.readonly
            && (!config.space_watermarks.is_empty() || config.write_threshold.is_some())
    }
}

fn threshold_marks(config: &DiskConfig) -> Vec<u8> {
    let mut marks = config.space_watermarks.clone();
    marks.push(100);
    marks
}

fn step(of: Measure, marks: &[u8], before: &mut usize, now: (u64, u64)) -> Option<Passed> {
    let (used, total) = now;
    let after = level(marks, *before, used, total);
    let rising = after > *before;
    if after == std::mem::replace(before, after) {
        return None;
    }
    let level_percent = after
        .checked_sub(1)
        .and_then(|last| marks.get(last).copied());
    Some(Passed {
        of,
        level_percent: level_percent.unwrap_or(0),
        rising,
        used,
        total,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MARKS: &[u8] = &[75, 90, 95];

    #[test]
    fn a_mark_is_passed_when_it_is_reached_and_left_only_with_some_slack() {
        let cases = [
            // used of 1000, before, after
            (0, 0, 0),
            (749, 0, 0),
            (750, 0, 1),
            (749, 1, 1),
            (720, 1, 1),
            (719, 1, 0),
            (899, 1, 1),
            (900, 1, 2),
            (870, 2, 2),
            (869, 2, 1),
            (1000, 0, 3),
            (950, 3, 3),
            (920, 3, 3),
            (919, 3, 2),
            // From full to nothing at once.
            (0, 3, 0),
            // More than all, and a level there is not.
            (5000, 0, 3),
            (0, 99, 0),
            (1000, 99, 3),
        ];
        for (used, before, after) in cases {
            assert_eq!(level(MARKS, before, used, 1000), after, "{used} {before}");
        }
        assert_eq!(level(&[], 0, 1, 1), 0);
        assert_eq!(level(MARKS, 2, 0, 0), 0, "of nothing nothing is full");
        assert_eq!(
            level(&[1], 1, 0, 1000),
            0,
            "an empty one is below all marks"
        );
        assert_eq!(level(MARKS, 0, u64::MAX, u64::MAX), 3);
    }

    #[test]
    fn a_step_tells_where_it_leads_and_is_told_once() {
        let mut before = 0;
        let mut look = |used| step(Measure::WriteThreshold, MARKS, &mut before, (used, 100));
        assert_eq!(look(10), None);
        let up = look(91).unwrap();
        assert_eq!((up.level_percent, up.rising), (90, true));
        assert_eq!(look(89), None);
        let down = look(80).unwrap();
        assert_eq!((down.level_percent, down.rising), (75, false));
        let out = look(0).unwrap();
        assert_eq!((out.level_percent, out.rising), (0, false));
    }

    proptest! {
        #[test]
        fn a_level_is_stable_and_never_below_what_is_reached(
            marks in proptest::collection::btree_set(1_u8..=100, 0..8),
            before in 0_usize..10,
            used in 0_u64..=2000,
            jitter in 0_u64..20,
        ) {
            let marks: Vec<u8> = marks.into_iter().collect();
            let first = level(&marks, before, used, 1000);
            prop_assert!(first <= marks.len());
            prop_assert_eq!(level(&marks, first, used, 1000), first);
            let reached = marks.iter().filter(|mark| used >= u64::from(**mark) * 10).count();
            prop_assert!(first >= reached);
            // What goes down by less than the slack is not told.
            if used > jitter + 10 {
                prop_assert!(level(&marks, reached, used - jitter, 1000) >= reached);
            }
            // Nor does a level rise by anything but what is reached.
            prop_assert!(level(&marks, 0, used, 1000) == reached);
        }
    }
}

//! What is offered, and which queue is for what (virtio 1.3 §5.5.2, §5.5.3). Pure.
//!
//! VIRTIO_BALLOON_F_FREE_PAGE_HINT is left out on purpose: the driver may use hinted pages again
//! before the device has seen them, so that who discards them corrupts memory. It is an aid to
//! migration, where skipping a page that was written since is harmless, and no way to reclaim.

/// The driver tells of pages before it takes them out of the balloon. Offered because huge pages
/// of hugetlb are discarded when the last part of them comes, see [`super::partial`].
const MUST_TELL_HOST: u64 = 1 << 0;
const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_POISON: u64 = 1 << 4;
const REPORTING: u64 = 1 << 5;

/// Queues there can be: inflate, deflate, statistics, hinting (never used), reporting.
pub const QUEUES: usize = 5;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Pages that come into the balloon.
    Inflate,
    /// Pages that leave it.
    Deflate,
    /// The guest's statistics.
    Statistics,
    /// Ranges that the guest does not use.
    Report,
}

/// The features to offer.
pub fn offered(deflate_on_oom: bool, free_page_reporting: bool) -> u64 {
    let mut features = MUST_TELL_HOST | STATS_VQ | PAGE_POISON;
    if deflate_on_oom {
        features |= DEFLATE_ON_OOM;
    }
    if free_page_reporting {
        features |= REPORTING;
    }
    features
}

/// Whether the driver has promised to tell before it uses ballooned pages.
pub fn told_of_deflation(features: u64) -> bool {
    features & MUST_TELL_HOST != 0
}

/// Whether `poison_val` means anything.
pub fn poisoned(features: u64) -> bool {
    features & PAGE_POISON != 0
}

/// What the queue `index` is for, where the driver has enabled the queues `enabled`.
///
/// By the specification reporting is queue 4 whatever else there is. Linux numbers only the
/// queues of features it has accepted, and QEMU and Firecracker follow it: then it is queue 2 or
/// 3. Which of the two is meant shows in whether queue 4 is enabled.
pub fn role(index: u16, features: u64, enabled: &[u16]) -> Option<Role> {
    let statistics = (features & STATS_VQ != 0).then_some(Role::Statistics);
    let report = (features & REPORTING != 0).then_some(Role::Report);
    let by_specification = enabled.contains(&4);
    match index {
        0 => Some(Role::Inflate),
        1 => Some(Role::Deflate),
        2 if by_specification => statistics,
        4 => report,
        2 => statistics.or(report),
        3 if !by_specification && statistics.is_some() => report,
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roles(features: u64, enabled: &[u16]) -> Vec<Option<Role>> {
        enabled
            .iter()
            .map(|index| role(*index, features, enabled))
            .collect()
    }

    #[test]
    fn hinting_is_never_offered_and_the_rest_as_configured() {
        for (oom, report) in [(false, false), (true, false), (false, true), (true, true)] {
            let features = offered(oom, report);
            assert_eq!(features & (1 << 3), 0);
            assert_eq!(features & DEFLATE_ON_OOM != 0, oom);
            assert_eq!(features & REPORTING != 0, report);
        }
    }

    #[test]
    fn queues_are_found_by_the_specifications_numbers_and_by_linux() {
        use Role::{Deflate, Inflate, Report, Statistics};
        let (both, stats, report) = (STATS_VQ | REPORTING, STATS_VQ, REPORTING);
        let some = |roles: &[Role]| roles.iter().copied().map(Some).collect::<Vec<_>>();
        assert_eq!(roles(0, &[0, 1]), some(&[Inflate, Deflate]));
        assert_eq!(
            roles(stats, &[0, 1, 2]),
            some(&[Inflate, Deflate, Statistics])
        );
        assert_eq!(
            roles(both, &[0, 1, 2, 3]),
            some(&[Inflate, Deflate, Statistics, Report])
        );
        assert_eq!(
            roles(both, &[0, 1, 2, 4]),
            some(&[Inflate, Deflate, Statistics, Report])
        );
        assert_eq!(roles(report, &[0, 1, 2]), some(&[Inflate, Deflate, Report]));
        assert_eq!(roles(report, &[0, 1, 4]), some(&[Inflate, Deflate, Report]));
        // All enabled: what has no meaning is left alone.
        let all = [0, 1, 2, 3, 4];
        assert_eq!(
            roles(0, &all),
            [Some(Inflate), Some(Deflate), None, None, None]
        );
        assert_eq!(
            roles(both, &all),
            [
                Some(Inflate),
                Some(Deflate),
                Some(Statistics),
                None,
                Some(Report)
            ]
        );
    }
}

//! A balloon as `vm.balloons` shows it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use utoipa::ToSchema;

use super::Viewer;
use super::shared::State;
use super::stats::{GuestStatistics, Sample};
use crate::guest_memory::discard::inhibit::Reason;

/// Where a balloon stands. What the guest tells is its word only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct BalloonInfo {
    /// The device's id.
    #[schema(example = "__balloon")]
    pub id: String,
    /// Bytes the guest is asked to give.
    pub target: u64,
    /// Bytes it says it has given; its word.
    pub actual: u64,
    /// Bytes of the pages that it has truly sent and not told to have taken back, each page counted
    /// once. Less than `actual` while a balloon is deflated, and of a guest that lies.
    pub given: u64,
    /// Whether it is on its way. `reached` takes both `actual` and `given`.
    pub state: State,
    /// Bytes per second during the last second; negative while the balloon is deflated.
    pub rate: i64,
    /// Whether the guest has a driver that runs the device.
    pub driver: bool,
    /// Bytes given back to the host by inflating, in all.
    pub inflated: u64,
    /// Bytes in the balloon that wait for the rest of their 2 MiB, for half a second at most.
    pub pending: u64,
    /// Bytes in the balloon that were held off, and are given back when nothing holds off any more;
    /// only of a driver that tells before it takes pages back.
    pub held_off: u64,
    /// Bytes of `inflated` that had been held off before.
    pub retried: u64,
    /// Bytes the guest has taken out of the balloon, in all.
    pub deflated: u64,
    /// Bytes the guest has reported free and the host has got, in all.
    pub reported_free: u64,
    /// Bytes that were not given back, and why.
    pub inhibited: Inhibited,
    /// Why nothing is given back just now; empty while everything is.
    pub inhibited_by: Vec<Reason>,
    /// Bytes of requests that made no sense: not RAM, or too much at once.
    pub ignored: u64,
    /// What the guest tells of its memory, by name, each with its age.
    #[schema(inline)]
    pub statistics: BTreeMap<&'static str, Sample>,
}

/// Bytes that were not given back to the host, in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Inhibited {
    /// Parts of a huge page, the rest of which was not in the balloon.
    pub partial_huge_pages: u64,
    /// Free pages that the guest expects to keep a pattern other than zeroes.
    pub poison: u64,
    /// Memory that is locked.
    pub locked: u64,
    /// Memory that a device passed through to the guest has pinned.
    pub vfio: u64,
    /// Memory whose writes were being recorded.
    pub dirty_log: u64,
    /// Memory that was still coming from a snapshot.
    pub lazy_restore: u64,
    /// The host failed.
    pub failed: u64,
}

impl Viewer {
    /// All of it, now.
    pub fn info(&self, id: &str) -> BalloonInfo {
        let shared = &self.0;
        let counters = &shared.counters;
        let total = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BalloonInfo {
            id: id.to_owned(),
            target: shared.target_bytes(),
            actual: shared.actual_bytes(),
            given: shared.given_bytes(),
            state: shared.state(),
            rate: shared.rate.load(Ordering::Relaxed),
            driver: shared.live(),
            inflated: total(&counters.inflated),
            pending: total(&shared.pending),
            held_off: total(&shared.held_off),
            retried: total(&counters.retried),
            deflated: total(&counters.deflated),
            reported_free: total(&counters.reported),
            inhibited: Inhibited {
                partial_huge_pages: total(&counters.inhibited_partial),
                poison: total(&counters.inhibited_poison),
                locked: total(&counters.inhibited_locked),
                vfio: total(&counters.inhibited_vfio),
                dirty_log: total(&counters.inhibited_dirty_log),
                lazy_restore: total(&counters.inhibited_lazy_restore),
                failed: total(&counters.failed),
            },
            inhibited_by: shared.inhibitor.reasons(),
            ignored: total(&counters.ignored),
            statistics: shared.statistics.samples(shared.now_ms()),
        }
    }

    /// The latest statistics, however old.
    pub fn statistics(&self) -> GuestStatistics {
        self.0.statistics.latest()
    }

    /// Bytes the guest says it has given.
    pub fn actual_bytes(&self) -> u64 {
        self.0.actual_bytes()
    }
}

//! What a disk has done so far, under Cloud Hypervisor's names.
//!
//! Each queue's thread counts for itself and the sums are made when somebody asks, so that the
//! threads share no cache line. Latencies are in microseconds, from the moment a request is taken
//! off the queue to its completion; they are 0 while there was none (where Cloud Hypervisor shows
//! the largest number there is).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// One direction of one queue.
#[derive(Debug)]
pub struct Direction {
    bytes: AtomicU64,
    ops: AtomicU64,
    latency_sum: AtomicU64,
    latency_min: AtomicU64,
    latency_max: AtomicU64,
}

impl Default for Direction {
    fn default() -> Self {
        Self {
            bytes: AtomicU64::new(0),
            ops: AtomicU64::new(0),
            latency_sum: AtomicU64::new(0),
            latency_min: AtomicU64::new(u64::MAX),
            latency_max: AtomicU64::new(0),
        }
    }
}

impl Direction {
    /// Counts a request that went well. Called by the queue's thread only.
    pub fn count(&self, bytes: u64, latency: Duration) {
        let latency = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        // There is one writer, so plain loads and stores do.
        let add = |cell: &AtomicU64, value| {
            cell.store(cell.load(Relaxed).wrapping_add(value), Relaxed);
        };
        add(&self.bytes, bytes);
        add(&self.latency_sum, latency);
        self.latency_min
            .store(self.latency_min.load(Relaxed).min(latency), Relaxed);
        self.latency_max
            .store(self.latency_max.load(Relaxed).max(latency), Relaxed);
        add(&self.ops, 1);
    }
}

/// Both directions of one queue.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Reads.
    pub read: Direction,
    /// Writes.
    pub write: Direction,
}

/// Adds up the queues of a disk.
pub fn sum<'a>(
    queues: impl Iterator<Item = &'a QueueCounters> + Clone,
) -> BTreeMap<&'static str, u64> {
    let mut totals = BTreeMap::new();
    total(
        &mut totals,
        queues.clone().map(|queue| &queue.read),
        [
            "read_bytes",
            "read_ops",
            "read_latency_min",
            "read_latency_max",
            "read_latency_avg",
        ],
    );
    total(
        &mut totals,
        queues.map(|queue| &queue.write),
        [
            "write_bytes",
            "write_ops",
            "write_latency_min",
            "write_latency_max",
            "write_latency_avg",
        ],
    );
    totals
}

fn total<'a>(
    totals: &mut BTreeMap<&'static str, u64>,
    queues: impl Iterator<Item = &'a Direction>,
    names: [&'static str; 5],
) {
    let (mut bytes, mut ops, mut sum, mut min, mut max) = (0_u64, 0_u64, 0_u64, u64::MAX, 0);
    for queue in queues {
        bytes = bytes.wrapping_add(queue.bytes.load(Relaxed));
        ops = ops.wrapping_add(queue.ops.load(Relaxed));
        sum = sum.wrapping_add(queue.latency_sum.load(Relaxed));
        min = min.min(queue.latency_min.load(Relaxed));
        max = max.max(queue.latency_max.load(Relaxed));
    }
    let average = sum.checked_div(ops).unwrap_or(0);
    let min = if ops == 0 { 0 } else { min };
    totals.extend(names.into_iter().zip([bytes, ops, min, max, average]));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_added_up_and_a_disk_without_io_shows_zeroes() {
        let queues = [QueueCounters::default(), QueueCounters::default()];
        assert!(sum(queues.iter()).values().all(|&value| value == 0));
        queues[0].read.count(512, Duration::from_micros(10));
        queues[1].read.count(1024, Duration::from_micros(30));
        let totals = sum(queues.iter());
        for (name, value) in [
            ("read_bytes", 1536),
            ("read_ops", 2),
            ("read_latency_min", 10),
            ("read_latency_max", 30),
            ("read_latency_avg", 20),
            ("write_ops", 0),
            ("write_latency_min", 0),
        ] {
            assert_eq!(totals[name], value, "{name}");
        }
    }
}

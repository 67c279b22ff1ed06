//! How often a vCPU left the guest for us, and what for.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    PortRead,
    PortWrite,
    MmioRead,
    MmioWrite,
    Interrupted,
    Other,
}

const NAMES: [&str; 6] = [
    "port-read",
    "port-write",
    "mmio-read",
    "mmio-write",
    "interrupted",
    "other",
];

/// Totals of one vCPU, which alone writes them.
#[derive(Debug, Default)]
pub(super) struct Exits([AtomicU64; NAMES.len()]);

impl Exits {
    /// Counts one; called on the vCPU's thread.
    pub(super) fn count(&self, kind: Kind) {
        let cell = &self.0[kind as usize];
        // There is one writer, so a plain load and store do.
        cell.store(cell.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// The totals by name.
    pub(super) fn totals(&self) -> BTreeMap<&'static str, u64> {
        let totals = self.0.iter().map(|cell| cell.load(Relaxed));
        NAMES.into_iter().zip(totals).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_counted_under_its_name() {
        let exits = Exits::default();
        exits.count(Kind::MmioWrite);
        exits.count(Kind::MmioWrite);
        exits.count(Kind::Other);
        let totals = exits.totals();
        assert_eq!((totals["mmio-write"], totals["other"]), (2, 1));
        assert_eq!(totals.values().sum::<u64>(), 3);
    }
}

//! Watching how full the disks' places on the host are, before they are full: every few seconds, on
//! the VMM thread, and only where there is a disk to be watched. What counts as news is decided by
//! [`devices::block::watermarks`].

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use devices::block::watermarks::{Passed, Watermarks};

use crate::created::MovedOn;
use crate::device_manager::DeviceManager;
use crate::event::Events;

/// Between two looks; each costs three system calls per disk.
const INTERVAL: Duration = Duration::from_secs(2);

/// When to look, and what was seen last.
pub struct DiskWatch {
    next: Instant,
    seen: BTreeMap<String, Watermarks>,
}

impl DiskWatch {
    /// Looks for the first time at `first`.
    pub fn new(first: Instant) -> Self {
        Self {
            next: first,
            seen: BTreeMap::new(),
        }
    }

    /// When [`DiskWatch::look`] is to be called next.
    pub fn next_look(&self, devices: &DeviceManager) -> Option<Instant> {
        let watched = devices.disks().any(|(_, disk)| disk.is_watched());
        watched.then_some(self.next)
    }

    /// Looks at all disks, if it is time to.
    pub fn look(&mut self, devices: &DeviceManager, now: Instant) -> Vec<(String, Passed)> {
        if now < self.next {
            return Vec::new();
        }
        self.next = now + INTERVAL;
        let watched = || devices.disks().filter(|(_, disk)| disk.is_watched());
        self.seen
            .retain(|id, _| watched().any(|(other, _)| other == id));
        let mut news = Vec::new();
        for (id, disk) in watched() {
            let marks = self.seen.entry(id.to_owned()).or_default();
            news.extend(
                marks
                    .look(disk)
                    .into_iter()
                    .map(|passed| (id.to_owned(), passed)),
            );
        }
        news
    }
}

/// Tells that a mark was passed.
pub fn emit(events: &Events, id: &str, passed: &Passed) {
    let free = passed.total.saturating_sub(passed.used);
    events.emit(
        "virtio-device",
        "disk-space",
        &[
            ("id", id),
            ("of", passed.of.name()),
            ("level_percent", &passed.level_percent.to_string()),
            (
                "direction",
                if passed.rising { "rising" } else { "falling" },
            ),
            ("used_bytes", &passed.used.to_string()),
            ("total_bytes", &passed.total.to_string()),
            ("free_bytes", &free.to_string()),
        ],
    );
}

/// Tells that a disk has moved on to an overlay.
pub fn emit_moved_on(events: &Events, disk: &MovedOn) {
    let (path, below) = (disk.path.display(), disk.backing_path.display());
    events.emit(
        "virtio-device",
        "disk-snapshot",
        &[
            ("id", &disk.id),
            ("path", &path.to_string()),
            ("backing_path", &below.to_string()),
        ],
    );
}

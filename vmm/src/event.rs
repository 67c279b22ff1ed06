//! The VM's events: Cloud Hypervisor's names, plus the failures it does not tell.
//!
//! Events go into a bounded ring (a tokio broadcast channel); whoever reads too slowly misses the
//! oldest ones and is told how many. Nobody who emits ever waits.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::broadcast;
use utoipa::ToSchema;

/// Events kept for slow readers.
const RING: usize = 256;

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Event {
    /// Time since the process started.
    pub timestamp: Timestamp,
    /// `vmm`, `vm`, `virtio-device` or `guest`.
    pub source: &'static str,
    /// What happened.
    pub event: &'static str,
    /// Details, or null.
    pub properties: Option<BTreeMap<String, String>>,
}

/// A duration as Cloud Hypervisor writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Timestamp {
    /// Whole seconds.
    pub secs: u64,
    /// Nanoseconds beyond them.
    pub nanos: u32,
}

impl From<Duration> for Timestamp {
    fn from(duration: Duration) -> Self {
        Self {
            secs: duration.as_secs(),
            nanos: duration.subsec_nanos(),
        }
    }
}

/// Where events are emitted; cheap to clone, usable on every thread.
#[derive(Clone)]
pub struct Events {
    start: Instant,
    sender: broadcast::Sender<Event>,
    counts: Arc<Mutex<Counts>>,
}

/// How many events there were, by source and name: both are words of the program, so that there is
/// a bound to them.
type Counts = BTreeMap<(&'static str, &'static str), u64>;

impl Events {
    /// A ring nobody listens to yet; time counts from `start`.
    pub fn new(start: Instant) -> Self {
        Self {
            start,
            sender: broadcast::Sender::new(RING),
            counts: Arc::default(),
        }
    }

    /// When time began.
    pub fn start(&self) -> Instant {
        self.start
    }

    /// Listens to all that is emitted from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.sender.subscribe()
    }

    /// How many there were, by source and name.
    pub fn counts(&self) -> Counts {
        let counts = self.counts.lock();
        counts.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Emits an event and logs it.
    pub fn emit(&self, source: &'static str, event: &'static str, properties: &[(&str, &str)]) {
        tracing::info!(target: "event", source, event, ?properties);
        let properties = (!properties.is_empty()).then(|| {
            properties
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect()
        });
        {
            let counts = self.counts.lock();
            let mut counts = counts.unwrap_or_else(PoisonError::into_inner);
            let count = counts.entry((source, event)).or_default();
            *count = count.wrapping_add(1);
        }
        // Fails only when nobody listens.
        let _ = self.sender.send(Event {
            timestamp: self.start.elapsed().into(),
            source,
            event,
            properties,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_by_source_and_name_whether_or_not_somebody_listens() {
        let events = Events::new(Instant::now());
        events.emit("vm", "booted", &[]);
        let mut listener = events.subscribe();
        events.emit("vm", "booted", &[("a", "b")]);
        events.emit("vmm", "booted", &[]);
        let counts = events.clone().counts();
        assert_eq!(counts[&("vm", "booted")], 2);
        assert_eq!(counts[&("vmm", "booted")], 1);
        assert_eq!(counts.len(), 2);
        assert!(listener.try_recv().is_ok());
    }
}

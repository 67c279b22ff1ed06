//! The virtio memory balloon (virtio 1.3 §5.5): memory that the guest leaves to the host.
//!
//! One sandboxed thread ([`worker`]) with all its queues, so that a balloon that is being inflated
//! holds up no disk. The target is the host's; the guest can't write it. All that the guest tells
//! (`actual`, statistics) is shown as its word and nothing depends on it.
//!
//! Offered are statistics, page poison, and as configured DEFLATE_ON_OOM and free page reporting;
//! free page hinting is not, see [`features`].

mod config;
mod features;
mod page_set;
mod pages;
mod partial;
mod pending;
mod progress;
mod reclaim;
mod requests;
mod shared;
mod stats;
#[cfg(test)]
mod tests;
mod view;
mod worker;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use config::{BalloonConfig, validate_size};
pub use shared::{Asked, State};
pub use stats::{GuestStatistics, Sample};
pub use view::{BalloonInfo, Inhibited};

use self::shared::Shared;
use self::worker::BalloonHandler;
use crate::config::{BuildContext, BuildError};
use crate::guest_memory::discard;
use crate::sandbox::{Allow, COMMON, Filter, WORKER};
use crate::timer;
use crate::virtio::{VirtioDevice, config_space};
use crate::worker::Worker;

/// VIRTIO_ID_BALLOON.
const DEVICE_TYPE: u16 = 5;
/// Linux wants at least 32 for reporting; one request at a time is under way on the others.
const QUEUE_SIZE: u16 = 128;

/// The lists of the thread's filter.
const LISTS: [&[Allow]; 4] = [COMMON, WORKER, timer::SYSCALLS, discard::SYSCALLS];

/// A virtio balloon.
pub struct Balloon {
    shared: Arc<Shared>,
    features: u64,
    workers: [Worker; 1],
}

/// The kind of thread there is, with the lists of its filter.
pub fn thread_kinds() -> Vec<(&'static str, Vec<&'static [Allow]>)> {
    vec![("balloon", LISTS.to_vec())]
}

impl Balloon {
    /// Starts the thread. Called on the VMM thread.
    pub fn new(config: &BalloonConfig, context: BuildContext) -> Result<Self, BuildError> {
        let shared = Shared::new(config.size, context.discards)
            .map_err(|e| BuildError::host("making events", e))?;
        let shared = Arc::new(shared);
        shared.inhibitor.tell_of_release(&shared.wake);
        let name = context.reporter.id().to_owned();
        let filter = Filter::compile(&name, context.seccomp, &LISTS)
            .map_err(|e| BuildError::host("compiling a filter", io::Error::other(e)))?;
        let handler = BalloonHandler::new(shared.clone(), context.reporter.clone())
            .map_err(|e| BuildError::host("making timers", e))?;
        let worker = Worker::spawn(&name, filter, context.reporter, handler)
            .map_err(|e| BuildError::host(format!("starting the thread {name}"), e))?;
        // Watched from the start, so that a driver that never comes is noticed.
        shared.wake();
        Ok(Self {
            shared,
            features: features::offered(config.deflate_on_oom, config.free_page_reporting),
            workers: [worker],
        })
    }

    /// Asks the guest for `bytes`, a multiple of 4096 below 16 TiB; does not wait for it. Called
    /// on the VMM thread.
    pub fn set_target(&self, bytes: u64) {
        self.shared.set_target(bytes);
    }

    /// Bytes the guest is asked to give.
    pub fn target_bytes(&self) -> u64 {
        self.shared.target_bytes()
    }

    /// Bytes the guest says it has given; never to be trusted.
    pub fn actual_bytes(&self) -> u64 {
        self.shared.actual_bytes()
    }

    /// Has the guest asked for fresh statistics, and `asked` called when they have come or, after
    /// a second, have not; at once where there is no driver. Never blocks. A balloon whose worker
    /// is paused does not answer until it is resumed.
    pub fn ask_for_statistics(&self, asked: Asked) {
        self.shared.ask(asked);
    }

    /// What only knows the state, for who is called by [`Balloon::ask_for_statistics`] and may
    /// then outlive the device.
    pub fn viewer(&self) -> Viewer {
        Viewer(self.shared.clone())
    }
}

/// Where a balloon stands, for whoever holds this.
#[derive(Clone)]
pub struct Viewer(Arc<Shared>);

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; features::QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.shared.image(), offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        self.shared.write(offset, data);
    }

    fn features_accepted(&self, features: u64) {
        if features == 0 {
            self.shared.reset();
        }
    }

    fn workers(&self) -> &[Worker] {
        &self.workers
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        let counters = &self.shared.counters;
        [
            ("inflated_bytes", &counters.inflated),
            ("deflated_bytes", &counters.deflated),
            ("reported_free_bytes", &counters.reported),
            ("inhibited_partial_bytes", &counters.inhibited_partial),
            ("inhibited_poison_bytes", &counters.inhibited_poison),
            ("inhibited_locked_bytes", &counters.inhibited_locked),
            ("inhibited_vfio_bytes", &counters.inhibited_vfio),
            ("inhibited_dirty_log_bytes", &counters.inhibited_dirty_log),
            (
                "inhibited_lazy_restore_bytes",
                &counters.inhibited_lazy_restore,
            ),
            ("retried_bytes", &counters.retried),
            ("failed_bytes", &counters.failed),
            ("ignored_bytes", &counters.ignored),
            ("discard_calls", &counters.discards),
        ]
        .into_iter()
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
        .collect()
    }

    fn as_balloon(&self) -> Option<&Balloon> {
        Some(self)
    }
}

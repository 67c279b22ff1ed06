//! What devices and the guest report to the VMM, without ever blocking or queueing without bound.

use std::sync::Arc;
use std::time::Duration;

use crate::throttle::Throttle;

/// Something that happened in a device, told to whoever listens to the VM's events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The guest's driver set DRIVER_OK and the queues are running.
    Activated,
    /// The guest's driver reset the device.
    Reset,
    /// A request failed on the host's side; the guest saw an I/O error.
    IoError {
        /// `read`, `write`, `flush`, `discard` or `write-zeroes`.
        operation: &'static str,
        /// Where in the disk, in bytes.
        offset_bytes: u64,
        /// The host's error.
        error: String,
        /// How many more were swallowed by the rate limit since the last one reported.
        suppressed: u64,
    },
    /// The host has no space for a write, which the guest is not told: it is held.
    DiskFull {
        /// Whether the VM is to be paused until there is.
        pause: bool,
        /// Bytes of the write.
        needed_bytes: u64,
        /// Bytes that the host's file system has, as far as it says.
        free_bytes: Option<u64>,
        /// The host's error.
        error: String,
    },
    /// No write is held any more.
    DiskResumed {
        /// What became of those that were.
        outcome: HoldOutcome,
    },
    /// A balloon moved, or has stopped.
    Balloon {
        /// Which of these.
        news: BalloonNews,
        /// Bytes the guest is asked to give.
        target_bytes: u64,
        /// Bytes it says it has given.
        actual_bytes: u64,
    },
    /// An event that was too many to be told, after which what is published of the device is out
    /// of date all the same.
    Unsaid,
    /// The device can't go on and has set DEVICE_NEEDS_RESET.
    Failed {
        /// Why, for a person.
        reason: String,
    },
}

impl DeviceEvent {
    /// Whether what is published of the device changes with it.
    fn changes_status(&self) -> bool {
        matches!(self, Self::Activated | Self::Balloon { .. })
    }
}

/// What became of the writes for which the host had no space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HoldOutcome {
    /// All were done.
    Done,
    /// The driver reset the device, or the device is gone: some were never done, as after any
    /// reset.
    Reset,
    /// Some took too long, or failed for another reason; the guest was told.
    Reported,
}

impl HoldOutcome {
    /// Its name in events.
    pub fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Reset => "reset",
            Self::Reported => "reported",
        }
    }
}

/// What a balloon has to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalloonNews {
    /// The guest is on its way; told at most once a second.
    Progress,
    /// The guest has given what it is asked for.
    Reached,
    /// The guest comes no closer.
    Stalled,
}

/// Takes the events of all devices; called on device and vCPU threads, must not block.
pub type EventSink = Arc<dyn Fn(&str, DeviceEvent) + Send + Sync>;

/// A device's way to report: knows its id, and limits what a guest can provoke.
#[derive(Clone)]
pub struct Reporter {
    id: Arc<str>,
    sink: EventSink,
    io_errors: Arc<Throttle>,
    full: Arc<Throttle>,
    others: Arc<Throttle>,
}

/// I/O errors reported per device and second; the rest are counted.
const IO_ERRORS_PER_SECOND: u32 = 10;
/// Times that a disk is reported full, per device and second; a guest can have it held, reset the
/// disk and begin anew.
const FULL_PER_SECOND: u32 = 5;
/// All other events per device and second; a driver that takes and resets its device in a loop
/// must not push everything else out of the event ring.
const OTHERS_PER_SECOND: u32 = 50;

impl Reporter {
    /// A reporter for the device `id`.
    pub fn new(id: &str, sink: EventSink) -> Self {
        let per_second = |most| Arc::new(Throttle::new(most, Duration::from_secs(1)));
        Self {
            id: id.into(),
            sink,
            io_errors: per_second(IO_ERRORS_PER_SECOND),
            full: per_second(FULL_PER_SECOND),
            others: per_second(OTHERS_PER_SECOND),
        }
    }

    /// A reporter that nobody listens to, for tests and benchmarks.
    pub fn silent() -> Self {
        Self::new("silent", Arc::new(|_, _| {}))
    }

    /// The device's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Reports an event, at most [`OTHERS_PER_SECOND`] a second. Beyond that nothing is told, but
    /// where the event changes what is published, its being out of date still is.
    pub fn report(&self, event: DeviceEvent) {
        if self.others.pass().is_some() {
            (self.sink)(&self.id, event);
        } else if event.changes_status() {
            (self.sink)(&self.id, DeviceEvent::Unsaid);
        }
    }

    /// Reports that a disk is full, at most [`FULL_PER_SECOND`] a second; whether it was.
    pub fn disk_full(&self, event: impl FnOnce() -> DeviceEvent) -> bool {
        let pass = self.full.pass().is_some();
        if pass {
            (self.sink)(&self.id, event());
        }
        pass
    }

    /// Reports the end of what [`Reporter::disk_full`] reported.
    pub fn disk_resumed(&self, outcome: HoldOutcome) {
        (self.sink)(&self.id, DeviceEvent::DiskResumed { outcome });
    }

    /// Reports a failed request, at most [`IO_ERRORS_PER_SECOND`] a second.
    pub fn io_error(&self, operation: &'static str, offset_bytes: u64, error: &dyn ToString) {
        if let Some(suppressed) = self.io_errors.pass() {
            let event = DeviceEvent::IoError {
                operation,
                offset_bytes,
                error: error.to_string(),
                suppressed,
            };
            (self.sink)(&self.id, event);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn a_storm_of_io_errors_is_reported_a_few_times_and_counted() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = seen.clone();
        let reporter = Reporter::new(
            "disk",
            Arc::new(move |_, event| sink.lock().unwrap().push(event)),
        );
        for offset in 0..1000 {
            reporter.io_error("read", offset, &"EIO");
        }
        let reported = seen.lock().unwrap().len();
        assert!(reported >= 10, "the first ones are reported");
        assert!(reported < 1000, "a storm is not");
    }

    #[test]
    fn what_changes_the_status_is_never_lost_in_a_storm() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = seen.clone();
        let reporter = Reporter::new(
            "disk",
            Arc::new(move |_, event| sink.lock().unwrap().push(event)),
        );
        for _ in 0..500 {
            reporter.report(DeviceEvent::Reset);
        }
        let told = seen.lock().unwrap().len();
        assert!(told < 500, "a storm of resets is not told in full");
        reporter.report(DeviceEvent::Reset);
        reporter.report(DeviceEvent::Activated);
        let seen = seen.lock().unwrap();
        let last = seen.last().unwrap();
        assert!(
            matches!(last, DeviceEvent::Unsaid | DeviceEvent::Activated),
            "the last activation changes what is published: {last:?}"
        );
    }
}

//! What devices and the guest report to the VMM, without ever blocking or queueing without bound.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Instant;

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
    /// The device can't go on and has set DEVICE_NEEDS_RESET.
    Failed {
        /// Why, for a person.
        reason: String,
    },
}

/// Takes the events of all devices; called on device and vCPU threads, must not block.
pub type EventSink = Arc<dyn Fn(&str, DeviceEvent) + Send + Sync>;

/// A device's way to report: knows its id, and limits what a guest can provoke.
#[derive(Clone)]
pub struct Reporter {
    id: Arc<str>,
    sink: EventSink,
    io_errors: Arc<Mutex<Limit>>,
}

struct Limit {
    window: Instant,
    reported: u32,
    suppressed: u64,
}

/// I/O errors reported per device and second; the rest are counted.
const IO_ERRORS_PER_SECOND: u32 = 10;

impl Reporter {
    /// A reporter for the device `id`.
    pub fn new(id: &str, sink: EventSink) -> Self {
        Self {
            id: id.into(),
            sink,
            io_errors: Arc::new(Mutex::new(Limit {
                window: Instant::now(),
                reported: 0,
                suppressed: 0,
            })),
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

    /// Reports an event.
    pub fn report(&self, event: DeviceEvent) {
        (self.sink)(&self.id, event);
    }

    /// Reports a failed request, at most [`IO_ERRORS_PER_SECOND`] a second.
    pub fn io_error(&self, operation: &'static str, offset_bytes: u64, error: &dyn ToString) {
        let suppressed = {
            let mut limit = self
                .io_errors
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if limit.window.elapsed().as_secs() >= 1 {
                limit.window = Instant::now();
                limit.reported = 0;
            }
            if limit.reported >= IO_ERRORS_PER_SECOND {
                limit.suppressed += 1;
                return;
            }
            limit.reported += 1;
            std::mem::take(&mut limit.suppressed)
        };
        self.report(DeviceEvent::IoError {
            operation,
            offset_bytes,
            error: error.to_string(),
            suppressed,
        });
    }
}

#[cfg(test)]
mod tests {
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
}

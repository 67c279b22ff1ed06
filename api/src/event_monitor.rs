//! `--event-monitor`: events written to a file, FIFO or inherited descriptor, as libvirt reads
//! them: pretty JSON and an empty line after each.
//!
//! Opening a FIFO waits for its reader. Writing never blocks the process: while the reader does
//! not keep up, events wait in the ring of `vmm::event`, and what falls out of that is counted and
//! told. A write that took only a part is continued, so that the framing survives.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use tokio::sync::broadcast::{
    Receiver,
    error::{RecvError, TryRecvError},
};
use vmm::Handle;
use vmm::event::{Event, Events, Timestamp};

use crate::cli::Target;
use crate::raw::WatchedFile;
use crate::routes::events::events_lost;
use crate::{json, raw};

/// Where events are written, and those that are not written yet.
pub struct EventMonitor {
    file: File,
    events: Receiver<Event>,
}

impl EventMonitor {
    /// Opens the target; waits until a FIFO has a reader. Called at the start, by the only thread.
    pub fn open(target: &Target, events: &Events) -> io::Result<Self> {
        let file = match target {
            Target::Path(path) => open(path)?,
            Target::Descriptor(number) => File::from(raw::adopt(*number)?),
        };
        fcntl_setfl(&file, fcntl_getfl(&file)? | OFlags::NONBLOCK)?;
        Ok(Self {
            file,
            events: events.subscribe(),
        })
    }

    /// Another descriptor for the same target, for what must be written when the process dies.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.file.try_clone().map(OwnedFd::from)
    }

    /// Prepares writing; called inside the runtime, before the main thread's filter is installed.
    pub fn into_writer(self) -> io::Result<Writer> {
        let output = match WatchedFile::new(self.file) {
            Ok(file) => Output::Waiting(file),
            // A regular file can't be waited for, and is always ready.
            Err((file, error)) if error.raw_os_error() == Some(libc::EPERM) => Output::Ready(file),
            Err((_, error)) => return Err(error),
        };
        Ok(Writer {
            output,
            events: self.events,
            lost: 0,
            last: Timestamp { secs: 0, nanos: 0 },
        })
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

enum Output {
    Waiting(WatchedFile),
    Ready(File),
}

/// Writes events as they come.
pub struct Writer {
    output: Output,
    events: Receiver<Event>,
    lost: u64,
    last: Timestamp,
}

impl Writer {
    /// Writes until the process ends, then what was emitted on the way out.
    pub async fn run(mut self, handle: Handle) {
        let ended = handle.ended();
        tokio::pin!(ended);
        loop {
            let received = tokio::select! {
                biased;
                received = self.events.recv() => received,
                () = &mut ended => break,
            };
            match received {
                Ok(event) => self.write(event).await,
                Err(RecvError::Lagged(lost)) => self.lost += lost,
                Err(RecvError::Closed) => return,
            }
        }
        loop {
            match self.events.try_recv() {
                Ok(event) => self.write(event).await,
                Err(TryRecvError::Lagged(lost)) => self.lost += lost,
                Err(TryRecvError::Empty | TryRecvError::Closed) => return,
            }
        }
    }

    async fn write(&mut self, event: Event) {
        self.last = event.timestamp;
        if self.lost > 0 && self.write_one(&events_lost(self.lost, self.last)).await {
            self.lost = 0;
        }
        if !self.write_one(&event).await {
            self.lost += 1;
        }
    }

    /// Writes one event; false when it could not be.
    async fn write_one(&self, event: &Event) -> bool {
        let Ok(mut bytes) = json::to_vec_pretty(event) else {
            return false;
        };
        bytes.extend_from_slice(b"\n\n");
        match self.write_all(&bytes).await {
            Ok(()) => true,
            Err(error) => {
                // Most often the reader is gone; it may come back.
                tracing::debug!(%error, "an event could not be written to the event monitor");
                false
            }
        }
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let result = match &self.output {
                Output::Waiting(file) => file.write(bytes).await,
                Output::Ready(file) => (&*file).write(bytes),
            };
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::IntoRawFd;
    use std::time::{Duration, Instant};

    use serde_json::Value;

    use super::*;

    fn parse(text: &str) -> Vec<Value> {
        assert!(text.ends_with("}\n\n"), "{text:?}");
        text.split_terminator("\n\n")
            .map(|part| serde_json::from_str(part).unwrap())
            .collect()
    }

    /// Runs a monitor over `target` while `emit` emits; then ends it and waits for it.
    fn monitor(target: &Target, emit: impl AsyncFnOnce(&Events)) {
        let events = Events::new(Instant::now());
        let monitor = EventMonitor::open(target, &events).unwrap();
        let (handle, endpoint) = vmm::command::channel(events.clone());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let task = tokio::spawn(monitor.into_writer().unwrap().run(handle));
            emit(&events).await;
            endpoint.ended.send(true).unwrap();
            task.await.unwrap();
        });
    }

    #[test]
    fn events_are_pretty_json_with_an_empty_line_after_each() {
        let file = tempfile::NamedTempFile::new().unwrap();
        monitor(&Target::Path(file.path().into()), async |events| {
            events.emit("vmm", "starting", &[]);
            events.emit("vm", "device-removed", &[("id", "d\u{e4}")]);
        });
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!(text.starts_with("{\n  \"timestamp\": {\n    \"secs\": 0,"));
        let events = parse(&text);
        assert_eq!(events.len(), 2);
        assert_eq!(events[0]["event"], "starting");
        assert_eq!(events[0]["properties"], Value::Null);
        assert_eq!(events[1]["properties"]["id"], "d\u{e4}");
        assert!(text.is_ascii());
    }

    #[test]
    fn a_reader_that_is_slow_gets_whole_events_and_the_number_of_the_lost() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let target = Target::Descriptor(std::os::fd::OwnedFd::from(writer).into_raw_fd());
        let mut text = String::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                monitor(&target, async |events| {
                    // Far more than the pipe and the ring hold, in pieces larger than PIPE_BUF.
                    let long = "x".repeat(9000);
                    for _ in 0..1000 {
                        events.emit("vm", "io-error", &[("long", &long)]);
                        tokio::task::yield_now().await;
                    }
                });
            });
            std::thread::sleep(Duration::from_millis(300));
            reader.read_to_string(&mut text).unwrap();
        });
        let events = parse(&text);
        let lost: u64 = events
            .iter()
            .filter(|event| event["event"] == "events-lost")
            .map(|event| {
                event["properties"]["count"]
                    .as_str()
                    .unwrap()
                    .parse::<u64>()
                    .unwrap()
            })
            .sum();
        let told = events.iter().filter(|e| e["event"] == "io-error").count() as u64;
        assert!(lost > 0);
        assert_eq!(told + lost, 1000);
    }

    #[test]
    fn opening_a_fifo_waits_for_its_reader() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        let reader_path = path.clone();
        let reader = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            std::fs::read_to_string(reader_path).unwrap()
        });
        let before = Instant::now();
        monitor(&Target::Path(path), async |events| {
            assert!(before.elapsed() >= Duration::from_millis(90));
            events.emit("vmm", "starting", &[]);
        });
        assert_eq!(parse(&reader.join().unwrap()).len(), 1);
    }

    #[test]
    fn a_reader_that_went_away_does_no_harm() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let target = Target::Descriptor(std::os::fd::OwnedFd::from(writer).into_raw_fd());
        monitor(&target, async |events| {
            events.emit("vmm", "starting", &[]);
            tokio::task::yield_now().await;
            events.emit("vmm", "shutdown", &[]);
        });
    }
}

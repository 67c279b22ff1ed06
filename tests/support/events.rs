//! The event stream (`vm.events`), read by a thread as it comes; and what an event monitor's file
//! holds.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use serde_json::Value;

use super::PATIENCE;
use super::http::{Client, header};

/// A subscription. It ends when the process ends or this is dropped.
#[derive(Debug)]
pub struct Events {
    seen: Arc<(Mutex<Vec<Value>>, Condvar)>,
    stream: std::os::unix::net::UnixStream,
}

/// A place in the stream: only what comes after it counts.
#[derive(Clone, Copy, Debug)]
pub struct Mark(usize);

impl Mark {
    /// Where the stream begins.
    pub const START: Self = Self(0);
}

impl Events {
    /// Subscribes: all events from now on are kept.
    pub fn subscribe(socket: &Path) -> Self {
        let mut client = Client::connect(socket).expect("connect for events");
        client
            .send(b"GET /api/v1/vm.events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
            .expect("ask for events");
        let head = client.head().expect("an answer");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        let content_type = header(&head, "Content-Type").unwrap_or_default();
        assert!(content_type.starts_with("text/event-stream"), "{head}");
        let (stream, received) = client.into_parts();
        stream.set_read_timeout(None).expect("no timeout");
        let seen: Arc<(Mutex<Vec<Value>>, Condvar)> = Arc::default();
        let reader = stream.try_clone().expect("clone");
        let sink = seen.clone();
        std::thread::spawn(move || {
            let bytes = std::io::Cursor::new(received).chain(reader);
            for line in BufReader::new(Dechunked::new(bytes)).lines() {
                let Ok(line) = line else { break };
                let Some(data) = line.strip_prefix("data:") else {
                    continue;
                };
                if let Ok(event) = serde_json::from_str(data) {
                    lock(&sink.0).push(event);
                    sink.1.notify_all();
                }
            }
        });
        Self { seen, stream }
    }

    /// All events so far.
    pub fn all(&self) -> Vec<Value> {
        lock(&self.seen.0).clone()
    }

    /// `source:event` of all events so far.
    pub fn names(&self) -> Vec<String> {
        self.all().iter().map(name).collect()
    }

    /// The place where the stream stands now.
    pub fn mark(&self) -> Mark {
        Mark(lock(&self.seen.0).len())
    }

    /// Waits for an event of this name from anywhere in the stream.
    #[track_caller]
    pub fn wait_for(&self, event: &str) -> Value {
        self.wait_after(Mark::START, event, |_| true)
    }

    /// Waits for an event of this name after `mark` that `accept` takes.
    #[track_caller]
    pub fn wait_after(&self, mark: Mark, event: &str, accept: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        let mut seen = lock(&self.seen.0);
        loop {
            let found = seen
                .iter()
                .skip(mark.0)
                .find(|e| e["event"] == event && accept(e));
            if let Some(found) = found {
                return found.clone();
            }
            let left = PATIENCE.checked_sub(start.elapsed()).unwrap_or_else(|| {
                let names: Vec<String> = seen.iter().map(name).collect();
                panic!("no event `{event}` came, only {names:?}")
            });
            seen = self
                .seen
                .1
                .wait_timeout(seen, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for an event about the device `id`.
    #[track_caller]
    pub fn wait_for_device(&self, mark: Mark, event: &str, id: &str) -> Value {
        self.wait_after(mark, event, |e| e["properties"]["id"] == id)
    }

    /// Panics unless the events of these names came in this order, others between them or not.
    #[track_caller]
    pub fn assert_order(&self, expected: &[&str]) {
        let names = self.names();
        let mut rest = names.iter();
        for expected in expected {
            assert!(
                rest.any(|name| name == expected),
                "`{expected}` is missing or out of order in {names:?}"
            );
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// `source:event`.
pub fn name(event: &Value) -> String {
    format!(
        "{}:{}",
        event["source"].as_str().unwrap_or("?"),
        event["event"].as_str().unwrap_or("?")
    )
}

/// The events in an event monitor's output: objects with an empty line after each.
pub fn parse_monitor(text: &str) -> Vec<Value> {
    text.split("\n\n")
        .filter(|object| !object.trim().is_empty())
        .map_while(|object| serde_json::from_str(object).ok())
        .collect()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Undoes chunked transfer coding.
struct Dechunked<R> {
    inner: BufReader<R>,
    left: usize,
}

impl<R: Read> Dechunked<R> {
    fn new(inner: R) -> Self {
        Self {
            inner: BufReader::new(inner),
            left: 0,
        }
    }
}

impl<R: Read> Read for Dechunked<R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        while self.left == 0 {
            let mut line = String::new();
            if self.inner.read_line(&mut line)? == 0 {
                return Ok(0);
            }
            if line.trim().is_empty() {
                continue; // The end of the last chunk.
            }
            self.left = usize::from_str_radix(line.trim(), 16).map_err(std::io::Error::other)?;
            if self.left == 0 {
                return Ok(0);
            }
        }
        let most = into.len().min(self.left);
        let count = self.inner.read(&mut into[..most])?;
        self.left -= count;
        Ok(count)
    }
}

//! The console thread: writes the guest's output in batches, reads the host's input, accepts
//! clients.
//!
//! ```text
//!             first byte (eventfd)            nothing new for LINGER
//!   waiting ─────────────────────► lingering ────────────────────────► waiting
//!      ▲                            │      ▲   writes what has come
//!      │          EAGAIN            ▼      │   every LINGER
//!      └────────────────────────  blocked ─┘ writable again
//! ```
//!
//! The first byte of a burst goes out at once; the rest, which a guest writes at one VM exit per
//! byte, goes out in pieces every few milliseconds, so that a boot log costs the vCPU no wake-ups.
//!
//! The thread runs in a [`Worker`](crate::worker::Worker), whose loop watches one descriptor of
//! ours: an epoll of our own with all that changes in it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::SendFlags;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::host::{How, Writer};
use super::shared::Shared;
use crate::event::Reporter;
use crate::virtio::Activation;
use crate::worker::{Handler, Source, WorkerError};

/// How long the thread goes on collecting output by itself before it asks to be woken.
const LINGER: Duration = Duration::from_millis(2);
/// When to try a terminal again that belongs to somebody else just now (EIO).
const RETRY: Duration = Duration::from_secs(1);
/// Most bytes written at a time.
const CHUNK: usize = 16 << 10;
/// Most bytes written at a time to a descriptor that may block: no more than a terminal that
/// reports room has room for.
const CAREFUL_CHUNK: usize = 256;
/// Input kept beyond the UART's FIFO; more stays with its sender.
const BACKLOG: usize = 4 << 10;
/// Dropped output is logged this often at most.
const DROP_LOG_INTERVAL: Duration = Duration::from_secs(10);

const WAKE: u64 = 0;
const TIMER: u64 = 1;
const READER: u64 = 2;
const WRITER: u64 = 3;
const LISTENER: u64 = 4;

/// One end of the host's side and whether it is being watched.
struct Watched<T> {
    end: T,
    watched: bool,
}

pub(super) struct Console {
    shared: Arc<Shared>,
    reporter: Reporter,
    epoll: Epoll,
    timer: TimerFd,
    reader: Option<Watched<OwnedFd>>,
    writer: Option<Watched<Writer>>,
    listener: Option<OwnedFd>,
    /// Taken from the ring; what is before `written` is out.
    chunk: Vec<u8>,
    written: usize,
    /// Read from the host, not yet taken by the device.
    backlog: VecDeque<u8>,
    /// The terminal is somebody else's; do not read until the timer says so.
    retrying: bool,
    logged_drops: (u64, Option<Instant>),
    /// Signals are blocked once, by the thread itself.
    signals_blocked: bool,
}

impl Console {
    pub(super) fn new(
        shared: Arc<Shared>,
        reporter: Reporter,
        reader: Option<OwnedFd>,
        writer: Option<Writer>,
        listener: Option<OwnedFd>,
    ) -> io::Result<Self> {
        let mut console = Self {
            epoll: Epoll::new()?,
            timer: TimerFd::new()?,
            reader: None,
            writer: None,
            listener,
            shared,
            reporter,
            chunk: Vec::new(),
            written: 0,
            backlog: VecDeque::new(),
            retrying: false,
            logged_drops: (0, None),
            signals_blocked: false,
        };
        let input = EventSet::IN;
        console.add(console.shared.wake_fd().as_raw_fd(), WAKE, input)?;
        console.add(console.timer.as_raw_fd(), TIMER, input)?;
        if let Some(listener) = &console.listener {
            console.add(listener.as_raw_fd(), LISTENER, input)?;
        }
        console.adopt(reader, writer)?;
        Ok(console)
    }

    fn add(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
    }

    /// Takes a new pair of ends; files can't be watched and need not be.
    fn adopt(&mut self, reader: Option<OwnedFd>, writer: Option<Writer>) -> io::Result<()> {
        self.drop_reader();
        self.drop_writer();
        // The reader is watched only while there is room for what it brings.
        self.reader = reader.map(|end| Watched {
            end,
            watched: false,
        });
        if let Some(end) = writer {
            // With no interest at all, HUP and ERR are still reported.
            let watched = match self.add(end.fd.as_raw_fd(), WRITER, EventSet::empty()) {
                Ok(()) => true,
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => false,
                Err(error) => return Err(error),
            };
            self.writer = Some(Watched { end, watched });
        }
        Ok(())
    }

    fn unwatch(&self, fd: &OwnedFd) {
        // Fails only for a descriptor that was not watched.
        let _ = self.epoll.ctl(
            ControlOperation::Delete,
            fd.as_raw_fd(),
            EpollEvent::default(),
        );
    }

    fn drop_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            self.unwatch(&reader.end);
        }
    }

    fn drop_writer(&mut self) {
        if let Some(writer) = self.writer.take() {
            self.unwatch(&writer.end.fd);
            if self.listener.is_none() {
                // Standard output was closed: nobody will ever read again.
                self.shared.discard();
                self.chunk.clear();
                self.written = 0;
            }
        }
    }

    fn handle(&mut self, token: u64, events: EventSet) -> Result<(), WorkerError> {
        match token {
            WAKE => {
                let _ = self.shared.wake_fd().read();
            }
            TIMER => {
                let _ = self.timer.wait();
                self.retrying = false;
            }
            READER => self.read_once(),
            WRITER => {
                if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
                    self.drop_writer();
                } else {
                    self.watch_writer(EventSet::empty());
                    self.write_chunk(true);
                }
            }
            LISTENER => self.accept()?,
            _ => {}
        }
        Ok(())
    }

    /// Looks at both directions; idempotent.
    fn pump(&mut self) -> Result<(), WorkerError> {
        self.pump_input();
        let drained = self.pump_output();
        self.log_drops();
        let next = if drained {
            Some(LINGER)
        } else {
            self.retrying.then_some(RETRY)
        };
        if let Some(delay) = next {
            self.timer
                .reset(delay, None)
                .map_err(|e| WorkerError::new("arming the console's timer", e))?;
        }
        Ok(())
    }

    /// Writes all there is; whether to look again soon, without being woken.
    fn pump_output(&mut self) -> bool {
        let mut any = false;
        loop {
            if self.writer.is_none() {
                // The ring keeps the newest until a client comes. No wake-ups meanwhile.
                return false;
            }
            if self.written == self.chunk.len() {
                self.chunk.clear();
                self.written = 0;
                if self.shared.take(CHUNK, &mut self.chunk) == 0 {
                    return any || !self.shared.rearm();
                }
                any = true;
            }
            if !self.write_chunk(false) {
                return false;
            }
        }
    }

    /// Writes what is left of the chunk; `false` when it has to wait (the writer is then
    /// watched). `ready` says that the descriptor has just been found writable.
    fn write_chunk(&mut self, ready: bool) -> bool {
        let mut may_write = ready;
        while let Some(writer) = &mut self.writer {
            let Some(rest) = self.chunk.get(self.written..).filter(|r| !r.is_empty()) else {
                return true;
            };
            if writer.end.how == How::Careful && writer.watched {
                if !may_write {
                    self.watch_writer(EventSet::OUT);
                    return false;
                }
                may_write = false;
            }
            match write(&mut writer.end, rest) {
                // A device that takes nothing would have us try for ever.
                Ok(0) => self.write_failed(Errno::IO),
                Ok(count) => {
                    self.written += count;
                    self.shared.set_written();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.watch_writer(EventSet::OUT);
                    return false;
                }
                Err(error) => self.write_failed(error),
            }
        }
        false
    }

    fn write_failed(&mut self, error: Errno) {
        let Some(writer) = &self.writer else { return };
        if matches!(writer.end.how, How::File { .. }) {
            // A full disk may get room again; what could not be written meanwhile is lost.
            self.reporter.io_error("write", 0, &error);
            self.shared.count_dropped(self.chunk.len() - self.written);
            self.written = self.chunk.len();
        } else {
            self.drop_writer();
        }
    }

    fn watch_writer(&self, events: EventSet) {
        if let Some(writer) = &self.writer
            && writer.watched
        {
            // Fails only for a descriptor that is not watched.
            let _ = self.epoll.ctl(
                ControlOperation::Modify,
                writer.end.fd.as_raw_fd(),
                EpollEvent::new(events, WRITER),
            );
        }
    }

    /// Hands input to the device, and listens for more while there is room for it.
    fn pump_input(&mut self) {
        let Some(port) = self.shared.port() else {
            // Between two boots input stays with its sender.
            self.watch_reader(false);
            return;
        };
        loop {
            while !self.backlog.is_empty() {
                let taken = port.offer(self.backlog.as_slices().0);
                if taken == 0 {
                    break;
                }
                self.backlog.drain(..taken);
            }
            let room = self.backlog.len() < BACKLOG && !self.retrying;
            if self.watch_reader(room) || !room || self.reader.is_none() {
                return;
            }
            // A file is always readable, and can't be watched.
            self.read_once();
        }
    }

    /// Starts or stops watching; `false` for a reader that can't be watched.
    fn watch_reader(&mut self, watch: bool) -> bool {
        let Some(reader) = &self.reader else {
            return true;
        };
        if reader.watched == watch {
            return true;
        }
        let result = if watch {
            self.add(reader.end.as_raw_fd(), READER, EventSet::IN)
        } else {
            self.unwatch(&reader.end);
            Ok(())
        };
        if let Some(reader) = &mut self.reader {
            reader.watched = watch && result.is_ok();
        }
        result.map_or_else(|error| error.raw_os_error() != Some(libc::EPERM), |()| true)
    }

    fn read_once(&mut self) {
        let Some(reader) = &self.reader else { return };
        let mut bytes = [0; BACKLOG];
        match rustix::io::read(&reader.end, &mut bytes[..]) {
            Ok(0) => self.drop_reader(),
            Ok(count) => self.backlog.extend(bytes.iter().take(count)),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::IO) => {
                self.retrying = true;
                self.watch_reader(false);
            }
            Err(_) => self.drop_reader(),
        }
    }

    /// Takes a new client. The last one to come has the console: a forgotten connection must not
    /// lock everybody out.
    fn accept(&mut self) -> Result<(), WorkerError> {
        let Some(listener) = &self.listener else {
            return Ok(());
        };
        let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
        let client = match rustix::net::accept_with(listener, flags) {
            Ok(client) => client,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return Ok(()),
            // No descriptors left, perhaps: an event, not a busy loop.
            Err(error) => {
                self.unwatch(listener);
                return Err(WorkerError::new("accepting a console client", error));
            }
        };
        let reader = match rustix::io::fcntl_dupfd_cloexec(&client, 3) {
            Ok(reader) => reader,
            Err(error) => {
                tracing::warn!(device = self.reporter.id(), %error, "a client was turned away");
                return Ok(());
            }
        };
        // What the one before said last is not lost.
        if self.backlog.len() < BACKLOG {
            self.read_once();
        }
        // Half a chunk may have gone to the old client; the new one starts at a whole byte anyway.
        let writer = Writer {
            fd: client,
            how: How::Socket,
        };
        self.adopt(Some(reader), Some(writer))
            .map_err(|e| WorkerError::new("watching a console client", e))
    }

    fn log_drops(&mut self) {
        let dropped = self.shared.dropped();
        let (logged, when) = self.logged_drops;
        if dropped > logged && when.is_none_or(|w| w.elapsed() > DROP_LOG_INTERVAL) {
            tracing::warn!(
                device = self.reporter.id(),
                bytes = dropped - logged,
                "output was dropped, as nobody took it fast enough"
            );
            self.logged_drops = (dropped, Some(Instant::now()));
        }
    }

    /// A terminal that belongs to another job would otherwise stop the whole process (SIGTTIN,
    /// SIGTTOU); blocked, the calls fail with EIO or just work.
    fn block_terminal_signals(&mut self) {
        if !std::mem::replace(&mut self.signals_blocked, true) {
            for signal in [libc::SIGTTIN, libc::SIGTTOU] {
                // Can fail only for a signal that does not exist.
                let _ = vmm_sys_util::signal::block_signal(signal);
            }
        }
    }
}

fn write(writer: &mut Writer, bytes: &[u8]) -> rustix::io::Result<usize> {
    match writer.how {
        How::File { truncate } => {
            if truncate {
                rustix::fs::ftruncate(&writer.fd, 0)?;
                writer.how = How::File { truncate: false };
            }
            rustix::io::write(&writer.fd, bytes)
        }
        How::NonBlocking => rustix::io::write(&writer.fd, bytes),
        How::Careful => rustix::io::write(&writer.fd, bytes.get(..CAREFUL_CHUNK).unwrap_or(bytes)),
        How::Socket => {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            rustix::net::send(&writer.fd, bytes, flags)
        }
    }
}

impl Handler for Console {
    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.epoll.as_raw_fd()]
    }

    fn activate(&mut self, _: Activation) -> Result<(), WorkerError> {
        Err(WorkerError("a console has no queues".into()))
    }

    fn ready(&mut self, _: Source) -> Result<(), WorkerError> {
        self.block_terminal_signals();
        let mut events = [EpollEvent::default(); 8];
        let ready = match self.epoll.wait(0, &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(WorkerError::new("waiting for the console", error)),
        };
        let ready = events.get(..ready).unwrap_or_default();
        // A new client comes last, so that no event of the old one is taken for one of its own.
        let (new_clients, others): (Vec<&EpollEvent>, Vec<&EpollEvent>) =
            ready.iter().partition(|event| event.data() == LISTENER);
        for event in others.into_iter().chain(new_clients) {
            self.handle(event.data(), event.event_set())?;
        }
        self.pump()
    }

    fn quiesce(&mut self) -> Result<(), WorkerError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), WorkerError> {
        Ok(())
    }

    /// The thread ends: what can be written without waiting still goes out.
    fn reset(&mut self) {
        self.pump_output();
    }
}

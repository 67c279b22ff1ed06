//! The host's end of a guest's serial line: what the guest prints, and the agent in our initramfs
//! that runs commands (scripts/lib/guest-agent tells its protocol).

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::{PATIENCE, http::find, within};

/// What the initramfs prints when the agent listens.
pub const READY: &str = "BALLAST-GUEST-READY";

/// A serial line. A thread reads it all the time, so the guest never waits for us.
pub struct Agent {
    shared: Arc<Shared>,
    next_id: AtomicU64,
}

#[derive(Default)]
struct Shared {
    line: Mutex<Line>,
    news: Condvar,
    end: AtomicBool,
}

#[derive(Default)]
struct Line {
    received: Vec<u8>,
    writer: Option<Box<dyn Write + Send>>,
    first_byte: Option<Instant>,
}

/// A place in what the guest printed.
#[derive(Clone, Copy, Debug)]
pub struct Mark(usize);

type Ends = (Box<dyn Read + Send>, Box<dyn Write + Send>);

impl Agent {
    /// Connects to `serial: {mode: Socket}`, and again whenever the line is cut.
    pub fn on_socket(path: &Path) -> Self {
        let path = path.to_owned();
        let agent = Self::read_from(move || {
            let stream = UnixStream::connect(&path).ok()?;
            Some((Box::new(stream.try_clone().ok()?), Box::new(stream)))
        });
        within(PATIENCE, || agent.lock().writer.is_some().then_some(()))
            .expect("the serial socket takes a connection");
        agent
    }

    /// Opens the terminal of `serial: {mode: Pty}`.
    pub fn on_terminal(path: &Path) -> Self {
        let path = path.to_owned();
        let agent = Self::read_from(move || open_terminal(&path));
        within(PATIENCE, || agent.lock().writer.is_some().then_some(()))
            .expect("the terminal can be opened");
        agent
    }

    /// Speaks over two ends, as of a process's standard input and output.
    pub fn over(reader: impl Read + Send + 'static, writer: impl Write + Send + 'static) -> Self {
        let mut ends: Option<Ends> = Some((Box::new(reader), Box::new(writer)));
        Self::read_from(move || ends.take())
    }

    fn read_from(mut connect: impl FnMut() -> Option<Ends> + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let agent = Self {
            shared: shared.clone(),
            next_id: AtomicU64::new(1),
        };
        std::thread::spawn(move || {
            while !shared.end.load(Ordering::Relaxed) {
                if let Some((reader, writer)) = connect() {
                    shared.lock().writer = Some(writer);
                    shared.read_to_end(reader);
                    shared.lock().writer = None;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        agent
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.shared.lock()
    }

    /// The place where the line stands now.
    pub fn mark(&self) -> Mark {
        Mark(self.lock().received.len())
    }

    /// All the guest printed.
    pub fn transcript(&self) -> String {
        String::from_utf8_lossy(&self.lock().received).into_owned()
    }

    /// When the guest's first byte came.
    pub fn first_byte(&self) -> Option<Instant> {
        self.lock().first_byte
    }

    /// Waits until the guest has booted and its agent listens.
    #[track_caller]
    pub fn wait_ready(&self) {
        self.wait_for(READY);
    }

    /// The same for a boot that began after `mark`.
    #[track_caller]
    pub fn wait_ready_after(&self, mark: Mark) {
        self.wait_for_after(mark, READY);
    }

    /// Waits until the guest prints `text`, or has printed it.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        self.wait_for_after(Mark(0), text);
    }

    /// Waits until the guest prints `text` after `mark`.
    #[track_caller]
    pub fn wait_for_after(&self, mark: Mark, text: &str) {
        self.wait(mark.0, &format!("`{text}`"), |received| {
            find(received, text.as_bytes())
        });
    }

    #[track_caller]
    fn wait<T>(&self, from: usize, what: &str, mut look: impl FnMut(&[u8]) -> Option<T>) -> T {
        let start = Instant::now();
        let mut line = self.lock();
        loop {
            if let Some(found) = look(line.received.get(from..).unwrap_or_default()) {
                return found;
            }
            let Some(left) = PATIENCE.checked_sub(start.elapsed()) else {
                let text = String::from_utf8_lossy(&line.received).into_owned();
                let tail = text.char_indices().rev().nth(3000).map_or(0, |(at, _)| at);
                drop(line);
                panic!(
                    "the guest never said {what}; the line ends with:\n{}",
                    &text[tail..]
                );
            };
            line = self
                .shared
                .news
                .wait_timeout(line, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Types into the line.
    #[track_caller]
    pub fn type_in(&self, text: &str) {
        let mut line = self.lock();
        let writer = line.writer.as_mut().expect("the line is connected");
        writer.write_all(text.as_bytes()).expect("type");
        writer.flush().expect("type");
    }

    /// Runs a shell command; its exit status and output.
    #[track_caller]
    pub fn run(&self, command: &str) -> (i32, String) {
        self.start(command).finish()
    }

    /// Starts a shell command whose end is waited for later.
    #[track_caller]
    pub fn start<'a>(&'a self, command: &str) -> Running<'a> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}-{id}", std::process::id());
        let from = self.mark().0;
        assert!(!command.contains('\n'), "one line only");
        self.type_in(&format!("RUN {id} {command}\n"));
        Running {
            agent: self,
            from,
            id,
            command: command.to_owned(),
        }
    }

    /// Runs a shell command that must succeed; its output.
    #[track_caller]
    pub fn ok(&self, command: &str) -> String {
        let (status, output) = self.run(command);
        assert_eq!(status, 0, "in the guest, `{command}`: {output}");
        output.trim().to_owned()
    }

    /// Runs a shell command that must fail; its output.
    #[track_caller]
    pub fn fails(&self, command: &str) -> String {
        let (status, output) = self.run(command);
        assert_ne!(status, 0, "in the guest, `{command}`: {output}");
        output
    }

    /// Runs a shell command that prints a number.
    #[track_caller]
    pub fn number(&self, command: &str) -> u64 {
        let output = self.ok(command);
        output
            .parse()
            .unwrap_or_else(|_| panic!("`{command}` is no number: {output}"))
    }
}

/// A command in the guest that may still run.
pub struct Running<'a> {
    agent: &'a Agent,
    from: usize,
    id: String,
    command: String,
}

impl Running<'_> {
    /// Waits until the command has begun.
    #[track_caller]
    pub fn wait_begun(&self) {
        let start = format!("<<<{}\n", self.id);
        self.agent.wait(
            self.from,
            &format!("`{}` begins", self.command),
            |received| find(received, start.as_bytes()),
        );
    }

    /// Waits for the command's end; its exit status and output.
    #[track_caller]
    pub fn finish(self) -> (i32, String) {
        let start = format!("<<<{}\n", self.id);
        let end = format!("\n>>>{} ", self.id);
        let what = format!("the end of `{}`", self.command);
        self.agent.wait(self.from, &what, |received| {
            let begin = find(received, start.as_bytes())? + start.len();
            let output = received.get(begin..)?;
            let finish = find(output, end.as_bytes())?;
            let status = output.get(finish + end.len()..)?;
            let status = status.get(..find(status, b"\n")?)?;
            let status = String::from_utf8_lossy(status).trim().parse().ok()?;
            Some((
                status,
                String::from_utf8_lossy(&output[..finish]).into_owned(),
            ))
        })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Relaxed);
        if std::thread::panicking() {
            let text = self.transcript();
            let tail = text.char_indices().rev().nth(2000).map_or(0, |(at, _)| at);
            eprintln!("--- the serial line ends with:\n{}", &text[tail..]);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_to_end(&self, mut reader: impl Read) {
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = reader.read(&mut chunk) {
            let mut line = self.lock();
            line.first_byte.get_or_insert_with(Instant::now);
            line.received.extend_from_slice(&chunk[..count]);
            self.news.notify_all();
        }
    }
}

/// Opens a terminal that neither echoes nor edits.
fn open_terminal(path: &PathBuf) -> Option<Ends> {
    let terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::NOCTTY.bits().cast_signed())
        .open(path)
        .ok()?;
    let mut attributes = tcgetattr(&terminal).ok()?;
    attributes.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &attributes).ok()?;
    Some((Box::new(terminal.try_clone().ok()?), Box::new(terminal)))
}

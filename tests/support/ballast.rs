//! The real binary, running on a folder of its own, gone when dropped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::events::Events;
use super::http::Client;
use super::procfs::{self, Holdings};
use super::{PATIENCE, eventually, payload, within};

/// A running process.
pub struct Ballast {
    child: Child,
    dir: TempDir,
}

/// What is to be started.
pub struct Launch {
    command: Command,
    dir: TempDir,
}

/// The binary under test.
pub fn binary() -> &'static str {
    env!("CARGO_BIN_EXE_ballast")
}

impl Launch {
    /// The binary with its socket in a new folder.
    pub fn new() -> Self {
        let mut launch = Self::bare();
        let socket = launch.path("api.sock");
        launch.command.arg("--api-socket").arg(socket);
        launch
    }

    /// The binary without arguments.
    pub fn bare() -> Self {
        Self::of(Path::new(binary()))
    }

    /// Another build of the binary, without arguments.
    pub fn of(binary: &Path) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("ballast-")
            .tempdir_in("/tmp")
            .expect("a folder in /tmp");
        let mut command = Command::new(binary);
        command
            .stdin(Stdio::null())
            .stdout(File::create(dir.path().join("stdout")).expect("stdout"))
            .stderr(File::create(dir.path().join("stderr")).expect("stderr"));
        Self { command, dir }
    }

    /// The command, for its arguments and more.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts it, and does not wait for anything.
    pub fn spawn(mut self) -> Ballast {
        let child = self.command.spawn().expect("start ballast");
        Ballast {
            child,
            dir: self.dir,
        }
    }

    /// Starts it and waits until it answers.
    pub fn start(self) -> Ballast {
        let mut ballast = self.spawn();
        ballast.wait_until_it_answers();
        ballast
    }
}

impl Ballast {
    /// Starts the binary and waits until it answers.
    pub fn start() -> Self {
        Launch::new().start()
    }

    fn wait_until_it_answers(&mut self) {
        eventually("the API answers", || {
            if let Some(status) = self.child.try_wait().expect("wait") {
                panic!("ballast ended at once ({status}): {}", self.stderr());
            }
            let mut client = Client::connect(&self.socket()).ok()?;
            let answer = client.try_request("GET", "vmm.ping", None, "").ok()?;
            (answer.status == 200).then_some(())
        });
    }

    /// A new connection.
    #[track_caller]
    pub fn api(&self) -> Client {
        Client::connect(&self.socket()).expect("connect to the API")
    }

    /// A subscription to the events.
    pub fn events(&self) -> Events {
        Events::subscribe(&self.socket())
    }

    /// Where the API is.
    pub fn socket(&self) -> PathBuf {
        self.path("api.sock")
    }

    /// The process's folder.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path in the process's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed to stderr.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.path("stderr")).unwrap_or_default()
    }

    /// What it printed to stdout.
    pub fn stdout(&self) -> String {
        fs::read_to_string(self.path("stdout")).unwrap_or_default()
    }

    /// Its descriptors and threads, once they have stopped changing: it hears of a connection's
    /// end, for one, only a moment later.
    pub fn holdings(&self) -> Holdings {
        let mut last = procfs::holdings(self.pid());
        let mut same = 0;
        eventually("descriptors and threads stay the same", || {
            let now = procfs::holdings(self.pid());
            same = if now == last { same + 1 } else { 0 };
            last = now;
            (same >= 20).then(|| last.clone())
        })
    }

    /// Its standard input and output, if they are pipes.
    #[track_caller]
    pub fn take_streams(&mut self) -> (ChildStdin, ChildStdout) {
        let input = self.child.stdin.take().expect("a pipe as stdin");
        (input, self.child.stdout.take().expect("a pipe as stdout"))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().cast_signed()).expect("a pid");
        kill_process(pid, signal).expect("send a signal");
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let ended = within(PATIENCE, || self.child.try_wait().expect("wait"));
        ended.unwrap_or_else(|| panic!("ballast did not end: {}", self.stderr()))
    }

    /// Waits for its end, which must be an orderly one.
    #[track_caller]
    pub fn wait_for_clean_end(&mut self) {
        let status = self.wait_for_end();
        assert!(status.success(), "{status}: {}", self.stderr());
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// Panics if it has ended or panicked.
    #[track_caller]
    pub fn assert_well(&mut self) {
        assert!(self.is_alive(), "ballast died: {}", self.stderr());
        let stderr = self.stderr();
        assert!(!stderr.contains("panicked at"), "{stderr}");
        assert_eq!(self.api().request("GET", "vmm.ping", None).status, 200);
    }

    /// Ends it without warning and hands out its folder.
    pub fn kill(mut self) -> KilledFolder {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
        // Drop has nothing left to end; the folder outlives it.
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().expect("a folder"));
        KilledFolder(dir)
    }

    /// A configuration of the sleeping guest, which needs no kernel.
    pub fn sleeper(&self) -> Value {
        json!({
            "memory": {"size": 64 << 20},
            "payload": {"kernel": payload::sleeper(self.dir())},
        })
    }
}

/// The folder of a process that was killed.
pub struct KilledFolder(TempDir);

impl KilledFolder {
    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let stderr = self.stderr();
            let tail = stderr.len().saturating_sub(4000);
            eprintln!(
                "--- stderr of ballast ends with:\n{}",
                stderr.get(tail..).unwrap_or(&stderr)
            );
        }
    }
}

//! Child processes: started, timed, their memory read from /proc, ended whatever happens.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::Client;
use crate::{Failure, fail};

/// A child process that is killed when dropped.
pub struct Process {
    child: Child,
    /// When it was started.
    pub started: Instant,
}

impl Process {
    /// Starts it.
    pub fn start(command: &mut Command) -> Result<Self, Failure> {
        let started = Instant::now();
        match command.spawn() {
            Ok(child) => Ok(Self { child, started }),
            Err(error) => fail(format!("{command:?}: {error}")),
        }
    }

    /// Waits for it to end by itself.
    pub fn wait(mut self) -> Result<(), Failure> {
        let status = self.child.wait()?;
        if status.success() {
            return Ok(());
        }
        fail(format!("the process ended with {status}"))
    }

    /// Its input and its output.
    pub fn console(&mut self) -> Result<Console, Failure> {
        let (Some(stdin), Some(stdout)) = (self.child.stdin.take(), self.child.stdout.take())
        else {
            return fail("the process has no pipes");
        };
        Ok(Console::new(stdin, stdout))
    }

    /// Reads a file under /proc/PID.
    fn proc(&self, name: &str) -> Result<String, Failure> {
        Ok(std::fs::read_to_string(format!(
            "/proc/{}/{name}",
            self.child.id()
        ))?)
    }

    /// All of its memory.
    pub fn memory(&self) -> Result<Memory, Failure> {
        Ok(Memory::sum(&self.proc("smaps_rollup")?))
    }

    /// Its memory without the mapping that is the guest's RAM of `ram_bytes`, which must be one
    /// mapping and not merged with a neighbour.
    pub fn memory_beyond(&self, ram_bytes: u64) -> Result<Memory, Failure> {
        let smaps = self.proc("smaps")?;
        let mut beyond = Memory::default();
        let mut rams = 0;
        for mapping in mappings(&smaps) {
            let memory = Memory::sum(mapping);
            if memory.size == ram_bytes {
                rams += 1;
            } else if memory.size > ram_bytes / 2 && memory.rss > ram_bytes / 8 {
                return fail(format!("is this mapping guest RAM, or not?\n{mapping}"));
            } else {
                beyond.rss += memory.rss;
                beyond.pss += memory.pss;
            }
        }
        if rams != 1 {
            return fail(format!("{rams} mappings of the guest RAM's size"));
        }
        Ok(beyond)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes of one mapping, or of all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    size: u64,
    /// Resident.
    pub rss: u64,
    /// Resident, shared pages divided by the number of their users.
    pub pss: u64,
}

impl Memory {
    fn sum(smaps: &str) -> Self {
        let bytes = |name: &str| -> u64 {
            smaps
                .lines()
                .filter_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"))
                .filter_map(|kib| kib.trim().parse::<u64>().ok())
                .map(|kib| kib * 1024)
                .sum()
        };
        Self {
            size: bytes("Size:"),
            rss: bytes("Rss:"),
            pss: bytes("Pss:"),
        }
    }
}

/// The mappings in a /proc/PID/smaps: each ends with its `VmFlags:`.
fn mappings(smaps: &str) -> impl Iterator<Item = &str> {
    smaps.split_inclusive("\nVmFlags:")
}

/// A ballast process that answers.
pub struct Ballast {
    /// The process.
    pub process: Process,
    /// A connection to it.
    pub client: Client,
    /// From before it was started to its first answer.
    pub until_ping: Duration,
    directory: PathBuf,
}

impl Ballast {
    /// Starts `binary` in `directory` and waits for its first answer to `vmm.ping`.
    pub fn start(binary: &Path, directory: &Path) -> Result<Self, Failure> {
        let socket = directory.join("api.sock");
        let process = Process::start(
            Command::new(binary)
                .arg("--api-socket")
                .arg(&socket)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped()),
        )?;
        let mut client = loop {
            if let Ok(client) = Client::connect(&socket) {
                break client;
            }
            if process.started.elapsed() > Duration::from_secs(10) {
                return fail("the API socket did not come up");
            }
            // Short against what is measured, long enough to leave the processor to the child.
            thread::sleep(Duration::from_micros(50));
        };
        client.get("vmm.ping")?;
        Ok(Self {
            until_ping: process.started.elapsed(),
            process,
            client,
            directory: directory.to_owned(),
        })
    }

    /// Ends it the orderly way.
    pub fn shutdown(mut self) -> Result<(), Failure> {
        self.client.put("vmm.shutdown", &Value::Null)?;
        self.process.wait()?;
        if self.directory.join("api.sock").exists() {
            return fail("the socket is still there after vmm.shutdown");
        }
        Ok(())
    }
}

/// A guest's serial line, which is the standard input and output of its VMM.
pub struct Console {
    /// What is typed goes here.
    pub stdin: ChildStdin,
    chunks: Receiver<(Instant, Vec<u8>)>,
    text: String,
    /// When the first byte came.
    pub first_output: Option<Instant>,
}

impl Console {
    fn new(stdin: ChildStdin, mut stdout: impl Read + Send + 'static) -> Self {
        let (sender, chunks) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stdout.read(&mut buffer) {
                let chunk = buffer.get(..count).unwrap_or_default().to_owned();
                if sender.send((Instant::now(), chunk)).is_err() {
                    break;
                }
            }
        });
        Self {
            stdin,
            chunks,
            text: String::new(),
            first_output: None,
        }
    }

    /// Waits until `pattern` has come, and says when; what came before it is returned too, and
    /// forgotten.
    pub fn wait_for(
        &mut self,
        pattern: &str,
        patience: Duration,
    ) -> Result<(Instant, String), Failure> {
        let deadline = Instant::now() + patience;
        let mut arrived = Instant::now();
        loop {
            if let Some(at) = self.text.find(pattern) {
                let rest = self.text.split_off(at + pattern.len());
                let before = std::mem::replace(&mut self.text, rest);
                return Ok((arrived, before));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.chunks.recv_timeout(left) {
                Ok((when, bytes)) => {
                    arrived = when;
                    self.first_output.get_or_insert(when);
                    self.text.push_str(&String::from_utf8_lossy(&bytes));
                }
                Err(RecvTimeoutError::Timeout) => {
                    return fail(format!(
                        "no `{pattern}` from the guest in {patience:?}; it said: {}",
                        self.text
                    ));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return fail(format!(
                        "the VMM ended before `{pattern}`; the guest said: {}",
                        self.text
                    ));
                }
            }
        }
    }
}

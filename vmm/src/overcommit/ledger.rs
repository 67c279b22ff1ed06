//! What the VMs of a host know of one another: a directory with a small file for each. There is no
//! daemon; each process keeps its own record, and reads the others'.
//!
//! - [`record`]: what a VM tells, and how it stands in its file.
//! - [`directory`]: who is alive, and how a reader finds out.
//! - [`mod@limits`]: what the operator sets for all of them.
//! - [`host`]: what there is to share.
//! - [`lineage`]: which VMs share what of it.
//! - [`planning`]: what the governors tell one another.
//!
//! # Whoever is killed at whatever moment
//! leaves nothing behind that counts: locks are the kernel's to give back, a record without its
//! lock is dead, and what is decided under the directory's lock has been told in the record before
//! that is released. Admission reserves *before* the machine is built, so that two VMs that boot
//! at the same moment never get the same memory; giving a reservation back needs no lock.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::allow;
use devices::sandbox::Allow;
use serde::Serialize;
use thiserror::Error;
use utoipa::ToSchema;

pub use self::directory::{Directory, Patience, Snapshot, Unreadable};
pub use self::host::boot_clock_ms;
pub use self::limits::{Limits, default_reserve};
pub use self::planning::SharedLedger;
pub use self::record::{Measures, RECORD_BYTES, Record, RecordError, Reservation};

use self::directory::{Locked, PREFIX, SUFFIX};
use self::host::{Home, Host};
use super::admission::{self, Numbers, Refusal};
use super::reading::Neighbours;
use crate::error::Error as VmmError;
use crate::event::Events;

pub mod directory;
mod host;
pub mod limits;
pub mod lineage;
pub mod overview;
mod planning;
pub mod record;

/// What the VMM thread calls for the ledger beyond [`devices::sandbox::COMMON`]: files beneath the
/// directory that was opened at the start, and reading /proc and /sys.
pub const SYSCALLS: &[Allow] = &[
    allow!(flock),
    allow!(fstat),
    allow!(getdents64),
    allow!(openat),
    allow!(pread64),
    allow!(pwrite64),
    allow!(read),
    allow!(statx),
    allow!(unlinkat),
];

/// How long to wait for somebody who keeps the directory's lock: he was stopped, or the disk
/// stands still. Who asks often comes before the governors that ask seldom, and whose looks can
/// wait.
const PATIENCE: Patience = Patience {
    time: Duration::from_secs(2),
    pause: Duration::from_millis(2),
};
/// The same where nobody waits for an answer, on a thread that has other things to do …
const SHORT_PATIENCE: Patience = Patience {
    time: Duration::from_secs(1),
    pause: Duration::from_millis(20),
};
/// … and where that was in vain the last time.
const NO_PATIENCE: Patience = Patience {
    time: Duration::from_millis(10),
    pause: Duration::from_millis(2),
};
/// Longest interval between two writes of a VM that is booted.
pub const UPDATE_INTERVAL: Duration = Duration::from_secs(1);
const GONE: &str = "our record was removed from it";

/// Why a ledger can't be used.
#[derive(Debug, Error)]
#[error("{}: {reason}", path.display())]
pub struct LedgerError {
    path: PathBuf,
    reason: String,
}

/// How the ledger is, as `vm.info` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct LedgerStatus {
    /// The directory.
    pub directory: String,
    /// Why the other VMs can't be told of this one, or can't be read. Until that is mended nothing
    /// more is admitted; what was admitted stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub degraded: Option<String>,
}

/// Our part of the ledger. Made before the threads are, then the VMM thread's.
pub struct Ledger {
    path: PathBuf,
    directory: Directory,
    host: Host,
    name: String,
    /// Holds the record's lock.
    file: File,
    record: Record,
    neighbours: Neighbours,
    /// When they told it.
    heard_ms: Option<u64>,
    degraded: Option<String>,
    /// Why the directory's lock could not be had the last time. To write in place needs none, so
    /// that this does not pass because a write succeeds.
    stuck: Option<String>,
    news: bool,
    events: Events,
}

impl Ledger {
    /// Opens the directory, removes the records of the dead, and puts ours there. `api_socket` is
    /// for people.
    pub fn open(path: &Path, api_socket: &str, events: Events) -> Result<Self, LedgerError> {
        let fail = |doing: &str, error: &dyn std::fmt::Display| LedgerError {
            path: path.to_owned(),
            reason: format!("{doing}{error}"),
        };
        let host = Host::default();
        let directory = Directory::open(path).map_err(|e| fail("", &e))?;
        limits(&directory).map_err(|reason| fail("", &reason))?;
        let home = host.home();
        let record = Record {
            pid: std::process::id(),
            start_time: host::start_time().unwrap_or_default(),
            api_socket: api_socket.to_owned(),
            cgroup: home.path,
            lineage: home.lineage,
            written_at_ms: boot_clock_ms(),
            weight: 1,
            ..Record::default()
        };
        let name = new_name(record.pid).map_err(|e| fail("a name for the record: ", &e))?;
        let locked = directory
            .lock(PATIENCE)
            .map_err(|e| fail("taking its lock: ", &e))?;
        let snapshot = directory.snapshot().map_err(|e| fail("reading it: ", &e))?;
        let file = directory
            .make(&locked, &name, &record)
            .map_err(|e| fail("making a record in it: ", &e))?;
        if directory.others_may_open().map_err(|e| fail("", &e))? {
            tracing::warn!(
                directory = %path.display(),
                "whoever can open the overcommit ledger can hold its locks: \
                 its mode should be 0700, or 0770 with a group"
            );
        }
        clean(&directory, &locked, &snapshot, &events);
        drop(locked);
        Ok(Self {
            path: path.to_owned(),
            directory,
            host,
            name,
            file,
            record,
            neighbours: Neighbours::default(),
            heard_ms: None,
            degraded: None,
            stuck: None,
            news: false,
            events,
        })
    }

    /// How it is.
    pub fn status(&self) -> LedgerStatus {
        LedgerStatus {
            directory: self.path.display().to_string(),
            degraded: self.degraded.clone(),
        }
    }

    /// Our record as it was last written, or was to be.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Whether a VM that asks for this would be admitted now; sets nothing aside.
    pub fn check(&mut self, asked: Reservation) -> Result<(), VmmError> {
        let decided = self.decide(asked).map(drop);
        self.tell_refusal(decided)
    }

    /// Sets aside what a VM asks for, in place of what it had, or refuses and leaves that as it
    /// was. What it has already is never refused: a guest that resets itself boots again.
    pub fn reserve(&mut self, asked: Reservation, weight: u64) -> Result<(), VmmError> {
        if self.record.reservation.covers(&asked) {
            self.record.reservation = asked;
            self.record.weight = weight;
            self.write();
            return Ok(());
        }
        let decided = self.decide(asked).and_then(|(locked, home)| {
            let record = Record {
                reservation: asked,
                weight,
                // Others count it where admission did.
                cgroup: home.path,
                lineage: home.lineage,
                written_at_ms: boot_clock_ms(),
                ..self.record.clone()
            };
            let written = put(&self.file, &record);
            // The lock is held until the record says it.
            drop(locked);
            written.map_err(|e| VmmError::host("telling the overcommit ledger", e))?;
            Ok(record)
        });
        self.record = self.tell_refusal(decided)?;
        Ok(())
    }

    /// Gives back what was set aside; the VM is off.
    pub fn release(&mut self) {
        self.record.reservation = Reservation::default();
        self.record.measures = Measures::default();
        self.write();
    }

    /// Tells the others how things are.
    pub fn update(&mut self, vm: &str, state: &str, measures: Measures) {
        let plans = &self.record.measures;
        let measures = Measures {
            claim: plans.claim,
            pending: plans.pending,
            told_at_ms: plans.told_at_ms,
            ..measures
        };
        vm.clone_into(&mut self.record.vm);
        state.clone_into(&mut self.record.state);
        self.record.measures = measures;
        let home = self.host.home();
        self.record.cgroup = home.path;
        self.record.lineage = home.lineage;
        self.write();
    }

    /// Takes our record away, before the process ends. A courtesy: without its lock it is dead
    /// anyway.
    pub fn leave(&mut self) {
        if let Ok(locked) = self.directory.lock(self.patience()) {
            let _ = self.directory.remove(&locked, &self.name);
        }
    }

    /// Takes the lock and finds that what is asked for fits, or why not.
    fn decide(&self, asked: Reservation) -> Result<(Locked<'_>, Home), Refused> {
        let host = |doing: &str, error: &dyn std::fmt::Display| {
            VmmError::host(format!("{doing} the overcommit ledger"), error)
        };
        let locked = self.directory.lock(PATIENCE).map_err(|error| {
            if error.kind() == io::ErrorKind::TimedOut {
                VmmError::Timeout("the lock of the overcommit ledger, which somebody keeps,")
            } else {
                host("locking", &error)
            }
        })?;
        match self.is_in_place() {
            Ok(true) => {}
            Ok(false) => return Err(host("using", &GONE).into()),
            Err(error) => return Err(host("using", &error).into()),
        }
        let snapshot = self.directory.snapshot().map_err(|e| host("reading", &e))?;
        clean(&self.directory, &locked, &snapshot, &self.events);
        if let Some(Unreadable { name, reason }) = snapshot.unreadable.first() {
            let reason = format!(
                "what the process behind {name} is guaranteed can't be read, and it is alive: \
                 {reason}"
            );
            return Err(VmmError::NotAdmitted(reason).into());
        }
        let limits = limits(&self.directory).map_err(|reason| host("reading", &reason))?;
        let others = snapshot.records.iter().filter(|r| r.0 != self.name);
        let others = others.map(|(_, record)| record);
        let home = self.host.home();
        let lineages = others.clone().map(|other| &other.lineage);
        let ceilings = self.host.ceilings(&home, lineages);
        let ceilings =
            ceilings.map_err(|reason| VmmError::host("reading the host's memory", reason))?;
        admission::admit(asked, others, &ceilings, &limits)?;
        Ok((locked, home))
    }

    fn tell_refusal<T>(&self, decided: Result<T, Refused>) -> Result<T, VmmError> {
        decided.map_err(|refused| {
            if let Some(numbers) = refused.numbers {
                let of = |number: u64| number.to_string();
                let ratio = numbers.ratio.map(|ratio| ratio.to_string());
                let properties = [
                    ("asked_guaranteed", of(numbers.asked.guaranteed)),
                    ("asked_max", of(numbers.asked.max)),
                    ("overhead", of(numbers.asked.overhead)),
                    ("guaranteed_by_others", of(numbers.guaranteed_by_others)),
                    ("promised_by_others", of(numbers.promised_by_others)),
                    ("reserve", of(numbers.reserve)),
                    ("memory", of(numbers.memory)),
                    ("of", numbers.ceiling.clone()),
                    ("ratio", ratio.unwrap_or_default()),
                ];
                let properties = properties.each_ref().map(|(k, v)| (*k, v.as_str()));
                self.events.emit("vmm", "admission-refused", &properties);
            }
            refused.error
        })
    }

    /// Whether our record is still in the directory for others to see.
    fn is_in_place(&self) -> io::Result<bool> {
        Ok(rustix::fs::fstat(&self.file)?.st_nlink > 0)
    }

    /// Writes the record; where somebody has removed it, makes it anew. What fails is told once,
    /// and tried again the next time.
    fn write(&mut self) {
        self.record.written_at_ms = boot_clock_ms();
        if self.stuck.is_some() && self.directory.lock(NO_PATIENCE).is_ok() {
            self.stuck = None;
        }
        let result = self.is_in_place().and_then(|in_place| {
            if in_place {
                return put(&self.file, &self.record);
            }
            let locked = self.directory.lock(self.patience());
            self.stuck = locked.as_ref().err().map(ToString::to_string);
            let locked = locked?;
            self.file = self.directory.make(&locked, &self.name, &self.record)?;
            Ok(())
        });
        self.note(result.map_err(|error| match error.kind() {
            // What it is to be made in is gone.
            io::ErrorKind::NotFound => format!("{GONE}, and so is the directory"),
            _ => error.to_string(),
        }));
    }

    fn patience(&self) -> Patience {
        if self.degraded.is_some() || self.stuck.is_some() {
            NO_PATIENCE
        } else {
            SHORT_PATIENCE
        }
    }

    /// Remembers whether the ledger works.
    fn note(&mut self, result: Result<(), String>) {
        let degraded = result.err().or_else(|| self.stuck.clone());
        if degraded != self.degraded {
            self.degraded = degraded;
            self.news = true;
        }
    }

    /// Whether the status is another than the one that was told last: it is to be published, and
    /// then told.
    pub fn has_news(&self) -> bool {
        self.news
    }

    /// Tells of it.
    pub fn tell_news(&mut self) {
        if !std::mem::take(&mut self.news) {
            return;
        }
        let directory = self.path.display().to_string();
        match &self.degraded {
            Some(reason) => self.events.emit(
                "vmm",
                "overcommit-ledger-degraded",
                &[("directory", &directory), ("reason", reason)],
            ),
            None => self.events.emit(
                "vmm",
                "overcommit-ledger-restored",
                &[("directory", &directory)],
            ),
        }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A refusal, with the numbers where there are some.
struct Refused {
    error: VmmError,
    numbers: Option<Box<Numbers>>,
}

impl From<VmmError> for Refused {
    fn from(error: VmmError) -> Self {
        Self {
            error,
            numbers: None,
        }
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self {
            error: VmmError::NotAdmitted(refusal.to_string()),
            numbers: Some(Box::new(refusal.numbers().clone())),
        }
    }
}

fn put(file: &File, record: &Record) -> io::Result<()> {
    file.write_all_at(&record.encode(), 0)
}

fn limits(directory: &Directory) -> Result<Limits, String> {
    let text = directory.limits().map_err(|e| format!("`limits`: {e}"))?;
    Limits::parse(&text.unwrap_or_default()).map_err(|e| format!("`limits`: {e}"))
}

/// Removes the records of the dead. What can't be removed stays, and counts for nothing.
fn clean(directory: &Directory, locked: &Locked<'_>, snapshot: &Snapshot, events: &Events) {
    for name in &snapshot.stale {
        match directory.remove(locked, name) {
            Ok(true) => events.emit("vmm", "overcommit-record-removed", &[("record", name)]),
            Ok(false) => {}
            Err(error) => tracing::warn!(%name, %error, "a dead VM's record can't be removed"),
        }
    }
}

/// A name for a record that no other has, were pids the same in different namespaces.
fn new_name(pid: u32) -> io::Result<String> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let random = u64::from_ne_bytes(random);
    Ok(format!("{PREFIX}{pid}-{random:016x}{SUFFIX}"))
}

#[cfg(test)]
mod tests;

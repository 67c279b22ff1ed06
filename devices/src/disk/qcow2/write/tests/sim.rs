//! A host that a test plays: the image file is in memory, operations end in a random order, and
//! all that happens is written down, so that the file can be had as any power cut might leave it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::super::super::tests::qemu::Random;
use super::super::io::{HostOp, Kind, Simulation};
use super::super::lock::locked;
use super::*;

/// Something that changed the file, in the order in which it ended.
pub struct Entry {
    pub begun: u64,
    pub done: u64,
    pub change: Change,
}

pub enum Change {
    Write(u64, Vec<u8>),
    /// Zeroes; also what makes the file longer.
    Zero(u64, u64),
    Sync,
}

/// What the test and the host share.
pub struct Host {
    pub base: Vec<u8>,
    pub bytes: Vec<u8>,
    pub log: Vec<Entry>,
    pub now: u64,
    pub random: Random,
    /// Operations on the image that are not reads, so far.
    pub changes: u64,
    /// Which of them fails, and how; counted from 0.
    pub fail: Option<(u64, Errno)>,
    /// Every sync fails, and how.
    pub no_sync: Option<Errno>,
    /// The file can't become longer than this.
    pub room: usize,
    /// The most operations that there were under way at a time.
    pub most_begun: usize,
    begun: BTreeMap<usize, (u64, bool)>,
    backing: Vec<Vec<u8>>,
}

pub type Shared = Arc<Mutex<Host>>;

pub struct Player(pub Shared);

/// A host with the image at `path`, over these raw or qcow2 files.
pub fn host(path: &Path, below: &[&Path], seed: u64) -> Shared {
    let bytes = std::fs::read(path).unwrap();
    Arc::new(Mutex::new(Host {
        base: bytes.clone(),
        bytes,
        log: Vec::new(),
        now: 0,
        random: Random(seed),
        changes: 0,
        fail: None,
        no_sync: None,
        room: usize::MAX,
        most_begun: 0,
        begun: BTreeMap::new(),
        backing: below.iter().map(|p| std::fs::read(p).unwrap()).collect(),
    }))
}

impl Host {
    /// The file after a power cut at `time`: what was synced by then is there, and of the rest as
    /// many sectors as chance has it.
    pub fn after_cut(&self, time: u64, random: &mut Random) -> Vec<u8> {
        let synced = self
            .log
            .iter()
            .filter(|e| matches!(e.change, Change::Sync) && e.done <= time)
            .map(|e| e.begun)
            .max()
            .unwrap_or(0);
        let mut bytes = self.base.clone();
        // All, nothing, or something of what was not synced.
        let luck = random.below(8);
        for entry in self.log.iter().filter(|entry| entry.begun <= time) {
            let durable = entry.done < synced;
            let whole = durable || luck == 0 || (luck != 1 && random.below(2) == 0);
            match &entry.change {
                Change::Sync => {}
                Change::Zero(offset, len) => {
                    if whole {
                        fill(&mut bytes, *offset, *len);
                    }
                }
                Change::Write(offset, data) => {
                    for (number, sector) in data.chunks(512).enumerate() {
                        let torn = !durable && luck > 3 && random.below(3) == 0;
                        if whole != torn {
                            put(&mut bytes, offset + number as u64 * 512, sector);
                        }
                    }
                }
            }
        }
        bytes
    }
}

fn put(bytes: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let (start, end) = (offset as usize, offset as usize + data.len());
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[start..end].copy_from_slice(data);
}

fn fill(bytes: &mut Vec<u8>, offset: u64, len: u64) {
    put(bytes, offset, &vec![0; len as usize]);
}

impl Simulation for Player {
    fn begin(&mut self, number: usize, op: &HostOp) {
        let mut host = locked(&self.0);
        host.now += 1;
        let now = host.now;
        let mut fails = false;
        if op.kind != Kind::Read {
            fails = host.fail.is_some_and(|(which, _)| which == host.changes);
            host.changes += 1;
        }
        host.begun.insert(number, (now, fails));
        host.most_begun = host.most_begun.max(host.begun.len());
    }

    fn choose(&mut self) -> Option<usize> {
        let mut host = locked(&self.0);
        let count = host.begun.len() as u64;
        let which = host.random.below(count) as usize;
        host.begun.keys().nth(which).copied()
    }

    fn perform(&mut self, number: usize, op: &mut HostOp) -> Result<usize, Errno> {
        let mut host = locked(&self.0);
        let host = &mut *host;
        let (begun, fails) = host.begun.remove(&number).unwrap();
        host.now += 1;
        let done = host.now;
        let len = op.buffers.len_bytes() as usize;
        let mut note = |change| {
            host.log.push(Entry {
                begun,
                done,
                change,
            });
        };
        if fails {
            let (_, errno) = host.fail.unwrap();
            // It may have got anywhere.
            if op.kind == Kind::Write {
                let mut data = vec![0; len];
                op.buffers.copy_to(&mut data);
                data.truncate(len / 1024 * 512);
                put(&mut host.bytes, op.offset, &data);
                note(Change::Write(op.offset, data));
            }
            return Err(errno);
        }
        match op.kind {
            Kind::Read => {
                let file = match op.file {
                    0 => &host.bytes,
                    other => &host.backing[usize::from(other) - 1],
                };
                let start = (op.offset as usize).min(file.len());
                let end = (start + len).min(file.len());
                Ok(op.buffers.copy_from(&file[start..end]))
            }
            Kind::Write => {
                assert_eq!(op.file, 0, "a backing file is written to");
                if op.offset as usize + len > host.room {
                    return Err(Errno::NOSPC);
                }
                let mut data = vec![0; len];
                op.buffers.copy_to(&mut data);
                put(&mut host.bytes, op.offset, &data);
                note(Change::Write(op.offset, data));
                Ok(len)
            }
            Kind::Sync => {
                if let Some(errno) = host.no_sync {
                    return Err(errno);
                }
                note(Change::Sync);
                Ok(0)
            }
            Kind::Allocate => {
                let end = (op.offset + op.len) as usize;
                if end > host.room {
                    return Err(Errno::NOSPC);
                }
                if end > host.bytes.len() {
                    let start = host.bytes.len() as u64;
                    fill(&mut host.bytes, start, end as u64 - start);
                    note(Change::Zero(start, end as u64 - start));
                }
                Ok(0)
            }
            Kind::Punch => {
                fill(&mut host.bytes, op.offset, op.len);
                note(Change::Zero(op.offset, op.len));
                Ok(0)
            }
            Kind::Truncate => {
                // Never before the end of what is in use; so for a power cut it changes nothing.
                host.bytes.resize(op.offset as usize, 0);
                Ok(0)
            }
        }
    }
}

//! A host that a test plays: the image file, and its external data file, are in memory, operations
//! end in a random order, and all that happens is written down, so that the files can be had as any
//! power cut might leave them. A sync of one says nothing about the other.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::super::super::tests::qemu::Random;
use super::super::io::{HostOp, Kind, Simulation};
use super::super::lock::locked;
use super::*;

/// The files that are written to.
#[derive(Clone, Default)]
pub struct Files {
    pub image: Vec<u8>,
    /// Empty where there is none.
    pub data: Vec<u8>,
}

impl std::ops::Deref for Files {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.image
    }
}

impl std::ops::DerefMut for Files {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.image
    }
}

impl AsRef<[u8]> for Files {
    fn as_ref(&self) -> &[u8] {
        &self.image
    }
}

impl Files {
    fn of(&mut self, data: bool) -> &mut Vec<u8> {
        if data {
            &mut self.data
        } else {
            &mut self.image
        }
    }
}

/// Something that changed a file, in the order in which it ended.
pub struct Entry {
    pub begun: u64,
    pub done: u64,
    /// Of the data file.
    pub data: bool,
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
    pub base: Files,
    pub bytes: Files,
    pub log: Vec<Entry>,
    pub now: u64,
    pub random: Random,
    /// Operations on the image that are not reads, so far.
    pub changes: u64,
    /// Which of them fails, and how; counted from 0.
    pub fail: Option<(u64, Errno)>,
    /// Every sync fails, and how.
    pub no_sync: Option<Errno>,
    /// The same of the data file.
    pub no_data_sync: Option<Errno>,
    /// The file can't become longer than this.
    pub room: usize,
    /// Nor the data file longer than this.
    pub data_room: usize,
    /// The host can't punch holes.
    pub no_punch: bool,
    /// The most operations that there were under way at a time.
    pub most_begun: usize,
    begun: BTreeMap<usize, (u64, bool)>,
    backing: Vec<Vec<u8>>,
}

pub type Shared = Arc<Mutex<Host>>;

pub struct Player(pub Shared);

/// A host with the image at `path`, over these raw or qcow2 files.
pub fn host(path: &Path, below: &[&Path], data: Option<&Path>, seed: u64) -> Shared {
    let bytes = Files {
        image: std::fs::read(path).unwrap(),
        data: data.map_or(Vec::new(), |path| std::fs::read(path).unwrap()),
    };
    Arc::new(Mutex::new(Host {
        base: bytes.clone(),
        bytes,
        log: Vec::new(),
        now: 0,
        random: Random(seed),
        changes: 0,
        fail: None,
        no_sync: None,
        no_data_sync: None,
        room: usize::MAX,
        data_room: usize::MAX,
        no_punch: false,
        most_begun: 0,
        begun: BTreeMap::new(),
        backing: below.iter().map(|p| std::fs::read(p).unwrap()).collect(),
    }))
}

impl Host {
    /// The files after a power cut at `time`: what was synced by then is there, and of the rest as
    /// many sectors as chance has it.
    pub fn after_cut(&self, time: u64, random: &mut Random) -> Files {
        let image = self.cut(false, time, random);
        let data = match self.base.data.is_empty() && self.bytes.data.is_empty() {
            true => Vec::new(),
            false => self.cut(true, time, random),
        };
        Files { image, data }
    }

    fn cut(&self, data: bool, time: u64, random: &mut Random) -> Vec<u8> {
        let log = || self.log.iter().filter(|entry| entry.data == data);
        let synced = log()
            .filter(|e| matches!(e.change, Change::Sync) && e.done <= time)
            .map(|e| e.begun)
            .max()
            .unwrap_or(0);
        let mut bytes = self.base.clone().of(data).clone();
        // All, nothing, or something of what was not synced.
        let luck = random.below(8);
        for entry in log().filter(|entry| entry.begun <= time) {
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
        // After the images.
        let data = usize::from(op.file) == host.backing.len() + 1;
        let mut note = |change| {
            host.log.push(Entry {
                begun,
                done,
                data,
                change,
            });
        };
        if fails {
            let (_, errno) = host.fail.unwrap();
            // It may have got anywhere.
            if op.kind == Kind::Write {
                let mut bytes = vec![0; len];
                op.buffers.copy_to(&mut bytes);
                bytes.truncate(len / 1024 * 512);
                put(host.bytes.of(data), op.offset, &bytes);
                note(Change::Write(op.offset, bytes));
            }
            return Err(errno);
        }
        let room = if data { host.data_room } else { host.room };
        match op.kind {
            Kind::Read => {
                let file = match op.file {
                    _ if data => &host.bytes.data,
                    0 => &host.bytes.image,
                    other => &host.backing[usize::from(other) - 1],
                };
                let start = (op.offset as usize).min(file.len());
                let end = (start + len).min(file.len());
                Ok(op.buffers.copy_from(&file[start..end]))
            }
            Kind::Write => {
                assert!(data || op.file == 0, "a backing file is written to");
                if op.offset as usize + len > room {
                    return Err(Errno::NOSPC);
                }
                let mut bytes = vec![0; len];
                op.buffers.copy_to(&mut bytes);
                put(host.bytes.of(data), op.offset, &bytes);
                note(Change::Write(op.offset, bytes));
                Ok(len)
            }
            Kind::Sync => {
                let fails = if data {
                    host.no_data_sync
                } else {
                    host.no_sync
                };
                if let Some(errno) = fails {
                    return Err(errno);
                }
                note(Change::Sync);
                Ok(0)
            }
            Kind::Allocate => {
                let end = (op.offset + op.len) as usize;
                if end > room {
                    return Err(Errno::NOSPC);
                }
                let file = host.bytes.of(data);
                if end > file.len() {
                    let start = file.len() as u64;
                    fill(file, start, end as u64 - start);
                    note(Change::Zero(start, end as u64 - start));
                }
                Ok(0)
            }
            Kind::Punch => {
                if host.no_punch {
                    return Err(Errno::OPNOTSUPP);
                }
                let file = host.bytes.of(data);
                let len = op.len.min((file.len() as u64).saturating_sub(op.offset));
                if len > 0 {
                    fill(file, op.offset, len);
                    note(Change::Zero(op.offset, len));
                }
                Ok(0)
            }
            Kind::Truncate => {
                let file = host.bytes.of(data);
                let (start, end) = (file.len() as u64, op.offset);
                if end as usize > room {
                    return Err(Errno::NOSPC);
                }
                // Never before the end of what is in use; so for a power cut it changes nothing.
                file.resize(end as usize, 0);
                if end > start {
                    note(Change::Zero(start, end - start));
                }
                Ok(0)
            }
        }
    }
}

//! A disk over an in-memory guest, its threads inside their real filters: a forbidden system call
//! ends the test process.

mod commit;
mod data_file;
pub(crate) mod driver;
mod enospc;
mod faults;
mod guest;
mod hostile;
mod io;
mod job;
mod load;
mod malicious;
mod model;
mod pool;
mod qcow2;
mod queues;
mod relay;
mod snapshot;
mod stuck;
mod waiting;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use self::driver::{BUFFERS, Driver, memory, order_and_wait};
use super::{Block, DiskConfig};
use crate::config::{BuildContext, BuildError};
use crate::event::{DeviceEvent, Reporter};
use crate::guest_memory::discard::inhibit::Inhibitor;
use crate::sandbox::SeccompMode;
use crate::virtio::VirtioDevice;
use crate::worker::{Order, Worker};

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

/// Where a lone request's parts lie.
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

/// Bytes of the test images.
const SIZE: u64 = 8 << 20;

pub type Events = Arc<Mutex<Vec<DeviceEvent>>>;

#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub direct: bool,
    pub sync: bool,
    pub event_idx: bool,
}

/// Every combination of engine, cache mode and notification scheme.
pub fn setups() -> impl Iterator<Item = Setup> {
    (0..8).map(|bits| Setup {
        direct: bits & 1 != 0,
        sync: bits & 2 != 0,
        event_idx: bits & 4 != 0,
    })
}

pub struct Disk {
    pub block: Block,
    pub driver: Driver,
    pub image: tempfile::NamedTempFile,
    pub events: Events,
}

/// Byte `index` of a fresh test image.
pub fn pattern(index: u64) -> u8 {
    (index / 512 * 7 + index % 251) as u8
}

pub fn image() -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().unwrap();
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    let bytes = BYTES.get_or_init(|| (0..SIZE).map(pattern).collect());
    image.as_file().write_all_at(bytes, 0).unwrap();
    image
}

pub fn config(image: &tempfile::NamedTempFile, setup: Setup) -> DiskConfig {
    let path = image.path().to_str().unwrap();
    let mut config: DiskConfig =
        serde_json::from_value(serde_json::json!({ "path": path })).unwrap();
    config.direct = setup.direct;
    config.disable_io_uring = setup.sync;
    config.validate().unwrap();
    config
}

/// Every combination of engine and cache mode.
fn engines() -> impl Iterator<Item = Setup> {
    setups().filter(|setup| setup.event_idx == setup.direct)
}

/// The same, each with a folder of its own.
fn engines_in(folder: &Path) -> impl Iterator<Item = (Setup, PathBuf)> {
    engines().enumerate().map(move |(number, setup)| {
        let folder = folder.join(number.to_string());
        std::fs::create_dir(&folder).unwrap();
        (setup, folder)
    })
}

pub fn build(config: &DiskConfig) -> Result<(Block, Events), BuildError> {
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = events.clone();
    let reporter = Reporter::new(
        "disk",
        Arc::new(move |_, event| sink.lock().unwrap().push(event)),
    );
    let context = BuildContext {
        reporter,
        seccomp: SeccompMode::Enforce,
        discards: Inhibitor::default(),
    };
    Ok((Block::new(config, context)?, events))
}

impl Driver {
    fn header(&self, address: u64, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.poke(address, &header);
    }

    /// Sends one chain and waits for it: its status byte, and how much was written.
    fn send(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        self.header(HEADER, kind, sector);
        self.poke(STATUS, &[0xee]);
        let mut pieces = vec![(HEADER, 16, false)];
        pieces.extend(data);
        pieces.push((STATUS, 1, true));
        let head = self.chain(&pieces);
        self.offer(head);
        self.ring();
        let (used, len) = self.wait_used();
        assert_eq!(used, head);
        (self.peek(STATUS, 1)[0], len)
    }

    /// Writes to the disk from `sector` on, and waits until that is done.
    fn write_at(&mut self, sector: u64, bytes: &[u8]) {
        self.poke(DATA, bytes);
        let (status, _) = self.send(1, sector, &[(DATA, bytes.len() as u32, false)]);
        assert_eq!(status, OK);
    }
}

impl Disk {
    pub fn new(setup: Setup) -> Self {
        Self::with(setup, |_| {})
    }

    pub fn with(setup: Setup, change: impl FnOnce(&mut DiskConfig)) -> Self {
        let image = image();
        let mut config = config(&image, setup);
        change(&mut config);
        let (block, events) = build(&config).unwrap();
        let mut driver = Driver::new(memory(), 0, config.queue_size, setup.event_idx);
        driver.activate(&block.workers()[0], 0);
        Self {
            block,
            driver,
            image,
            events,
        }
    }

    /// A disk on an image of its own making.
    pub fn on(path: &std::path::Path, setup: Setup, more: serde_json::Value) -> Self {
        let image = image();
        let mut config = serde_json::to_value(config(&image, setup)).unwrap();
        config["path"] = path.to_str().unwrap().into();
        for (name, value) in more.as_object().unwrap() {
            config[name] = value.clone();
        }
        let config: DiskConfig = serde_json::from_value(config).unwrap();
        config.validate().unwrap();
        let (block, events) = build(&config).unwrap();
        let mut driver = Driver::new(memory(), 0, config.queue_size, setup.event_idx);
        driver.activate(&block.workers()[0], 0);
        Self {
            block,
            driver,
            image,
            events,
        }
    }

    pub fn worker(&self) -> &Worker {
        &self.block.workers()[0]
    }

    pub fn file(&self) -> &File {
        self.image.as_file()
    }

    pub fn pause(&self) {
        order_and_wait(self.worker(), Order::Pause);
    }

    /// Offers a write to the beginning of the disk, which stands still, and has it go on then.
    fn write_when_resumed(&mut self, bytes: &[u8]) {
        self.header(HEADER, 1, 0);
        self.driver.poke(STATUS, &[0xee]);
        self.driver.poke(DATA, bytes);
        let pieces = [
            (HEADER, 16, false),
            (DATA, bytes.len() as u32, false),
            (STATUS, 1, true),
        ];
        let head = self.driver.chain(&pieces);
        self.driver.offer(head);
        self.driver.ring();
        // Whoever is paused hears orders only, one after the other.
        self.pause();
        assert_eq!(self.driver.peek(STATUS, 1), [0xee]);
        self.worker().order(Order::Resume);
        self.driver.wait_used();
        assert_eq!(self.driver.peek(STATUS, 1), [OK]);
    }

    pub fn reset(&self) {
        order_and_wait(self.worker(), Order::Reset);
    }

    pub fn header(&self, address: u64, kind: u32, sector: u64) {
        self.driver.header(address, kind, sector);
    }

    /// Sends one chain and waits for it: its status byte, and how much was written.
    pub fn send(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        self.driver.send(kind, sector, data)
    }

    pub fn read(&mut self, sector: u64, len: u32) -> (u8, Vec<u8>) {
        let (status, written) = self.send(0, sector, &[(DATA, len, true)]);
        if status == OK {
            assert_eq!(written, len + 1);
        }
        (status, self.driver.peek(DATA, len as usize))
    }

    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.driver.poke(DATA, bytes);
        let (status, written) = self.send(1, sector, &[(DATA, bytes.len() as u32, false)]);
        assert_eq!(written, 1);
        status
    }

    pub fn flush(&mut self) -> u8 {
        self.send(4, 0, &[]).0
    }

    pub fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut segment = [0; 16];
        segment[..8].copy_from_slice(&sector.to_le_bytes());
        segment[8..12].copy_from_slice(&sectors.to_le_bytes());
        segment[12..].copy_from_slice(&flags.to_le_bytes());
        self.driver.poke(DATA, &segment);
        self.send(kind, 0, &[(DATA, 16, false)]).0
    }

    pub fn on_host(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// The names of the operations that were reported to have failed.
    pub fn io_errors(&self) -> Vec<&'static str> {
        let events = self.events.lock().unwrap();
        events
            .iter()
            .filter_map(|event| match event {
                DeviceEvent::IoError { operation, .. } => Some(*operation),
                _ => None,
            })
            .collect()
    }
}

pub fn expected(offset: u64, len: usize) -> Vec<u8> {
    (offset..offset + len as u64).map(pattern).collect()
}

#[test]
fn a_long_id_does_not_hide_the_queue_in_the_threads_name() {
    use super::thread_name;
    assert_eq!(thread_name("_disk0", 3, ""), "_disk0_q3");
    assert_eq!(thread_name("_disk0", 3, "_io"), "_disk0_q3_io");
    assert_eq!(
        thread_name("a-very-long-disk-name", 12, ""),
        "a-very-long_q12"
    );
    assert_eq!(thread_name("ééééééééé", 0, ""), "éééééé_q0");
}

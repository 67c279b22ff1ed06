//! A real disk behind real PCI registers in a guest whose memory is watched.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::channel;

use devices::block::{Block, DiskConfig};
use devices::config::BuildContext;
use devices::event::Reporter;
use devices::guest_memory::discard::inhibit::Inhibitor;
use devices::sandbox::SeccompMode;
use devices::virtio::VirtioDevice;
use devices::virtio::pci::VirtioPciDevice;
use devices::virtio::testing::{Buffer, PATIENCE, TestDriver, TestGuest, VERSION_1};
use devices::worker::Order;
use rustix::fs::{MemfdFlags, OFlags};

use crate::memory::Memory;

/// Bytes of guest memory: the driver puts its rings at 64 KiB and its buffers at 1 MiB.
pub const MEMORY: u64 = (1 << 20) + (128 << 10);
/// Where the driver's buffers begin.
pub const BUFFERS: u64 = 1 << 20;
/// Where the rings of the first queue lie; those of the second follow 64 KiB later.
pub const RINGS: u64 = 0x1_0000;
/// Queues of the disk.
pub const QUEUES: u16 = 2;
/// Bytes of the disk.
pub const DISK: u64 = 256 << 10;

/// A guest with a disk.
pub struct Bench {
    /// The guest.
    pub guest: TestGuest,
    /// The slot of the disk.
    pub slot: u8,
    /// The disk.
    pub block: Arc<Block>,
    memory: Memory,
    image: File,
    _device: Arc<VirtioPciDevice>,
}

/// How the disk does its work.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// On its own threads, without io_uring.
    pub sync: bool,
    /// Without the host's page cache: what is not aligned takes a detour.
    pub direct: bool,
}

impl Mode {
    /// All there are.
    pub const ALL: [Self; 4] = [
        Self::new(false, false),
        Self::new(true, false),
        Self::new(false, true),
        Self::new(true, true),
    ];

    const fn new(sync: bool, direct: bool) -> Self {
        Self { sync, direct }
    }
}

impl Bench {
    /// A disk that works in this mode; without `direct` where the host can't do that on a
    /// temporary file.
    pub fn new(mode: Mode) -> Self {
        let memory = Memory::new(MEMORY as usize);
        let (image, block) = disk(mode)
            .or_else(|_| {
                let direct = false;
                disk(Mode { direct, ..mode })
            })
            .expect("a disk");
        let block = Arc::new(block);
        let guest = TestGuest::with_memory(memory.ram.clone());
        let (slot, device) = guest.plug(block.clone());
        Self {
            guest,
            slot,
            block,
            memory,
            image,
            _device: device,
        }
    }

    /// As freshly started, so that an input does the same each time.
    pub fn fresh(&self) -> TestDriver {
        let mut driver = TestDriver::new(&self.guest, self.slot);
        assert!(driver.reset(), "the device does not come out of reset");
        self.memory.clear();
        driver
    }

    /// Waits until all that was asked for so far has been done.
    pub fn settle(&self) {
        for worker in self.block.workers() {
            self.pause(worker);
            worker.order(Order::Resume);
        }
        // Resuming serves what has come meanwhile.
        for worker in self.block.workers() {
            self.pause(worker);
        }
        for worker in self.block.workers() {
            worker.order(Order::Resume);
        }
    }

    fn pause(&self, worker: &devices::worker::Worker) {
        let (done, wait) = channel();
        worker.order(Order::Pause(Box::new(move || {
            let _ = done.send(());
        })));
        wait.recv_timeout(PATIENCE).expect("the device pauses");
    }

    /// Panics unless a reset makes the disk work, whatever was done to it, and nothing was written
    /// where nothing may be written.
    pub fn check(&self) {
        let mut driver = self.fresh();
        self.memory.assert_guards_untouched();
        let size = self.image.metadata().expect("metadata").len();
        assert_eq!(size, DISK, "the image has another size");
        driver.start(VERSION_1, 16);
        for queue in 0..usize::from(QUEUES) {
            // As large as the blocks of any disk.
            let sector = 8 + 8 * queue as u64;
            let data: Vec<u8> = (0..4096).map(|index| (index * 7 + queue) as u8).collect();
            assert_eq!(request(&mut driver, queue, 1, sector, &data), data);
            let mut bytes = vec![0; 4096];
            let at = sector * 512;
            self.image.read_exact_at(&mut bytes, at).expect("read");
            assert_eq!(bytes, data, "what was written is not in the image");
            bytes.reverse();
            self.image.write_all_at(&bytes, at).expect("write");
            let read = request(&mut driver, queue, 0, sector, &[0; 4096]);
            assert_eq!(read, bytes, "what is in the image was not read");
        }
    }
}

/// A disk, and its image to look at. The image has no name, so nothing is left of it.
fn disk(mode: Mode) -> Result<(File, Block), Box<dyn std::error::Error>> {
    let image = match mode.direct {
        false => rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC)?,
        true => rustix::fs::open(
            std::env::temp_dir(),
            OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        )?,
    };
    let image = File::from(image);
    image.set_len(DISK)?;
    let config: DiskConfig = serde_json::from_value(serde_json::json!({
        "path": format!("/proc/self/fd/{}", image.as_raw_fd()),
        "num_queues": QUEUES,
        "queue_size": 64,
        "disable_io_uring": mode.sync,
        "direct": mode.direct,
    }))?;
    let context = BuildContext {
        reporter: Reporter::silent(),
        seccomp: SeccompMode::Off,
        discards: Inhibitor::default(),
    };
    let block = Block::new(&config, context)?;
    Ok((image, block))
}

/// One request as a well-behaved driver makes it; what is in the data buffer afterwards.
fn request(driver: &mut TestDriver, queue: usize, kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    let header = driver.allocate(16);
    let buffer = driver.allocate(data.len());
    let status = driver.allocate(1);
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    driver.guest.poke(header, &bytes);
    driver.guest.poke(buffer, data);
    driver.guest.poke(status, &[0xee]);
    let len = data.len() as u32;
    let data = match kind {
        0 => Buffer::Writable(buffer, len),
        _ => Buffer::Readable(buffer, len),
    };
    let parts = [
        Buffer::Readable(header, 16),
        data,
        Buffer::Writable(status, 1),
    ];
    let head = driver.add(queue, &parts);
    driver.kick(queue);
    assert_eq!(driver.wait_used(queue).0, u32::from(head));
    assert_eq!(driver.guest.peek(status, 1), [0], "the request failed");
    driver.guest.peek(buffer, len as usize)
}

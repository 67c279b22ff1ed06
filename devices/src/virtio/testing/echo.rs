//! A device that gives back what it is given: what the driver lets it read of a chain goes into
//! what it may write. One worker a queue, inside a real filter.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vm_memory::Bytes;

use crate::event::Reporter;
use crate::sandbox::{self, Filter, SeccompMode};
use crate::virtio::queue::Chain;
use crate::virtio::{Activation, TransportSignals, VirtQueue, VirtioDevice, config_space};
use crate::worker::{Handler, Source, Worker, WorkerError};

/// Bytes of a chain that are echoed; the rest is not looked at.
const MOST: usize = 1 << 16;
const CONFIG_SIZE: usize = 8;

/// The device.
pub struct EchoDevice {
    queue_sizes: Vec<u16>,
    config: Mutex<[u8; CONFIG_SIZE]>,
    features: Mutex<Vec<u64>>,
    signals: Arc<Mutex<Option<Arc<dyn TransportSignals>>>>,
    workers: Vec<Worker>,
}

impl EchoDevice {
    /// A request that begins with this is kept until the device is reset or paused.
    pub const KEEP: u8 = 0xee;
    /// A request that begins with this makes the worker fail.
    pub const FAIL: u8 = 0xfa;
    /// A feature of its own, number 3.
    pub const FEATURE: u64 = 1 << 3;

    /// A device with these queues.
    pub fn new(queue_sizes: &[u16]) -> Arc<Self> {
        Self::slow(queue_sizes, Duration::ZERO)
    }

    /// A device that takes some time to finish each request that is in flight when it is reset.
    pub fn slow(queue_sizes: &[u16], finishing: Duration) -> Arc<Self> {
        let filter = Filter::compile(
            "echo",
            SeccompMode::Enforce,
            &[sandbox::COMMON, sandbox::WORKER],
        )
        .unwrap();
        let signals = Arc::new(Mutex::new(None));
        let workers = (queue_sizes.iter())
            .map(|_| {
                let handler = EchoHandler {
                    finishing,
                    queue: None,
                    kept: Vec::new(),
                    signals: signals.clone(),
                };
                Worker::spawn("echo", filter.clone(), Reporter::silent(), handler).unwrap()
            })
            .collect();
        Arc::new(Self {
            queue_sizes: queue_sizes.to_vec(),
            config: Mutex::new(*b"configur"),
            features: Mutex::default(),
            signals,
            workers,
        })
    }

    /// What the transport has said of accepted features, in order.
    pub fn features_seen(&self) -> Vec<u64> {
        self.features.lock().unwrap().clone()
    }

    /// The signals of the latest activation.
    pub fn signals(&self) -> Option<Arc<dyn TransportSignals>> {
        self.signals.lock().unwrap().clone()
    }
}

impl VirtioDevice for EchoDevice {
    fn device_type(&self) -> u16 {
        0x2f
    }
    fn features(&self) -> u64 {
        // The transport must not pass on VIRTIO_F_RING_PACKED.
        Self::FEATURE | 1 << 34
    }
    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        config_space::read(&*config, offset, data);
    }
    fn write_config(&self, offset: u64, data: &[u8]) {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        config_space::write(&mut *config, offset, data);
    }
    fn features_accepted(&self, features: u64) {
        let mut seen = self.features.lock().unwrap();
        if seen.len() < 16 {
            seen.push(features);
        }
    }
    fn workers(&self) -> &[Worker] {
        &self.workers
    }
    fn worker_of_queue(&self, index: usize) -> usize {
        index
    }
}

struct EchoHandler {
    finishing: Duration,
    queue: Option<VirtQueue>,
    kept: Vec<Chain>,
    signals: Arc<Mutex<Option<Arc<dyn TransportSignals>>>>,
}

impl EchoHandler {
    fn serve(&mut self) -> Result<(), WorkerError> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        let kept = &mut self.kept;
        queue.serve(|queue, chain| {
            let request = read(&chain);
            match request.first() {
                Some(&EchoDevice::FAIL) => return Err(WorkerError::new("echo", "told to fail")),
                // A driver can't make more than the queue holds outstanding, but it may cheat.
                Some(&EchoDevice::KEEP) if kept.len() < usize::from(queue.size()) => {
                    kept.push(chain);
                    return Ok(());
                }
                _ => {}
            }
            answer(queue, &chain, &request)
        })
    }

    fn finish(&mut self) {
        let Some(queue) = &mut self.queue else { return };
        for chain in self.kept.drain(..) {
            std::thread::sleep(self.finishing);
            let request = read(&chain);
            let _ = answer(queue, &chain, &request);
        }
    }
}

impl Handler for EchoHandler {
    fn activate(&mut self, activation: Activation) -> Result<(), WorkerError> {
        *self.signals.lock().unwrap() = Some(activation.signals);
        self.queue = activation.queues.into_iter().next();
        self.serve()
    }
    fn ready(&mut self, _: Source) -> Result<(), WorkerError> {
        self.serve()
    }
    fn quiesce(&mut self) -> Result<(), WorkerError> {
        self.finish();
        Ok(())
    }
    fn resume(&mut self) -> Result<(), WorkerError> {
        self.serve()
    }
    fn reset(&mut self) {
        self.finish();
        self.queue = None;
        *self.signals.lock().unwrap() = None;
    }
}

/// What the driver lets us read, up to [`MOST`] bytes; buffers outside of memory count as empty.
fn read(chain: &Chain) -> Vec<u8> {
    let mut request = Vec::new();
    for descriptor in chain.clone().readable() {
        let start = request.len();
        request.resize((start + descriptor.len() as usize).min(MOST), 0);
        if (chain.memory())
            .read_slice(&mut request[start..], descriptor.addr())
            .is_err()
        {
            request.truncate(start);
        }
    }
    request
}

fn answer(queue: &mut VirtQueue, chain: &Chain, request: &[u8]) -> Result<(), WorkerError> {
    let mut written = 0;
    for descriptor in chain.clone().writable() {
        let rest = &request[written..];
        let part = &rest[..rest.len().min(descriptor.len() as usize)];
        if chain.memory().write_slice(part, descriptor.addr()).is_ok() {
            written += part.len();
        }
    }
    queue.push_used(chain.head_index(), written as u32)?;
    queue.notify()?;
    Ok(())
}

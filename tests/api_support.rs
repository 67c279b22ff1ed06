//! What the API's tests share: a server over a VMM made of a few lines, and a client that speaks
//! raw bytes.

#![allow(dead_code, missing_docs, reason = "each test binary uses a part")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ballast_api::routes;
use ballast_api::server::{self, Limits};
use devices::balloon::GuestStatistics;
use devices::block::job::JobKind;
use devices::config::DeviceConfig;
use vmm::Error;
use vmm::command::{Command, Endpoint, Message, channel};
use vmm::config::VmConfig;
use vmm::event::Events;
use vmm::overcommit::cost::SharedRam;
use vmm::overcommit::storage::Seen;
use vmm::overcommit::view::{Observer, Subject, View};
use vmm::state::{State, Verb, check};
use vmm::status::{BalloonStats, Observation, PciDeviceInfo, VmCounters, VmInfo};

/// Adding a disk with this path takes [`SLOW`].
pub const SLOW_PATH: &str = "/slow";
pub const SLOW: Duration = Duration::from_millis(700);

/// A VMM without a machine: it keeps a configuration and a state.
pub struct FakeVmm {
    endpoint: Endpoint,
    vm: Option<(VmConfig, State)>,
}

impl FakeVmm {
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, vm: None }
    }

    /// Answers until told to end.
    pub fn run(mut self) {
        while let Ok(message) = self.endpoint.inbox.recv() {
            match message {
                Message::Command(Command::VmmShutdown { reply }) => {
                    let _ = reply.send(Ok(()));
                    break;
                }
                Message::Command(command) => self.obey(command),
                Message::Terminate => break,
                Message::Guest | Message::Job | Message::Pressure => {}
            }
        }
        self.endpoint.events.emit("vmm", "shutdown", &[]);
        let _ = self.endpoint.ended.send(true);
    }

    fn turn(&mut self, verb: Verb, to: State) -> Result<(), Error> {
        check(verb, self.vm.as_ref().map(|vm| vm.1))?;
        if let Some(vm) = &mut self.vm {
            vm.1 = to;
        }
        Ok(())
    }

    fn obey(&mut self, command: Command) {
        let state = self.vm.as_ref().map(|vm| vm.1);
        // Sends the answer only when what was done is published.
        macro_rules! answer {
            ($reply:expr, $result:expr) => {{
                let result = $result;
                self.publish();
                let _ = $reply.send(result);
            }};
        }
        match command {
            Command::Create { config, reply } => {
                let result = check(Verb::Create, state).and_then(|()| config.validate());
                if result.is_ok() {
                    self.vm = Some((*config, State::Created));
                }
                answer!(reply, result)
            }
            Command::Boot { reply } => answer!(reply, self.turn(Verb::Boot, State::Running)),
            Command::Shutdown { reply } => {
                answer!(reply, self.turn(Verb::Shutdown, State::Created))
            }
            Command::Reboot { reply } => answer!(reply, self.turn(Verb::Reboot, State::Running)),
            Command::Pause { reply } => answer!(reply, self.turn(Verb::Pause, State::Paused)),
            Command::Resume { reply } => answer!(reply, self.turn(Verb::Resume, State::Running)),
            Command::PowerButton { reply } => answer!(reply, check(Verb::PowerButton, state)),
            Command::Nmi { reply } => answer!(reply, check(Verb::Nmi, state)),
            Command::Delete { reply } => {
                self.vm = None;
                answer!(reply, Ok(()))
            }
            Command::Counters { reply } => {
                let disk = ("_disk0".to_owned(), [("read_ops".to_owned(), 7)].into());
                let counters = check(Verb::Counters, state).map(|()| [disk].into());
                answer!(reply, counters)
            }
            Command::AddDevice { device, reply } => answer!(reply, self.add(*device)),
            Command::CreateDisk { reply, .. } => answer!(reply, Ok(())),
            Command::RemoveDevice { id, reply } => answer!(
                reply,
                check(Verb::RemoveDevice, state).and_then(|()| {
                    let disks = self.vm.as_ref().map(|vm| &vm.0.disks);
                    let known = disks
                        .into_iter()
                        .flatten()
                        .any(|disk| disk.common.id.as_deref() == Some(&id));
                    known.then_some(()).ok_or(Error::UnknownDevice { id })
                })
            ),
            Command::Resize { reply, .. } => answer!(reply, check(Verb::Resize, state)),
            Command::ResizeBalloon { reply, .. } => {
                answer!(reply, check(Verb::ResizeBalloon, state))
            }
            Command::SetOvercommit { reply, .. } => {
                answer!(reply, check(Verb::SetOvercommit, state))
            }
            Command::Balloons { reply } => {
                answer!(reply, check(Verb::Balloons, state).map(|()| Vec::new()))
            }
            Command::ResizeDisk { reply, .. } => answer!(reply, check(Verb::ResizeDisk, state)),
            Command::SnapshotDisk { reply, .. } => {
                answer!(reply, check(Verb::SnapshotDisk, state))
            }
            Command::BeginJob { order, reply } => {
                let job = check(
                    match order.kind {
                        JobKind::Stream => Verb::StreamDisk,
                        JobKind::Commit => Verb::CommitDisk,
                    },
                    state,
                );
                answer!(reply, job.and(Err(Error::UnknownDevice { id: order.disk })))
            }
            Command::Jobs { reply } => {
                answer!(reply, check(Verb::Jobs, state).map(|()| Vec::new()))
            }
            Command::SetJob { id, reply, .. } => {
                let job = check(Verb::SetJob, state);
                answer!(reply, job.and(Err(Error::UnknownJob { id })))
            }
            Command::CancelJob { id, reply } => {
                let job = check(Verb::CancelJob, state);
                answer!(reply, job.and(Err(Error::UnknownJob { id })))
            }
            Command::ResumeDisk { reply, .. } => answer!(reply, check(Verb::ResumeDisk, state)),
            Command::DiskInfo { id, reply } => {
                let info = check(Verb::DiskInfo, state);
                answer!(reply, info.and(Err(Error::UnknownDevice { id })))
            }
            Command::BalloonStats { reply } => {
                let stats = BalloonStats {
                    balloon_actual: 4096,
                    stats: GuestStatistics {
                        free_memory: Some(7),
                        ..GuestStatistics::default()
                    },
                };
                answer!(reply, check(Verb::BalloonStats, state).map(|()| stats))
            }
            Command::Overcommit { reply } => {
                let view = self.view().map(Box::new).ok_or(Error::NotCreated);
                answer!(reply, view)
            }
            Command::Observe { reply } => {
                let seen = self.view().zip(state).map(|(view, state)| Observation {
                    jobs: Vec::new(),
                    state,
                    view,
                    balloons: Vec::new(),
                    disks: Vec::new(),
                    counters: VmCounters::new(),
                    exits: Vec::new(),
                });
                answer!(reply, Ok(seen.map(Box::new)))
            }
            Command::VmmShutdown { .. } => unreachable!(),
        }
    }

    fn view(&self) -> Option<View> {
        let subject = Subject {
            config: &self.vm.as_ref()?.0,
            balloons: &[],
            disks: &Seen::default(),
            vcpu_threads: &[],
            shared_ram: SharedRam::default(),
        };
        Some(Observer::default().view(&subject))
    }

    fn add(&mut self, device: DeviceConfig) -> Result<PciDeviceInfo, Error> {
        check(Verb::AddDevice, self.vm.as_ref().map(|vm| vm.1))?;
        let DeviceConfig::Disk(mut disk) = device else {
            panic!("there is no operation for this device");
        };
        disk.validate()?;
        if disk.path == Path::new(SLOW_PATH) {
            std::thread::sleep(SLOW);
        }
        let (config, state) = self.vm.as_mut().unwrap();
        let id = disk
            .common
            .id
            .get_or_insert(format!("_disk{}", config.disks.len()))
            .clone();
        let taken = |d: &devices::block::DiskConfig| d.common.id.as_deref() == Some(&id);
        if config.disks.iter().any(taken) {
            let field = "id".to_owned();
            return Err(Error::DuplicateId { field, id });
        }
        config.disks.push(disk);
        let booted = *state != State::Created;
        Ok(PciDeviceInfo {
            id,
            bdf: booted.then(|| "0000:00:05.0".to_owned()),
        })
    }

    fn publish(&self) {
        let info = self.vm.as_ref().map(|(config, state)| {
            Arc::new(VmInfo {
                config: config.clone(),
                state: *state,
                memory_actual_size: config.memory.size,
                overcommit_ledger: None,
                device_tree: None,
            })
        });
        self.endpoint.status.send_replace(info);
    }
}

/// A server and its VMM, each on a thread, in this process.
pub struct Server {
    pub path: PathBuf,
    pub events: Events,
    handle: vmm::Handle,
    threads: Vec<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Server {
    pub fn start() -> Self {
        Self::with_limits(Limits::default())
    }

    pub fn with_limits(limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let events = Events::new(Instant::now());
        let (handle, endpoint) = channel(events.clone());
        let vmm = std::thread::spawn(move || FakeVmm::new(endpoint).run());
        let server_handle = handle.clone();
        let server = std::thread::spawn(move || serve(listener, server_handle, limits, || {}));
        Self {
            path,
            events,
            handle,
            threads: vec![vmm, server],
            _directory: directory,
        }
    }

    pub fn connect(&self) -> Client {
        Client::connect(&self.path)
    }

    /// A server with a VM in `state`.
    pub fn with_vm(state: State) -> Self {
        let server = Self::start();
        let mut client = server.connect();
        assert_eq!(
            client
                .put("vm.create", r#"{"payload":{"kernel":"/k"}}"#)
                .status,
            204
        );
        if state != State::Created {
            assert_eq!(client.put("vm.boot", "").status, 204);
        }
        if state == State::Paused {
            assert_eq!(client.put("vm.pause", "").status, 204);
        }
        server
    }
}

/// Serves on this thread, as the main thread does; `prepared` is called when all is open.
pub fn serve(
    listener: std::os::unix::net::UnixListener,
    handle: vmm::Handle,
    limits: Limits,
    prepared: impl FnOnce(),
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::from_std(listener).unwrap();
        prepared();
        server::serve(listener, routes::router(handle.clone()), handle, limits).await;
    });
}

impl Drop for Server {
    fn drop(&mut self) {
        self.handle.terminate();
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.unwrap();
            }
        }
    }
}

/// A client that speaks raw bytes.
pub struct Client {
    pub stream: UnixStream,
    /// Read, but not taken yet.
    buffer: Vec<u8>,
}

/// An answer: its head as text, its body, and what is in the head.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn has_header(&self, line: &str) -> bool {
        self.head.split("\r\n").any(|found| found == line)
    }
}

impl Client {
    pub fn connect(path: &Path) -> Self {
        Self::over(UnixStream::connect(path).unwrap())
    }

    pub fn over(stream: UnixStream) -> Self {
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    pub fn get(&mut self, operation: &str) -> Answer {
        self.send(format!(
            "GET /api/v1/{operation} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        ));
        self.answer()
    }

    pub fn put(&mut self, operation: &str, body: &str) -> Answer {
        self.send(request("PUT", operation, body));
        self.answer()
    }

    /// The next answer.
    pub fn answer(&mut self) -> Answer {
        self.try_answer().expect("the connection was closed")
    }

    /// The next answer, or `None` where the connection is closed before.
    pub fn try_answer(&mut self) -> Option<Answer> {
        let end = loop {
            if let Some(at) = find(&self.buffer, b"\r\n\r\n") {
                break at + 4;
            }
            if self.fill() == 0 {
                return None;
            }
        };
        let head = String::from_utf8(self.buffer.drain(..end).collect()).unwrap();
        let status = head["HTTP/1.1 ".len()..][..3].parse().unwrap();
        let length = head
            .split("\r\n")
            .find_map(|line| line.strip_prefix("Content-Length: "))
            .map_or(0, |length| length.parse().unwrap());
        while self.buffer.len() < length {
            assert_ne!(self.fill(), 0, "the body is incomplete");
        }
        let body = self.buffer.drain(..length).collect();
        Some(Answer { status, head, body })
    }

    /// Reads once; 0 where the connection is closed.
    pub fn fill(&mut self) -> usize {
        let mut bytes = [0; 65536];
        match self.stream.read(&mut bytes) {
            Ok(count) => {
                self.buffer.extend_from_slice(&bytes[..count]);
                count
            }
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => 0,
            Err(error) => panic!("{error}"),
        }
    }

    /// Reads until `text` has been read; returns everything so far.
    pub fn read_until(&mut self, text: &str) -> String {
        while find(&self.buffer, text.as_bytes()).is_none() {
            assert_ne!(
                self.fill(),
                0,
                "{:?}",
                String::from_utf8_lossy(&self.buffer)
            );
        }
        String::from_utf8_lossy(&std::mem::take(&mut self.buffer)).into_owned()
    }

    /// Everything until the connection is closed.
    pub fn rest(&mut self) -> String {
        while self.fill() > 0 {}
        String::from_utf8_lossy(&std::mem::take(&mut self.buffer)).into_owned()
    }
}

pub fn request(method: &str, operation: &str, body: &str) -> String {
    format!(
        "{method} /api/v1/{operation} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|part| part == needle)
}

/// Open descriptors of this process.
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Threads of this process.
pub fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Waits until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

//! Everything the VMM can be asked to do, and everything the guest can make it do: the messages of
//! the one inbox.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::mpsc;

use devices::balloon::BalloonInfo;
use devices::block::snapshot::DiskSnapshot;
use devices::block::{DiskInfo, NewDiskConfig};
use devices::config::DeviceConfig;
use tokio::sync::{broadcast, oneshot, watch};

use crate::config::{OvercommitConfig, VmConfig, VmResize};
use crate::error::Error;
use crate::event::{Event, Events};
use crate::jobs::{JobInfo, NewJob};
use crate::overcommit::view::View;
use crate::status::{BalloonStats, Observation, PciDeviceInfo, Status, VmCounters};

/// Where a command's answer goes. The type of the answer is part of the question.
pub type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What a client can ask for. `vmm.ping` and `vm.info` are not here: they read what is published.
#[derive(Debug)]
#[expect(
    missing_docs,
    reason = "the fields are the request's parts and its reply"
)]
pub enum Command {
    /// `vm.create`: check the configuration and keep it.
    Create {
        config: Box<VmConfig>,
        reply: Reply<()>,
    },
    /// `vm.boot`: build the machine and start it.
    Boot { reply: Reply<()> },
    /// `vm.shutdown`: pull the plug; the configuration stays.
    Shutdown { reply: Reply<()> },
    /// `vm.reboot`: pull the plug and boot again.
    Reboot { reply: Reply<()> },
    /// `vm.pause`: stop vCPUs, drain devices.
    Pause { reply: Reply<()> },
    /// `vm.resume`: undo a pause.
    Resume { reply: Reply<()> },
    /// `vm.power-button`: press the ACPI power button.
    PowerButton { reply: Reply<()> },
    /// `vm.nmi`: interrupt every vCPU, unmaskably.
    Nmi { reply: Reply<()> },
    /// `vm.delete`: forget the VM, after pulling the plug if need be.
    Delete { reply: Reply<()> },
    /// `vm.counters`.
    Counters { reply: Reply<VmCounters> },
    /// `vm.add-disk` and its kin: plug a device into the running guest, or add it to the
    /// configuration of one that is not booted (the answer then has no address).
    AddDevice {
        device: Box<DeviceConfig>,
        reply: Reply<PciDeviceInfo>,
    },
    /// `vm.create-disk`: make an image; whether there is a VM does not matter.
    CreateDisk {
        disk: Box<NewDiskConfig>,
        reply: Reply<()>,
    },
    /// `vm.remove-device`: ask the guest to let go of a device.
    RemoveDevice { id: String, reply: Reply<()> },
    /// `vm.resize`: the first balloon's target; nothing else can be resized yet.
    Resize { desired: VmResize, reply: Reply<()> },
    /// `vm.resize-balloon`: tell the guest a balloon's new target.
    ResizeBalloon {
        id: String,
        desired_size: u64,
        /// Go below what the guest is guaranteed.
        floor_override: bool,
        reply: Reply<()>,
    },
    /// `vm.set-overcommit`: another policy.
    SetOvercommit {
        config: Box<OvercommitConfig>,
        reply: Reply<()>,
    },
    /// `vm.resize-disk`: make a disk larger.
    ResizeDisk {
        id: String,
        desired_size: u64,
        reply: Reply<()>,
    },
    /// `vm.snapshot-disk`: move disks on to new overlays, all or none.
    SnapshotDisk {
        disks: Vec<DiskSnapshot>,
        reply: Reply<()>,
    },
    /// `vm.stream-disk`, `vm.commit-disk`: begin a job on a disk.
    BeginJob {
        order: NewJob,
        reply: Reply<JobInfo>,
    },
    /// `vm.jobs`: the jobs there are, with the last that have ended.
    Jobs { reply: Reply<Vec<JobInfo>> },
    /// `vm.set-job`: have a job go faster or slower.
    SetJob {
        id: String,
        /// Bytes that it may read in a second.
        speed: Option<NonZeroU64>,
        reply: Reply<()>,
    },
    /// `vm.cancel-job`: have a job end before it is done.
    CancelJob { id: String, reply: Reply<()> },
    /// `vm.resume-disk`: try again what is held for lack of space; to `give_up` is to hold nothing
    /// of that any longer.
    ResumeDisk {
        id: String,
        give_up: bool,
        reply: Reply<()>,
    },
    /// `vm.disk-info`: how a disk stands on the host.
    DiskInfo { id: String, reply: Reply<DiskInfo> },
    /// `vm.balloons`: where each stands. Answered by the balloons' threads, with statistics that
    /// the guest is asked for.
    Balloons { reply: Reply<Vec<BalloonInfo>> },
    /// `vm.balloon-stats`: the guest's statistics. Answered by the balloon's thread.
    BalloonStats { reply: Reply<BalloonStats> },
    /// `vm.overcommit`: where the memory is.
    Overcommit { reply: Reply<Box<View>> },
    /// `metrics`: all that is counted; `None` where there is no VM.
    Observe {
        reply: Reply<Option<Box<Observation>>>,
    },
    /// `vmm.shutdown`: pull the plug and end the process.
    VmmShutdown { reply: Reply<()> },
}

/// What arrives in the inbox.
#[derive(Debug)]
pub enum Message {
    /// A client asks.
    Command(Command),
    /// The guest did something: look at the signals. Sent once until they are looked at, however
    /// often the guest does it.
    Guest,
    /// A job's thread has ended: look at the jobs.
    Job,
    /// The kernel tells of pressure on memory. Sent once until it is heard.
    Pressure,
    /// SIGTERM or SIGINT.
    Terminate,
}

/// The VMM thread as everyone else holds it; cheap to clone.
#[derive(Clone)]
pub struct Handle {
    inbox: mpsc::Sender<Message>,
    status: watch::Receiver<Status>,
    events: Events,
    ended: watch::Receiver<bool>,
}

/// The other end of a [`Handle`]: what the VMM thread, or a test in its place, holds.
pub struct Endpoint {
    /// The messages.
    pub inbox: mpsc::Receiver<Message>,
    /// To send messages to oneself, from other threads.
    pub sender: mpsc::Sender<Message>,
    /// What is published.
    pub status: watch::Sender<Status>,
    /// Where events are emitted.
    pub events: Events,
    /// Set to true when the process is to end.
    pub ended: watch::Sender<bool>,
}

/// Makes both ends.
pub fn channel(events: Events) -> (Handle, Endpoint) {
    let (sender, inbox) = mpsc::channel();
    let (status_sender, status) = watch::channel(None);
    let (ended_sender, ended) = watch::channel(false);
    let handle = Handle {
        inbox: sender.clone(),
        status,
        events: events.clone(),
        ended,
    };
    let endpoint = Endpoint {
        inbox,
        sender,
        status: status_sender,
        events,
        ended: ended_sender,
    };
    (handle, endpoint)
}

impl Handle {
    /// Sends a command and waits for its answer, as in
    /// `handle.request(|reply| Command::Boot { reply })`.
    pub async fn request<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let gone = || Error::host("asking the VMM thread", "it has ended");
        self.inbox
            .send(Message::Command(command(reply)))
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Tells the VMM thread to end the process in an orderly way (SIGTERM, SIGINT).
    pub fn terminate(&self) {
        // Fails only when the thread has ended already.
        let _ = self.inbox.send(Message::Terminate);
    }

    /// The VM as last published; `None` while there is none.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Listens to all events from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// How many events there were, by source and name.
    pub fn event_counts(&self) -> BTreeMap<(&'static str, &'static str), u64> {
        self.events.counts()
    }

    /// Waits until the VMM thread has shut everything down and the process is to end.
    pub async fn ended(&self) {
        // An error means that the thread is gone, which is an end too.
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }
}

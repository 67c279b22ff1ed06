//! Jobs that wait for the host to have space, every thread inside its filter.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};

use serde_json::json;

use super::enospc::Small;
use super::job::{PATIENCE, PLAIN, bytes_of, can_write, content, over};
use super::*;
use crate::block::job::{ConcludeError, Job, JobKind, JobStatus, Waiting};
use crate::disk::Format;
use crate::disk::qcow2::tests::qemu;

/// Longer than a test takes.
const FOREVER: u64 = 3_600_000;

fn begin(block: &Block, kind: JobKind) -> (Job, Receiver<()>) {
    let (tell, told) = channel();
    let wake = Box::new(move || {
        let _ = tell.send(());
    });
    (block.begin_job(kind, None, wake).unwrap(), told)
}

/// Hears of the job until this is so.
fn hear(job: &Job, told: &Receiver<()>, what: impl Fn(&Job) -> bool) {
    while !what(job) {
        told.recv_timeout(PATIENCE).unwrap();
    }
}

fn waits(job: &Job) -> bool {
    job.view().waiting.is_some()
}

fn is_ready(job: &Job) -> bool {
    job.view().status == JobStatus::Ready
}

fn failure(job: &Job) -> Option<String> {
    match job.view().status {
        JobStatus::Failed(reason) => Some(reason),
        _ => None,
    }
}

/// A disk whose job of this kind has more to write than a small file system has room for, and what
/// the disk shows. With it the image that the job writes.
struct Tight {
    small: Small,
    disk: Disk,
    expected: Vec<u8>,
    kind: JobKind,
    /// Where all of it is in the end.
    target: (PathBuf, Format),
    overlay: PathBuf,
    _folder: tempfile::TempDir,
}

impl Tight {
    fn new(kind: JobKind, format: Format, setup: Setup, more: serde_json::Value) -> Option<Self> {
        let (folder, small) = (qemu::folder()?, Small::new()?);
        let base = match kind {
            JobKind::Stream => folder.path().join("base"),
            JobKind::Commit => small.path("base"),
        };
        let shown = base.display();
        qemu::img(&format!("create -q -f {} {shown} {SIZE}", format.name()));
        let above = match kind {
            JobKind::Stream => small.path(""),
            JobKind::Commit => folder.path().to_owned(),
        };
        let filled = match kind {
            JobKind::Stream => (&base, format),
            JobKind::Commit => (&above.join("top.qcow2"), Format::Qcow2),
        };
        let options = format!("backing_file={shown},backing_fmt={}", format.name());
        let overlay = qemu::create(&above, "top.qcow2", &options, SIZE);
        let image = filled.0.to_str().unwrap();
        let writes = [
            "-c",
            "write -q -P 0x5a 0 3M",
            "-c",
            "write -q -P 0x33 5M 1M",
        ];
        let arguments = [&["-f", filled.1.name()][..], &writes, &[image]].concat();
        qemu::run("qemu-io", &arguments);
        let mut expected = vec![0; SIZE as usize];
        expected[..3 << 20].fill(0x5a);
        expected[5 << 20..6 << 20].fill(0x33);
        let mut config = over();
        for (name, value) in more.as_object().unwrap() {
            config[name] = value.clone();
        }
        let target = match kind {
            JobKind::Stream => (overlay.clone(), Format::Qcow2),
            JobKind::Commit => (base, format),
        };
        Some(Self {
            disk: Disk::on(&overlay, setup, config),
            small,
            expected,
            kind,
            target,
            overlay,
            _folder: folder,
        })
    }

    fn of(kind: JobKind, more: serde_json::Value) -> Option<Self> {
        Self::new(kind, Format::Raw, PLAIN, more)
    }

    fn begin(&self) -> (Job, Receiver<()>) {
        begin(&self.disk.block, self.kind)
    }

    /// The guest writes where space is there for it, and it is as it should be.
    #[track_caller]
    fn use_disk(&mut self, number: u64) {
        // There are clusters for it wherever it is.
        let at = match self.kind {
            JobKind::Stream => 0,
            JobKind::Commit => number % 4 * (1 << 20),
        };
        if self.kind == JobKind::Commit {
            let bytes = bytes_of(number).repeat(16);
            assert_eq!(self.disk.write(at / 512, &bytes), OK);
            self.expected[at as usize..][..bytes.len()].copy_from_slice(&bytes);
            assert_eq!(self.disk.flush(), OK);
        }
        assert!(content(&mut self.disk) == self.expected);
        // A process that is killed now leaves this.
        assert!(content_shared(&self.overlay) == self.expected);
    }

    /// The job is ready, or becomes so, and all is where it belongs.
    #[track_caller]
    fn conclude(mut self, (mut job, told): (Job, Receiver<()>)) {
        hear(&job, &told, is_ready);
        job.conclude(&self.disk.block, true).unwrap();
        assert_eq!(job.view().waiting, None);
        assert!(content(&mut self.disk) == self.expected);
        assert!(self.disk.io_errors().is_empty());
        drop((job, self.disk));
        let (path, format) = &self.target;
        let found = match format {
            Format::Raw => std::fs::read(path).unwrap(),
            Format::Qcow2 => qemu::content(path),
        };
        assert!(found == self.expected);
    }
}

/// What an image of a chain shows that this process has open.
fn content_shared(path: &Path) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("oracle");
    let (from, to) = (path.display(), raw.display());
    qemu::img(&format!("convert -U -f qcow2 -O raw {from} {to}"));
    std::fs::read(&raw).unwrap()
}

#[test]
fn a_job_waits_for_space_while_the_guest_goes_on_and_then_comes_to_its_end() {
    for (kind, format, sync) in [
        (JobKind::Stream, Format::Raw, false),
        (JobKind::Stream, Format::Qcow2, true),
        (JobKind::Commit, Format::Raw, true),
        (JobKind::Commit, Format::Raw, false),
        (JobKind::Commit, Format::Qcow2, false),
    ] {
        let setup = Setup { sync, ..PLAIN };
        let Some(mut tight) = Tight::new(kind, format, setup, json!({})) else {
            return;
        };
        let (job, told) = tight.begin();
        hear(&job, &told, waits);
        let view = job.view();
        assert_eq!(view.status, JobStatus::Running);
        let Waiting {
            needed_bytes,
            free_bytes: Some(free),
            error,
        } = view.waiting.unwrap()
        else {
            panic!("a tmpfs says what is free");
        };
        assert!(needed_bytes <= 1 << 20 && free < 1 << 20, "{free}");
        assert!(error.contains("No space left"), "{error}");
        tight.use_disk(1);
        // In vain.
        job.retry(false);
        tight.use_disk(2);
        assert!(waits(&job));
        tight.small.enlarge();
        job.retry(false);
        tight.conclude((job, told));
    }
}

#[test]
fn a_job_sees_by_itself_that_there_is_space() {
    for kind in [JobKind::Stream, JobKind::Commit] {
        let Some(tight) = Tight::of(kind, json!({"on_enospc": "pause-vm"})) else {
            return;
        };
        let (job, told) = tight.begin();
        hear(&job, &told, waits);
        assert!(!tight.disk.block.wants_pause(), "no guest waits");
        tight.small.enlarge();
        hear(&job, &told, |job| !waits(job));
        tight.conclude((job, told));
    }
}

#[test]
fn a_job_that_waits_can_be_cancelled_and_another_goes_on() {
    for kind in [JobKind::Stream, JobKind::Commit] {
        let Some(mut tight) = Tight::of(kind, json!({"enospc_grace_ms": FOREVER})) else {
            return;
        };
        let (job, told) = tight.begin();
        hear(&job, &told, waits);
        job.cancel();
        hear(&job, &told, |job| job.view().status == JobStatus::Cancelled);
        assert_eq!(job.view().waiting, None);
        drop(job);
        assert!(!tight.disk.block.has_job());
        tight.use_disk(1);
        let (path, format) = &tight.target;
        assert!(!can_write(*format, path), "the disk has it");
        tight.small.enlarge();
        let again = tight.begin();
        tight.conclude(again);
    }
}

#[test]
fn a_job_waits_no_longer_than_the_disk_is_to() {
    for kind in [JobKind::Stream, JobKind::Commit] {
        for (more, give_up) in [
            (json!({"on_enospc": "report"}), false),
            (json!({"enospc_grace_ms": 20}), false),
            (json!({"enospc_grace_ms": FOREVER}), true),
            (json!({}), true),
        ] {
            let Some(mut tight) = Tight::of(kind, more) else {
                return;
            };
            let (job, told) = tight.begin();
            if give_up {
                hear(&job, &told, waits);
                job.retry(true);
            }
            hear(&job, &told, |job| failure(job).is_some());
            let reason = failure(&job).unwrap();
            assert!(reason.contains("No space left"), "{reason}");
            assert!(!waits(&job));
            drop(job);
            tight.use_disk(1);
            tight.small.enlarge();
            let again = tight.begin();
            tight.conclude(again);
        }
    }
}

#[test]
fn the_end_of_a_commit_is_put_off_until_there_is_space_for_the_rest() {
    for (sync, format) in [(true, Format::Raw), (false, Format::Qcow2)] {
        let (Some(folder), Some(small)) = (qemu::folder(), Small::new()) else {
            return;
        };
        let base = small.path("base");
        let (shown, name) = (base.display(), format.name());
        qemu::img(&format!("create -q -f {name} {shown} {SIZE}"));
        let options = format!("backing_file={shown},backing_fmt={name}");
        let overlay = qemu::create(folder.path(), "top.qcow2", &options, SIZE);
        let setup = Setup { sync, ..PLAIN };
        let mut tight = Tight {
            disk: Disk::on(&overlay, setup, over()),
            small,
            expected: vec![0; SIZE as usize],
            kind: JobKind::Commit,
            target: (base, format),
            overlay,
            _folder: folder,
        };
        let (mut job, told) = tight.begin();
        hear(&job, &told, is_ready);
        tight.small.fill();
        tight.use_disk(2);
        tight.use_disk(3);
        for number in 4..7 {
            let error = job.conclude(&tight.disk.block, true).unwrap_err();
            match error {
                ConcludeError::NoSpace => {
                    hear(&job, &told, waits);
                    assert_eq!(job.view().status, JobStatus::Running);
                }
                // It waits still.
                ConcludeError::NotReady => assert!(waits(&job), "{error}"),
                other => panic!("{other}"),
            }
            // At once, and however often.
            tight.use_disk(number);
        }
        tight.small.make_space();
        tight.conclude((job, told));
    }
}

#[test]
fn a_commit_that_is_ready_and_falls_behind_for_want_of_space_is_ready_again_later() {
    let Some(mut tight) = Tight::of(JobKind::Commit, json!({})) else {
        return;
    };
    tight.small.enlarge();
    let (job, told) = tight.begin();
    hear(&job, &told, is_ready);
    tight.small.fill();
    // More than it leaves for the end, where the base has holes.
    for at in (6_u64 << 20..8 << 20).step_by(64 << 10) {
        let bytes = bytes_of(at).repeat(16);
        assert_eq!(tight.disk.write(at / 512, &bytes), OK);
        tight.expected[at as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    hear(&job, &told, waits);
    assert_eq!(job.view().status, JobStatus::Running);
    tight.use_disk(1);
    tight.small.make_space();
    tight.conclude((job, told));
}

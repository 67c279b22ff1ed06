//! Drives a real process with the generated client: all there is to a VM that is never booted, and
//! jobs on the disk of one whose guest sleeps.

#[path = "../../../support/payload.rs"]
#[allow(dead_code, reason = "other tests have other guests")]
mod payload;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ballast_client_test::{Client, Error, types};

/// A process on a folder of its own, gone when dropped.
struct Ballast {
    child: Child,
    dir: tempfile::TempDir,
}

impl Ballast {
    async fn start() -> (Self, Client) {
        let binary = std::env::var_os("BALLAST").expect("BALLAST names the binary");
        let dir = tempfile::tempdir().expect("a folder");
        let socket = dir.path().join("api.sock");
        let child = Command::new(binary)
            .arg("--api-socket")
            .arg(&socket)
            .stdin(Stdio::null())
            .spawn()
            .expect("start ballast");
        let ballast = Self { child, dir };
        let client = client(&socket);
        for _ in 0..400 {
            if client.ping_vmm().await.is_ok() {
                return (ballast, client);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("ballast does not answer");
    }

    /// A disk image.
    fn image(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        let file = std::fs::File::create(&path).expect("an image");
        file.set_len(1 << 20).expect("its size");
        path.to_str().expect("UTF-8").to_owned()
    }

    async fn wait(&mut self) -> std::process::ExitStatus {
        for _ in 0..400 {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("ballast does not end");
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn client(socket: &Path) -> Client {
    let http = reqwest::Client::builder()
        .unix_socket(socket)
        .build()
        .expect("an HTTP client");
    Client::new_with_client("http://localhost/api/v1", http)
}

/// Status and reasons of a refusal that the document knows.
#[track_caller]
fn refusal<T: std::fmt::Debug>(answer: Result<T, Error<types::Errors>>) -> (u16, Vec<String>) {
    match answer {
        Err(Error::ErrorResponse(response)) => {
            let status = response.status().as_u16();
            (status, response.into_inner().0)
        }
        other => panic!("not a documented refusal: {other:?}"),
    }
}

fn disk(id: &str, path: &str) -> types::DiskConfig {
    let disk = serde_json::json!({ "id": id, "path": path });
    serde_json::from_value(disk).expect("a disk")
}

/// Of a request's or a configuration's JSON.
fn made<T: serde::de::DeserializeOwned>(json: serde_json::Value) -> T {
    serde_json::from_value(json).expect("what the document allows")
}

/// Waits until a job has ended.
async fn ended(client: &Client, id: &str) -> types::JobInfo {
    for _ in 0..400 {
        let jobs = client.get_jobs().await.expect("jobs").into_inner();
        let job = jobs.into_iter().find(|job| job.id == id).expect("the job");
        if job.state != types::JobState::Running {
            return job;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{id} does not end");
}

#[tokio::test(flavor = "current_thread")]
async fn the_generated_client_leads_jobs_on_a_disk_in_use() {
    let (mut ballast, client) = Ballast::start().await;
    let folder = ballast.dir.path();
    let at = |name: &str| folder.join(name).to_str().expect("UTF-8").to_owned();
    let (base, overlay, next) = (at("base.raw"), at("overlay.qcow2"), at("next.qcow2"));
    std::fs::write(&base, vec![7; 1 << 20]).expect("an image");
    let new: types::NewDiskConfig = made(serde_json::json!({
        "path": overlay, "image_type": "Qcow2", "backing_path": base, "backing_type": "Raw",
    }));
    client.create_disk(&new).await.expect("an overlay");
    let config: types::VmConfig = made(serde_json::json!({
        "memory": { "size": 64 << 20 },
        "payload": { "kernel": payload::sleeper(folder) },
        "disks": [{ "id": "disk", "path": overlay, "image_type": "Qcow2", "backing_files": true }],
    }));
    client.create_vm(&config).await.expect("create");
    let stream = |speed: Option<u64>| -> types::VmStreamDisk {
        made(serde_json::json!({ "id": "disk", "speed": speed }))
    };
    let commit = types::VmCommitDisk {
        id: "disk".into(),
        speed: None,
    };
    assert_eq!(refusal(client.stream_disk(&stream(None)).await).0, 409);
    assert_eq!(refusal(client.commit_disk(&commit).await).0, 409);
    assert!(client.get_jobs().await.expect("jobs").is_empty());
    client.boot_vm().await.expect("boot");

    // One so slow that it does not come to its end.
    let job = client.stream_disk(&stream(Some(1))).await.expect("a job");
    let job = job.into_inner();
    assert_eq!(
        (job.kind, job.state),
        (types::JobKind::Stream, types::JobState::Running)
    );
    assert_eq!((job.total_bytes, job.disk.as_str()), (1 << 20, "disk"));
    assert_eq!(refusal(client.commit_disk(&commit).await).0, 409);
    let faster: types::VmSetJob = made(serde_json::json!({ "id": job.id, "speed": 2 }));
    client.set_job(&faster).await.expect("set");
    let cancel = types::VmCancelJob { id: job.id.clone() };
    client.cancel_job(&cancel).await.expect("cancel");
    assert_eq!(
        ended(&client, &job.id).await.state,
        types::JobState::Cancelled
    );
    let (status, reasons) = refusal(client.cancel_job(&cancel).await);
    assert_eq!(status, 409);
    assert!(reasons.concat().contains(&job.id));
    let job = client.stream_disk(&stream(None)).await.expect("a job");
    let job = ended(&client, &job.id).await;
    assert_eq!(
        (job.state, job.done_bytes),
        (types::JobState::Completed, 1 << 20)
    );

    // Up to an overlay and down again.
    let snapshot: types::VmSnapshotDisk =
        made(serde_json::json!({ "disks": [{ "id": "disk", "path": next }] }));
    client.snapshot_disk(&snapshot).await.expect("snapshot");
    let path = async || {
        let info = client.get_vm_info().await.expect("info").into_inner();
        info.config.disks[0].path.clone()
    };
    assert_eq!(path().await, next);
    let job = client.commit_disk(&commit).await.expect("a job");
    assert_eq!(job.kind, types::JobKind::Commit);
    let job = ended(&client, &job.id).await;
    assert_eq!(job.state, types::JobState::Completed, "{:?}", job.reason);
    assert_eq!(path().await, overlay);
    let (status, reasons) = refusal(client.commit_disk(&commit).await);
    assert_eq!(status, 400, "nothing is below it any more");
    assert!(reasons.concat().contains("id: "));

    client.shutdown_vmm().await.expect("shutdown");
    assert!(ballast.wait().await.success());
}

#[tokio::test(flavor = "current_thread")]
async fn the_generated_client_leads_a_vm_from_creation_to_deletion() {
    let (mut ballast, client) = Ballast::start().await;
    let pong = client.ping_vmm().await.expect("ping").into_inner();
    assert!(pong.build_version.contains("ballast"));
    assert_eq!(pong.pid, i64::from(ballast.child.id()));

    let (status, reasons) = refusal(client.get_vm_info().await);
    assert_eq!(status, 404);
    assert!(reasons.concat().contains("VM is not created"));

    let first = ballast.image("first.raw");
    let config: types::VmConfig = serde_json::from_value(serde_json::json!({
        "cpus": { "boot_vcpus": 2, "max_vcpus": 2 },
        "memory": { "size": 256 << 20 },
        "disks": [{ "id": "first", "path": first }],
    }))
    .expect("a configuration");
    client.create_vm(&config).await.expect("create");
    let (status, _) = refusal(client.create_vm(&config).await);
    assert_eq!(status, 409, "created twice");

    let info = client.get_vm_info().await.expect("info").into_inner();
    assert_eq!(info.state, types::VmState::Created);
    assert_eq!(info.memory_actual_size, 256 << 20);

    let second = disk("second", &ballast.image("second.raw"));
    let added = client.add_disk(&second).await.expect("add a disk");
    assert_eq!(added.into_inner().id, "second");
    let again = disk("second", &ballast.image("third.raw"));
    assert_eq!(refusal(client.add_disk(&again).await).0, 409, "same id");
    let missing = disk("fourth", "/nonexistent/disk.raw");
    let (status, reasons) = refusal(client.add_disk(&missing).await);
    assert_eq!(status, 400);
    assert!(reasons.concat().contains("/nonexistent/disk.raw"));

    let info = client.get_vm_info().await.expect("info").into_inner();
    assert_eq!(info.config.disks.len(), 2, "a refused disk is not there");
    let (status, _) = refusal(client.boot_vm().await);
    assert!((400..500).contains(&status), "there is nothing to boot");

    let unknown = types::VmRemoveDevice { id: "none".into() };
    assert_eq!(refusal(client.remove_device(&unknown).await).0, 404);
    let second = types::VmRemoveDevice {
        id: "second".into(),
    };
    client.remove_device(&second).await.expect("remove");

    client.delete_vm().await.expect("delete");
    assert_eq!(refusal(client.get_vm_info().await).0, 404);
    client.shutdown_vmm().await.expect("shutdown");
    assert!(ballast.wait().await.success());
}

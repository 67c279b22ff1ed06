//! Drives a real process with the generated client: all there is to a VM that is never booted,
//! which needs no guest.

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

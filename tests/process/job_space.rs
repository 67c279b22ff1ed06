//! Jobs on a host that is really full, over the API of a real process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::full_disk::mount;
use super::thin::{CHUNKS, SIZE, Thin, check, check_for, whole};
use crate::support::artifacts::empty_image;
use crate::support::events::Mark;
use crate::support::payload::WRITER_CHUNK;

/// More than the file system of the base has.
const BEFORE: &[&str] = &["write -q -P 0x17 2M 6M", "write -q -P 0x42 10M 4M"];

/// A disk whose base is on a small file system, gone when dropped.
struct Tight {
    thin: Option<Thin>,
    small: PathBuf,
}

impl Tight {
    /// With these fields of the disk. `None`, loudly, where nothing can be mounted.
    fn boot(disk: Value) -> Option<Self> {
        let mut small = PathBuf::new();
        let mut mounted = true;
        let between = |folder: &Path, _| {
            small = folder.join("small");
            fs::create_dir(&small).unwrap();
            mounted = mount(&["-t", "tmpfs", "-o", "size=4m", "tmpfs"], &small);
            empty_image(&small, "base.raw", SIZE)
        };
        let thin = Some(Thin::boot_as(between, BEFORE, &disk));
        if !mounted {
            eprintln!("SKIPPED: no tmpfs can be mounted here");
            return None;
        }
        Some(Self { thin, small })
    }

    fn thin(&mut self) -> &mut Thin {
        self.thin.as_mut().unwrap()
    }

    fn enlarge(&self) {
        assert!(mount(&["-o", "remount,size=32m"], &self.small));
    }

    /// All is in the base, and in the overlay over it.
    fn assert_committed(&mut self) {
        let base = self.small.join("base.raw");
        let thin = self.thin();
        assert_eq!(thin.config()["path"], json!(base));
        thin.settle();
        thin.ballast.assert_well();
        thin.client.put("vm.delete");
        check(&thin.overlay);
        assert!(whole(&base) == thin.content);
        assert!(whole(&thin.overlay) == thin.content);
    }
}

impl Drop for Tight {
    fn drop(&mut self) {
        // Its files are open until then.
        self.thin = None;
        let _ = Command::new("umount").arg("-l").arg(&self.small).status();
    }
}

#[test]
fn a_job_waits_for_space_shows_it_survives_a_reboot_and_goes_on_when_told() {
    let Some(mut tight) = Tight::boot(json!({})) else {
        return;
    };
    let thin = tight.thin();
    let before = thin.commit(None);
    assert!(before["waiting_for_space"].is_null());
    let event = thin.events.wait_for("job-waiting");
    let told = &event["properties"];
    assert_eq!(
        (&told["job"], &told["id"], &told["kind"]),
        (&json!("job0"), &json!("thin"), &json!("commit"))
    );
    let number = |value: &Value| value.as_str().unwrap().parse::<u64>().unwrap();
    assert!((1..=1 << 20).contains(&number(&told["needed_bytes"])));
    assert!(number(&told["free_bytes"]) < 1 << 20, "{event}");
    assert!(told["error"].as_str().unwrap().contains("No space left"));
    let job = thin.jobs()[0].clone();
    assert_eq!(job["state"], "running");
    let wanted = &job["waiting_for_space"];
    assert_eq!(
        (&wanted["needed_bytes"], &wanted["error"]),
        (&json!(number(&told["needed_bytes"])), &told["error"])
    );
    assert!(wanted["free_bytes"].as_u64().unwrap() < 1 << 20, "{job}");
    let metrics = thin.client.request("GET", "metrics", None).text();
    let line = r#"ballast_disk_job_waits_for_space{device="thin",job="job0",kind="commit"} 1"#;
    assert!(metrics.contains(line), "{metrics}");
    thin.is_the_only_one("job0", "commit");
    // The guest is none the wiser.
    thin.settle();
    assert_eq!(thin.client.state(), "Running");
    assert_eq!(thin.client.get("vm.disk-info?id=thin")["held_requests"], 0);

    // In vain, also on another machine.
    thin.client
        .put_json("vm.resume-disk", &json!({"id": "thin"}));
    let mark = thin.events.mark();
    thin.client.put("vm.reboot");
    thin.events.wait_after(mark, "job-waiting", |_| true);
    thin.settle();
    tight.enlarge();
    let thin = tight.thin();
    thin.client
        .put_json("vm.resume-disk", &json!({"id": "thin"}));
    thin.events.wait_for("job-resumed");
    let event = thin.events.wait_for("job-completed");
    assert!(event["properties"]["error"].is_null(), "{event}");
    assert!(thin.jobs()[0]["waiting_for_space"].is_null());
    tight.assert_committed();
}

#[test]
fn a_job_that_waits_is_cancelled_given_up_or_fails_when_its_time_is_over() {
    for (disk, end, event) in [
        (json!({}), Some("vm.cancel-job"), "job-cancelled"),
        (json!({}), Some("vm.resume-disk"), "job-failed"),
        (json!({"enospc_grace_ms": 300}), None, "job-failed"),
    ] {
        let Some(mut tight) = Tight::boot(disk) else {
            return;
        };
        let thin = tight.thin();
        thin.commit(None);
        thin.events.wait_for("job-waiting");
        match end {
            Some("vm.cancel-job") => drop(
                thin.client
                    .put_json("vm.cancel-job", &json!({"id": "job0"})),
            ),
            Some(operation) => drop(
                thin.client
                    .put_json(operation, &json!({"id": "thin", "give_up": true})),
            ),
            None => {}
        }
        let ended = thin.events.wait_for(event);
        if event == "job-failed" {
            let reason = ended["properties"]["reason"].as_str().unwrap();
            assert!(reason.contains("base.raw"), "{reason}");
            assert!(reason.contains("No space left"), "{reason}");
        }
        assert!(thin.jobs()[0]["waiting_for_space"].is_null());
        assert_eq!(thin.config()["path"], json!(thin.overlay));
        thin.settle();
        tight.enlarge();
        let thin = tight.thin();
        thin.commit(None);
        thin.events
            .wait_after(Mark::START, "job-completed", |event| {
                event["properties"]["job"] == "job1"
            });
        tight.assert_committed();
    }
}

#[test]
fn a_sigkill_while_a_job_waits_loses_nothing() {
    let Some(mut tight) = Tight::boot(json!({})) else {
        return;
    };
    let thin = tight.thin();
    thin.commit(None);
    thin.events.wait_for("job-waiting");
    let thin = tight.thin.take().unwrap();
    let folder = thin.ballast.kill();
    let found = whole(&thin.overlay);
    check_for(&thin.overlay, &[0, 3]);
    // The guest has flushed nothing of what it wrote.
    let written = CHUNKS * WRITER_CHUNK;
    assert_eq!(found.len(), thin.content.len());
    assert!(found[written..] == thin.content[written..]);
    drop(tight);
    drop(folder);
}

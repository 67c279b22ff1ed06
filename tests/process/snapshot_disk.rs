//! `vm.snapshot-disk`: disks that move on to overlays, over the API of a real process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{before, when_free};
use crate::support::artifacts::empty_image;
use crate::support::ballast::{Ballast, Launch, binary};
use crate::support::http::Client;
use crate::support::procfs;

const MIB: u64 = 1 << 20;

/// A VM with these disks, raw and of 8 MiB each; the first has one queue, the second two and so on.
fn boot(ballast: &Ballast, client: &mut Client, ids: &[&str]) {
    let disk = |(number, id): (usize, &&str)| {
        let path = empty_image(ballast.dir(), id, 8 * MIB);
        json!({"id": id, "path": path, "num_queues": number + 1})
    };
    let mut config = ballast.sleeper();
    config["cpus"] = json!({"boot_vcpus": ids.len(), "max_vcpus": ids.len()});
    config["balloon"] = json!({"size": 0});
    config["disks"] = ids.iter().enumerate().map(disk).collect();
    client.put_json("vm.create", &config);
    client.put("vm.boot");
}

fn move_on(pairs: &[(&str, &Path)]) -> Value {
    let disk = |(id, path): &(&str, &Path)| json!({"id": id, "path": path});
    json!({"disks": pairs.iter().map(disk).collect::<Vec<_>>()})
}

/// Our own `check`, and QEMU's where there is one. Waits while a process that was killed still has
/// the image.
fn check(image: &Path) {
    when_free(image, || {
        let mut check = Command::new(binary());
        check
            .args(["disk", "check", "-q", "-f", "qcow2"])
            .arg(image);
        check
    });
    let theirs = Command::new("qemu-img")
        .args(["check", "-U", "-q", "-f", "qcow2"])
        .arg(image)
        .status();
    assert!(theirs.map_or(true, |status| status.success()));
}

#[test]
fn disks_move_on_and_the_configuration_and_the_next_boot_follow() {
    let ballast = Ballast::start();
    let (mut client, events) = (ballast.api(), ballast.events());
    boot(&ballast, &mut client, &["a", "b"]);
    let at = |name: &str| ballast.path(name);
    let [a, b, second] = ["a1.qcow2", "b1.qcow2", "a2.qcow2"].map(at);
    client.put_json("vm.snapshot-disk", &move_on(&[("a", &a), ("b", &b)]));
    client.put("vm.pause");
    client.put_json("vm.snapshot-disk", &move_on(&[("a", &second)]));
    assert_eq!(client.state(), "Paused");
    client.put("vm.resume");

    let event = events.wait_for("disk-snapshot");
    assert_eq!(event["properties"]["id"], "a");
    assert_eq!(event["properties"]["path"], json!(a));
    assert_eq!(event["properties"]["backing_path"], json!(at("a")));
    let disks = |client: &mut Client| client.get("vm.info")["config"]["disks"].clone();
    let config = disks(&mut client);
    for (disk, path) in [(&config[0], &second), (&config[1], &b)] {
        assert_eq!(disk["path"], json!(path));
        assert_eq!(
            (&disk["image_type"], &disk["backing_files"]),
            (&json!("Qcow2"), &json!(true))
        );
    }
    let chain = |client: &mut Client| client.get("vm.disk-info?id=a")["backing_chain"].clone();
    let expected = json!([
        {"path": a, "image_type": "Qcow2"}, {"path": at("a"), "image_type": "Raw"},
    ]);
    assert_eq!(chain(&mut client), expected);
    let info = client.get("vm.disk-info?id=a");
    assert_eq!(
        (&info["path"], &info["virtual_size"]),
        (&json!(second), &json!(8 * MIB))
    );

    client.put("vm.reboot");
    assert_eq!(chain(&mut client), expected);
    assert_eq!(disks(&mut client), config);
    // A disk that is gone has let go of all its images.
    client.put("vm.delete");
    for image in [&a, &b, &second] {
        check(image);
    }
}

/// The names of the threads that serve a disk's queues.
fn queue_threads(ballast: &Ballast, id: &str) -> Vec<String> {
    let modes = procfs::seccomp_modes(ballast.pid());
    assert!(modes.iter().all(|(_, mode)| *mode == 2), "{modes:?}");
    let names = modes.into_iter().map(|(name, _)| name);
    let mut names: Vec<_> = names
        .filter(|name| name.starts_with(&format!("{id}_q")) && !name.ends_with("_io"))
        .collect();
    names.sort();
    names
}

#[test]
fn a_raw_disk_with_several_queues_moves_on_and_back_and_the_next_boot_follows() {
    for without_io_uring in [false, true] {
        let mut ballast = Ballast::start();
        let (mut client, events) = (ballast.api(), ballast.events());
        let folder = ballast.dir().to_owned();
        let at = |name: &str| folder.join(name);
        let disk = |id: &str, queues: u32| {
            let path = empty_image(ballast.dir(), id, 8 * MIB);
            json!({"id": id, "path": path, "num_queues": queues,
                "disable_io_uring": without_io_uring})
        };
        let mut config = ballast.sleeper();
        config["cpus"] = json!({"boot_vcpus": 4, "max_vcpus": 4});
        config["disks"] = json!([disk("a", 4), disk("b", 2), disk("c", 1)]);
        client.put_json("vm.create", &config);
        client.put("vm.boot");
        let four = ["a_q0", "a_q1", "a_q2", "a_q3"];
        assert_eq!(queue_threads(&ballast, "a"), four);

        let [a, b, c] = ["a1", "b1", "c1"].map(at);
        let all = [("a", &*a), ("b", &*b), ("c", &*c)];
        // The last can't be had: nobody moves.
        fs::write(&c, "mine").unwrap();
        let answer = client.try_put_json("vm.snapshot-disk", &move_on(&all));
        assert_eq!(answer.status, 400, "{}", answer.text());
        assert!(!a.exists() && !b.exists());
        fs::remove_file(&c).unwrap();
        client.put_json("vm.snapshot-disk", &move_on(&all));
        assert_eq!(queue_threads(&ballast, "a"), four);

        let path = |client: &mut Client| client.get("vm.disk-info?id=a")["path"].clone();
        assert_eq!(path(&mut client), json!(a));
        client.put("vm.pause");
        client.put_json("vm.snapshot-disk", &move_on(&[("a", &at("a2"))]));
        client.put("vm.resume");
        client.put_json(
            "vm.resize-disk",
            &json!({"id": "a", "desired_size": 12 * MIB}),
        );
        for below in [&a, &at("a")] {
            let mark = events.mark();
            client.put_json("vm.commit-disk", &json!({"id": "a"}));
            events.wait_for_device(mark, "job-completed", "a");
            assert_eq!(path(&mut client), json!(below));
        }
        let config = client.get("vm.info")["config"]["disks"][0].clone();
        assert_eq!(config["image_type"], json!("Raw"));
        assert_eq!(queue_threads(&ballast, "a"), four);
        client.put_json("vm.snapshot-disk", &move_on(&[("a", &at("a3"))]));
        let mark = events.mark();
        client.put_json("vm.stream-disk", &json!({"id": "a"}));
        events.wait_for_device(mark, "job-completed", "a");
        let info = client.get("vm.disk-info?id=a");
        assert_eq!(info["backing_chain"], json!([]), "{info}");
        assert_eq!(info["virtual_size"], json!(12 * MIB));

        client.put("vm.reboot");
        assert_eq!(path(&mut client), json!(at("a3")));
        assert_eq!(queue_threads(&ballast, "a"), ["a_q0"]);
        ballast.assert_well();
        client.put("vm.delete");
        for image in [&a, &b, &c, &at("a2"), &at("a3")] {
            check(image);
        }
    }
}

#[test]
fn what_can_not_be_is_refused_by_field_and_leaves_nothing() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    boot(&ballast, &mut client, &["a", "b"]);
    let readonly = empty_image(ballast.dir(), "r", MIB);
    client.put_json(
        "vm.add-disk",
        &json!({"id": "r", "path": readonly, "readonly": true}),
    );
    let names = |ballast: &Ballast| fs::read_dir(ballast.dir()).unwrap().count();
    let (new, taken) = (ballast.path("new"), ballast.path("b"));
    let folder: PathBuf = ballast.dir().into();
    let pair = |id: &str, path: &Path| move_on(&[(id, path)]);
    let before = before(&ballast, &mut client);
    let count = names(&ballast);
    for (body, status, named) in [
        (json!({}), 400, "disks"),
        (json!({"disks": []}), 400, "disks"),
        (json!({"disks": {"id": "a", "path": new}}), 400, "disks"),
        (json!({"disks": [{"id": "a"}]}), 400, "path"),
        (json!({"disks": [{"id": "a", "path": 1}]}), 400, "path"),
        (
            json!({"disks": [{"id": "a", "path": new, "x": 1}]}),
            400,
            "x",
        ),
        (pair("nobody", &new), 404, "nobody"),
        (pair("__balloon", &new), 400, "disks[0].id"),
        (pair("r", &new), 400, "disks[0].id"),
        (pair("a", &taken), 400, "disks[0].path"),
        (pair("a", &folder), 400, "disks[0].path"),
        (pair("a", Path::new("")), 400, "disks[0].path"),
        (
            pair("a", Path::new("/no/such/folder/new")),
            400,
            "disks[0].path",
        ),
        (pair("a", &folder.join("new/")), 400, "disks[0].path"),
        (pair("a", &folder.join("n\0w")), 400, "disks[0].path"),
        (
            pair("a", &folder.join("n".repeat(256))),
            400,
            "disks[0].path",
        ),
        (
            move_on(&[("a", &new), ("a", &folder.join("other"))]),
            400,
            "disks[1].id",
        ),
        (move_on(&[("a", &new), ("b", &new)]), 400, "disks[1].path"),
        (
            move_on(&[("a", &new), ("b", &folder.join("./new"))]),
            400,
            "disks[1].path",
        ),
        (move_on(&[("a", &new), ("b", &taken)]), 400, "disks[1].path"),
    ] {
        let answer = client.try_put_json("vm.snapshot-disk", &body);
        assert_eq!(answer.status, status, "{body}: {}", answer.text());
        assert!(
            answer.reasons().contains(named),
            "{body}: {}",
            answer.text()
        );
        assert_eq!(names(&ballast), count, "{body}");
        before.assert_unchanged(&mut ballast, &mut client, &body.to_string());
    }
    client.put_json("vm.snapshot-disk", &pair("a", &new));
}

#[test]
fn a_disk_whose_path_is_relative_moves_on() {
    let mut launch = Launch::new();
    let folder = launch.path("");
    launch.command().current_dir(&folder);
    let mut ballast = launch.start();
    let mut client = ballast.api();
    empty_image(ballast.dir(), "a", 8 * MIB);
    let mut config = ballast.sleeper();
    config["disks"] = json!([{"id": "a", "path": "a"}]);
    client.put_json("vm.create", &config);
    client.put("vm.boot");
    for name in ["a1", "a2"] {
        client.put_json("vm.snapshot-disk", &move_on(&[("a", Path::new(name))]));
    }
    let chain = client.get("vm.disk-info?id=a")["backing_chain"].clone();
    assert_eq!(chain[0]["path"], json!(ballast.path("a1")));
    assert_eq!(chain[1]["path"], json!(ballast.path("a")));
    ballast.assert_well();
}

/// The first overlay is staged by then, and must be closed by who may.
#[test]
fn a_refusal_after_an_overlay_was_opened_never_ends_the_process() {
    let mut ballast = Ballast::start();
    let mut client = ballast.api();
    boot(&ballast, &mut client, &["a", "b"]);
    let new = ballast.path("new");
    // Another name of the same place, which is found out when both are to get their names.
    std::os::unix::fs::symlink(ballast.dir(), ballast.path("link")).unwrap();
    let body = json!({"disks": [
        {"id": "a", "path": new},
        {"id": "b", "path": ballast.path("link").join("new")},
    ]});
    for round in 0..200 {
        let answer = client.try_put_json("vm.snapshot-disk", &body);
        assert_eq!(answer.status, 400, "{round}: {}", answer.text());
    }
    ballast.assert_well();
}

/// Killed at whatever moment: what has a name is whole, and the images below are as they were.
#[test]
fn a_sigkill_while_disks_move_on_leaves_whole_overlays_or_none() {
    let mut seen = [0; 3];
    // How long it takes when nobody is killed.
    let mut whole = Duration::ZERO;
    for round in 0..=12_u32 {
        let ballast = Ballast::start();
        let mut client = ballast.api();
        boot(&ballast, &mut client, &["a", "b"]);
        let overlays = ["a1", "b1"].map(|name| ballast.path(name));
        let body = move_on(&[("a", &overlays[0]), ("b", &overlays[1])]).to_string();
        let request = format!(
            "PUT /api/v1/vm.snapshot-disk HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let sent = Instant::now();
        client.send(request.as_bytes()).unwrap();
        if round == 0 {
            assert_eq!(client.receive().unwrap().status, 204);
            whole = sent.elapsed();
        } else {
            std::thread::sleep(whole * round / 10);
        }
        let folder = ballast.kill();
        let there = ["a1", "b1"].map(|name| folder.path(name).exists());
        assert_ne!(there, [false, true], "they get their names in order");
        for name in ["a", "b"] {
            assert!(fs::read(folder.path(name)).unwrap() == vec![0; 8 << 20]);
        }
        let files = fs::read_dir(folder.path("")).unwrap();
        for file in files.map(|file| file.unwrap().file_name().into_string().unwrap()) {
            assert!(!file.contains("part"), "{file}");
        }
        let count = there.into_iter().filter(|there| *there).count();
        for name in ["a1", "b1"].into_iter().take(count) {
            check(&folder.path(name));
        }
        seen[count] += 1;
    }
    eprintln!(
        "overlays that were there: none {}, one {}, both {}",
        seen[0], seen[1], seen[2]
    );
}

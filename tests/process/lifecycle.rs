//! How the process starts and ends.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::Signal;
use serde_json::json;

use crate::support::ballast::{Ballast, Launch, binary};
use crate::support::events::{name, parse_monitor};
use crate::support::{eventually, payload, procfs};

#[test]
fn the_version_reads_as_libvirt_and_kata_expect() {
    let output = Command::new(binary()).arg("--version").output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let version = text
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("cloud-hypervisor v"))
        .expect("the name libvirt looks for");
    let major: u32 = version.split('.').next().unwrap().parse().unwrap();
    assert!(major >= 40, "{text}");
}

#[test]
fn unknown_arguments_end_the_process_with_words() {
    for arguments in [
        &["--nonsense"][..],
        &["--api-socket"],
        &["--api-socket", "fd=nine"],
        &["--api-socket", "fd=999"],
        &["--api-socket", "path="],
        &["--api-socket", "/nonexistent/folder/socket"],
        &["--seccomp", "perhaps"],
        &["--event-monitor", "path=/nonexistent/folder/file"],
        &["--config", "/nonexistent/vm.json"],
        &["--log-file", "/nonexistent/folder/log"],
        &["stray"],
    ] {
        let mut launch = Launch::bare();
        launch.command().args(arguments);
        let mut ballast = launch.spawn();
        let status = ballast.wait_for_end();
        assert!(!status.success(), "{arguments:?}");
        assert!(status.code().is_some(), "{arguments:?}: {status}");
        let stderr = ballast.stderr();
        assert!(!stderr.trim().is_empty(), "{arguments:?}: no word");
        assert!(!stderr.contains("panicked"), "{arguments:?}: {stderr}");
    }
}

#[test]
fn the_socket_is_its_owners_alone_and_goes_with_the_process() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut ballast = Ballast::start();
        let mode = fs::metadata(ballast.socket()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        ballast.signal(signal);
        ballast.wait_for_clean_end();
        assert!(!ballast.socket().exists());
    }
}

#[test]
fn a_signal_ends_a_process_with_a_vm_cleanly_too() {
    for signal in [Signal::TERM, Signal::INT] {
        for pause in [false, true] {
            let mut ballast = Ballast::start();
            let mut client = ballast.api();
            client.put_json("vm.create", &ballast.sleeper());
            client.put("vm.boot");
            if pause {
                client.put("vm.pause");
            }
            ballast.signal(signal);
            ballast.wait_for_clean_end();
            assert!(!ballast.socket().exists());
        }
    }
}

#[test]
fn a_stale_socket_is_replaced() {
    let launch = Launch::new();
    drop(UnixListener::bind(launch.path("api.sock")).unwrap());
    assert!(launch.path("api.sock").exists());
    launch.start().assert_well();
}

#[test]
fn what_is_no_socket_is_never_replaced() {
    let launch = Launch::new();
    fs::write(launch.path("api.sock"), "precious").unwrap();
    let mut ballast = launch.spawn();
    assert!(!ballast.wait_for_end().success());
    assert_eq!(fs::read_to_string(ballast.socket()).unwrap(), "precious");
}

#[test]
fn a_second_process_on_the_same_socket_gives_up_and_leaves_the_first_alone() {
    let mut first = Ballast::start();
    let mut second = Launch::bare()
        .arg("--api-socket")
        .arg(first.socket())
        .spawn();
    assert!(!second.wait_for_end().success());
    assert!(!second.stderr().trim().is_empty());
    first.assert_well();
    first.signal(Signal::TERM);
    first.wait_for_clean_end();
}

#[test]
fn after_a_crash_the_next_process_takes_the_socket_over() {
    let first = Ballast::start();
    let socket = first.socket();
    let folder = first.kill();
    assert!(socket.exists());
    let mut launch = Launch::bare();
    launch
        .command()
        .arg("--api-socket")
        .arg(folder.path("api.sock"));
    let mut second = launch.spawn();
    eventually("the second process answers", || {
        crate::support::http::Client::connect(&socket)
            .ok()?
            .try_request("GET", "vmm.ping", None, "")
            .ok()
    });
    second.signal(Signal::TERM);
    second.wait_for_clean_end();
    assert!(!socket.exists());
}

#[test]
fn a_listening_socket_can_be_handed_over() {
    let mut launch = Launch::bare();
    let listener = UnixListener::bind(launch.path("api.sock")).unwrap();
    // Through a shell that moves it to the number, for Rust closes what it does not name.
    let mut command = Command::new("sh");
    command
        .args(["-c", "exec 7<&0 </dev/null; exec \"$0\" --api-socket fd=7"])
        .arg(binary())
        .stdin(OwnedFd::from(listener))
        .stderr(fs::File::create(launch.path("stderr")).unwrap());
    *launch.command() = command;
    let mut ballast = launch.start();
    ballast.api().put_json("vm.create", &ballast.sleeper());
    ballast.assert_well();
    ballast.signal(Signal::TERM);
    ballast.wait_for_clean_end();
}

#[test]
fn a_config_file_creates_and_boots_the_vm() {
    let mut launch = Launch::new();
    let config = json!({
        "memory": {"size": 64 << 20},
        "payload": {"kernel": payload::sleeper(launch.path("x").parent().unwrap())},
        "serial": {"mode": "File", "file": launch.path("serial")},
        "debug_console": {"mode": "File", "file": launch.path("debug")},
    });
    let path = launch.path("vm.json");
    fs::write(&path, config.to_string()).unwrap();
    launch.command().arg("--config").arg(&path);
    let mut ballast = launch.start();
    eventually("the VM runs", || {
        let answer = ballast.api().request("GET", "vm.info", None);
        (answer.status == 200 && answer.json()["state"] == "Running").then_some(())
    });
    for port in ["serial", "debug"] {
        eventually("the guest's greeting", || {
            let text = fs::read_to_string(ballast.path(port)).ok()?;
            (text == payload::GREETING).then_some(())
        });
    }
    ballast.signal(Signal::TERM);
    ballast.wait_for_clean_end();
}

#[test]
fn a_config_file_that_is_wrong_ends_the_process_and_leaves_no_socket() {
    for text in [
        "",
        "{",
        "{\"memory\": {\"size\": 1}}",
        "{\"payload\": {}}",
        "{\"memroy\": {}}",
    ] {
        let mut launch = Launch::new();
        let path = launch.path("vm.json");
        fs::write(&path, text).unwrap();
        launch.command().arg("--config").arg(&path);
        let mut ballast = launch.spawn();
        assert!(!ballast.wait_for_end().success(), "{text}");
        assert!(
            !ballast.stderr().contains("panicked"),
            "{}",
            ballast.stderr()
        );
        assert!(!ballast.stderr().trim().is_empty(), "{text}");
        assert!(!ballast.socket().exists(), "{text}");
    }
}

#[test]
fn the_event_monitor_writes_to_a_file() {
    let mut launch = Launch::new();
    let path = launch.path("events");
    launch
        .command()
        .arg("--event-monitor")
        .arg(format!("path={}", path.display()));
    let mut ballast = launch.start();
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    client.put("vm.boot");
    client.put("vm.pause");
    client.put("vm.resume");
    client.put("vm.shutdown");
    client.put("vm.delete");
    client.put("vmm.shutdown");
    ballast.wait_for_clean_end();
    let text = fs::read_to_string(path).unwrap();
    assert_events(&text);
}

/// The events of a VM's whole life, as Cloud Hypervisor tells them.
fn assert_events(text: &str) {
    let events = parse_monitor(text);
    let names: Vec<String> = events.iter().map(name).collect();
    let mut rest = names.iter();
    for expected in [
        "vmm:starting",
        "vm:booting",
        "vm:booted",
        "vm:pausing",
        "vm:paused",
        "vm:resuming",
        "vm:resumed",
        "vm:shutdown",
        "vm:deleted",
        "vmm:shutdown",
    ] {
        assert!(rest.any(|name| name == expected), "{expected} in {names:?}");
    }
    for event in &events {
        assert!(event["timestamp"]["secs"].is_u64(), "{event}");
        assert!(event["timestamp"]["nanos"].is_u64(), "{event}");
        assert!(event.get("properties").is_some(), "{event}");
    }
    assert!(text.ends_with("}\n\n"), "{text}");
}

#[test]
fn the_event_monitor_writes_to_a_fifo_and_waits_for_its_reader() {
    let mut launch = Launch::new();
    let path = launch.path("fifo");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    launch
        .command()
        .arg("--event-monitor")
        .arg(format!("path={}", path.display()));
    let mut ballast = launch.spawn();
    let reader = std::thread::spawn(move || fs::read_to_string(path).unwrap());
    eventually("it answers", || {
        let mut client = crate::support::http::Client::connect(&ballast.socket()).ok()?;
        client.try_request("GET", "vmm.ping", None, "").ok()
    });
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    client.put("vm.boot");
    client.put("vm.pause");
    client.put("vm.resume");
    client.put("vm.shutdown");
    client.put("vm.delete");
    client.put("vmm.shutdown");
    ballast.wait_for_clean_end();
    assert_events(&reader.join().unwrap());
}

#[test]
fn a_fifo_whose_reader_goes_away_ends_nothing() {
    let mut launch = Launch::new();
    let path = launch.path("fifo");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    launch
        .command()
        .arg("--event-monitor")
        .arg(format!("path={}", path.display()));
    let mut ballast = launch.spawn();
    drop(fs::File::open(path).unwrap());
    eventually("it answers", || {
        let mut client = crate::support::http::Client::connect(&ballast.socket()).ok()?;
        client.try_request("GET", "vmm.ping", None, "").ok()
    });
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    for _ in 0..20 {
        client.put("vm.boot");
        client.put("vm.shutdown");
    }
    ballast.assert_well();
}

#[test]
fn every_thread_has_its_filter_before_there_is_a_vm_and_with_one() {
    let ballast = Ballast::start();
    let mut client = ballast.api();
    assert_all_filtered(&ballast);
    crate::support::artifacts::empty_image(ballast.dir(), "disk", 1 << 20);
    let mut config = ballast.sleeper();
    config["cpus"] = json!({"boot_vcpus": 2, "max_vcpus": 2});
    config["disks"] = json!([{"id": "data", "path": ballast.path("disk"), "num_queues": 2}]);
    client.put_json("vm.create", &config);
    client.put("vm.boot");
    assert_all_filtered(&ballast);
    let names: Vec<String> = procfs::threads(ballast.pid())
        .into_iter()
        .map(|thread| thread.name)
        .collect();
    for name in ["vcpu0", "vcpu1", "data_q0", "data_q1", "__rng", "vmm"] {
        assert!(names.iter().any(|n| n == name), "{name} in {names:?}");
    }
}

fn assert_all_filtered(ballast: &Ballast) {
    let modes = procfs::seccomp_modes(ballast.pid());
    assert!(!modes.is_empty());
    for (name, mode) in &modes {
        assert_eq!(*mode, 2, "thread {name} of {modes:?}");
    }
}

#[test]
fn the_log_goes_to_its_file() {
    let mut launch = Launch::new();
    let log = launch.path("log");
    launch.command().arg("-vv").arg("--log-file").arg(&log);
    let ballast = launch.start();
    let mut client = ballast.api();
    client.put_json("vm.create", &ballast.sleeper());
    client.put("vm.boot");
    client.put("vm.delete");
    assert!(fs::metadata(log).unwrap().len() > 0);
    assert_eq!(ballast.stderr(), "");
}

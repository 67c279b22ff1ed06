//! The real binary: its command line, its sockets, what it says when it can't start.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn ballast(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ballast"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Expects that the process can't start, and says what it says.
fn refusal(arguments: &[&str]) -> String {
    let output = ballast(arguments);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(text(&output.stdout), "");
    let words = text(&output.stderr);
    assert!(words.starts_with("ballast: "), "{words}");
    assert_eq!(words.lines().count(), 1, "{words}");
    words
}

fn string(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_version_is_what_libvirt_kata_and_nomad_look_for() {
    let output = ballast(&["--version"]);
    assert!(output.status.success());
    let text = text(&output.stdout);
    let mut lines = text.lines();
    let first = lines.next().unwrap();
    // libvirt: skips "cloud-hypervisor " and the v, then wants numbers with dots.
    let version = first.strip_prefix("cloud-hypervisor v").unwrap();
    let numbers: Vec<u32> = version.split('.').map(|n| n.parse().unwrap()).collect();
    assert!(numbers.len() == 3 && numbers[0] >= 40);
    // Kata: the third number may be missing, and the line has just these two words.
    assert_eq!(first.split(' ').count(), 2);
    assert_eq!(lines.next(), Some("Migration Protocol Versions: 0"));
}

#[test]
fn help_names_every_option() {
    let output = ballast(&["--help"]);
    assert!(output.status.success());
    for option in [
        "--api-socket",
        "--config",
        "--event-monitor",
        "--log-file",
        "-v",
        "--seccomp",
        "--no-shutdown",
        "--version",
    ] {
        assert!(text(&output.stdout).contains(option), "{option}");
    }
}

#[test]
fn without_anything_to_do_it_says_so() {
    assert!(refusal(&[]).contains("--api-socket"));
    assert!(!ballast(&["--no-such-option"]).status.success());
    assert!(!ballast(&["--seccomp", "maybe"]).status.success());
}

#[test]
fn a_socket_that_somebody_serves_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let words = refusal(&["--api-socket", string(&path)]);
    assert!(words.contains("another process listens"), "{words}");
    std::os::unix::net::UnixStream::connect(&path).unwrap();
}

#[test]
fn a_lock_that_somebody_holds_is_respected() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api.sock");
    let lock = std::fs::File::create(directory.path().join("api.sock.lock")).unwrap();
    lock.lock().unwrap();
    // Stale, but its owner may be about to replace it.
    drop(UnixListener::bind(&path).unwrap());
    let words = refusal(&["--api-socket", &format!("path={}", string(&path))]);
    assert!(words.contains("another process"), "{words}");
    assert!(path.exists());
}

#[test]
fn a_socket_path_that_can_not_be_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(refusal(&["--api-socket", string(&file)]).contains("is not a socket"));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    for path in [file.join("x"), directory.path().join("no/where")] {
        let words = refusal(&["--api-socket", string(&path)]);
        assert!(words.contains("--api-socket"), "{words}");
    }
    assert!(refusal(&["--api-socket", "fd=77"]).contains("fd=77"));
}

#[test]
fn a_config_file_goes_through_the_parser_of_vm_create() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing.json");
    assert!(refusal(&["--config", string(&missing)]).contains("missing.json"));
    for (content, part) in [
        ("", "empty"),
        ("{", "not JSON"),
        (r#"{"memroy":{}}"#, "did you mean `memory`?"),
        (r#"{"net":[{}]}"#, "not supported yet: net"),
        (
            r#"{"disks":[{"path":7}]}"#,
            "disks[0].path: must be a string",
        ),
    ] {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content.as_bytes()).unwrap();
        let words = refusal(&["--config", string(file.path())]);
        assert!(words.contains(part), "{words}");
    }
}

#[test]
fn a_log_or_event_monitor_that_can_not_be_opened_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    for option in ["--log-file", "--event-monitor"] {
        let words = refusal(&["--api-socket", string(&socket), option, "/no/such/place"]);
        assert!(words.contains(option), "{words}");
        assert!(!socket.exists());
    }
}

//! The main thread's and the signal thread's filters, in a process of their own: everything the
//! API does works inside, and what it must not do ends the process.

mod api_support;

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use api_support::{Client, FakeVmm, eventually, request};
use ballast_api::cli::Target;
use ballast_api::event_monitor::EventMonitor;
use ballast_api::raw::BlockedSignals;
use ballast_api::server::{self, Limits};
use ballast_api::socket::ApiSocket;
use ballast_api::{log, routes, sandbox};
use devices::sandbox::{COMMON, Filter, SeccompMode};
use vmm::command::channel;
use vmm::event::Events;

const DIRECTORY: &str = "BALLAST_TEST_SANDBOX_DIRECTORY";
const CRIME: &str = "BALLAST_TEST_SANDBOX_CRIME";

/// Not a test by itself: what the processes that the tests start run.
#[test]
fn child() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
        return;
    };
    log::install_panic_hook();
    log::init(Some(&directory.join("log")), 3).unwrap();
    let socket = ApiSocket::open(&Target::Path(directory.join("api.sock"))).unwrap();
    let events = Events::new(Instant::now());
    let monitor = EventMonitor::open(&Target::Path(directory.join("events")), &events).unwrap();
    let signals = BlockedSignals::block(&[libc::SIGTERM]).unwrap();
    let (handle, endpoint) = channel(events);
    std::thread::spawn(move || FakeVmm::new(endpoint).run());
    let terminator = handle.clone();
    std::thread::spawn(move || {
        Filter::compile(
            "signal-handler",
            SeccompMode::Enforce,
            &[COMMON, sandbox::SIGNALS],
        )
        .unwrap()
        .install()
        .unwrap();
        signals.wait().unwrap();
        terminator.terminate();
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::from_std(socket.listener().unwrap()).unwrap();
        let writer = monitor.into_writer().unwrap();
        Filter::compile("main", SeccompMode::Enforce, &[COMMON, sandbox::MAIN])
            .unwrap()
            .install()
            .unwrap();
        commit(std::env::var(CRIME).as_deref().unwrap_or(""));
        let monitor = tokio::spawn(writer.run(handle.clone()));
        let router = routes::router(handle.clone());
        server::serve(listener, router, handle, Limits::default()).await;
        monitor.await.unwrap();
    });
    drop(socket);
    std::process::exit(0);
}

/// What a thread of the API never does.
fn commit(crime: &str) {
    match crime {
        "" => {}
        "open" => drop(std::fs::File::open("/etc/passwd")),
        "spawn" => drop(std::thread::spawn(|| {})),
        "connect" => drop(std::os::unix::net::UnixStream::connect("/run/x")),
        "execute" => drop(Command::new("/bin/true").spawn()),
        "kill" => drop(rustix::process::kill_process(
            rustix::process::getpid(),
            rustix::process::Signal::TERM,
        )),
        "executable" => drop(map_executable()),
        "panic" => panic!("as told"),
        other => unreachable!("{other}"),
    }
    if !crime.is_empty() {
        eprintln!("{crime} went unpunished");
        std::process::exit(1);
    }
}

#[expect(unsafe_code, reason = "mmap has no safe interface")]
fn map_executable() -> rustix::io::Result<()> {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
    let protection = ProtFlags::READ | ProtFlags::WRITE | ProtFlags::EXEC;
    // SAFETY: a new mapping, which is never touched.
    unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, protection, MapFlags::PRIVATE) }.map(drop)
}

fn start(directory: &Path, crime: &str) -> Child {
    // Inherited by the child, whose main thread belongs to the test harness: in the real process
    // the main thread blocks it.
    BlockedSignals::block(&[libc::SIGTERM]).unwrap();
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(DIRECTORY, directory)
        .env(CRIME, crime)
        // The test harness runs the child on a thread of its own, which gets a heap of its own;
        // glibc opens a file under /proc when it shrinks such a heap. The real process serves on
        // its first thread.
        .env("MALLOC_ARENA_MAX", "1")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn connect(directory: &Path) -> Client {
    let path = directory.join("api.sock");
    eventually("the socket is there", || {
        std::os::unix::net::UnixStream::connect(&path).is_ok()
    });
    Client::connect(&path)
}

/// Whether a new client gets an answer, and not one that there is no room.
fn is_served(directory: &Path) -> bool {
    let Ok(mut client) = std::os::unix::net::UnixStream::connect(directory.join("api.sock")) else {
        return false;
    };
    let mut answer = String::new();
    // One that is turned away may find the line cut while it writes.
    let _ = client.write_all(request("GET", "vmm.ping", "").as_bytes());
    let _ = client.shutdown(std::net::Shutdown::Write);
    let _ = client.read_to_string(&mut answer);
    answer.starts_with("HTTP/1.1 200")
}

fn end(child: Child) -> (ExitStatus, String) {
    let output = child.wait_with_output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status, words)
}

#[test]
fn everything_the_api_does_works_inside_the_filters() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let child = start(path, "");
    let mut client = connect(path);
    let mut listener = connect(path);
    listener.send("GET /api/v1/vm.events HTTP/1.1\r\nHost: x\r\n\r\n");
    listener.read_until(": listening\n\n");
    for (operation, body, status) in [
        ("vm.create", r#"{"memroy":{}}"#, 400),
        (
            "vm.create",
            r#"{"payload":{"kernel":"/k"},"unknown":1}"#,
            204,
        ),
        ("vm.boot", "", 204),
        ("vm.add-disk", r#"{"path":"/d","id":"K\u00f6ln"}"#, 200),
        ("vm.add-disk", r#"{"path":"/slow"}"#, 200),
        ("vm.remove-device", r#"{"id":"nobody"}"#, 404),
        ("vm.pause", "", 204),
        ("vm.delete", "", 204),
        ("vm.nothing", "", 404),
    ] {
        assert_eq!(
            client.put(operation, body).status,
            status,
            "{operation} {body}"
        );
    }
    for (operation, status) in [
        ("vmm.ping", 200),
        ("vm.info", 404),
        ("vm.counters", 404),
        ("vm.overcommit", 404),
        ("metrics", 200),
        ("openapi.json?version=3.0", 200),
    ] {
        assert_eq!(client.get(operation).status, status, "{operation}");
    }
    let mut large = connect(path);
    assert_eq!(large.put("vm.create", &" ".repeat(4 << 20)).status, 400);
    let mut chunked = connect(path);
    chunked.send("PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
    for _ in 0..60 {
        chunked.send(format!("10000\r\n{}\r\n", " ".repeat(1 << 16)));
    }
    chunked.send("0\r\n\r\n");
    assert_eq!(chunked.answer().status, 400);
    let mut broken = connect(path);
    broken.send("nonsense\r\n\r\n");
    assert_eq!(broken.answer().status, 400);
    let mut leaving = connect(path);
    leaving.send(&request("PUT", "vm.create", "{}")[..40]);
    drop(leaving);
    let many: Vec<_> = (0..300).map(|_| connect(path)).collect();
    drop(many);
    // Those who have left hold their places until the server has seen them go.
    eventually("there is room again", || is_served(path));
    client = connect(path);
    assert_eq!(client.put("vmm.shutdown", "").status, 204);
    assert!(listener.rest().contains("event: shutdown\n"));
    let (status, words) = end(child);
    assert!(status.success(), "{status:?}: {words}");
    assert!(!path.join("api.sock").exists() && !path.join("api.sock.lock").exists());
    let events = std::fs::read_to_string(path.join("events")).unwrap();
    assert!(events.contains("\"event\": \"shutdown\"") && events.ends_with("}\n\n"));
    assert!(std::fs::metadata(path.join("log")).unwrap().len() > 0);
}

#[test]
fn sigterm_is_heard_inside_the_filters() {
    let directory = tempfile::tempdir().unwrap();
    let child = start(directory.path(), "");
    assert_eq!(connect(directory.path()).get("vmm.ping").status, 200);
    let process = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
    let (status, words) = end(child);
    assert!(status.success(), "{status:?}: {words}");
    assert!(!directory.path().join("api.sock").exists());
}

#[test]
fn what_the_main_thread_must_not_do_ends_the_process() {
    for crime in ["open", "spawn", "connect", "execute", "kill", "executable"] {
        let directory = tempfile::tempdir().unwrap();
        let (status, words) = end(start(directory.path(), crime));
        assert_eq!(
            status.signal(),
            Some(libc::SIGSYS),
            "{crime}: {status:?} {words}"
        );
    }
}

#[test]
fn a_panic_inside_the_filter_leaves_one_line_with_thread_and_place() {
    let directory = tempfile::tempdir().unwrap();
    let (_, words) = end(start(directory.path(), "panic"));
    let line = words
        .lines()
        .find(|line| line.starts_with("ballast: "))
        .unwrap();
    assert!(line.contains("thread `child` panicked at "), "{words}");
    assert!(
        line.contains("api_sandbox.rs:") && line.ends_with(": as told"),
        "{words}"
    );
}

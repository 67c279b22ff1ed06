//! Many clients, slow clients, silent clients; and nothing left behind.
//!
//! The tests count the descriptors and threads of the process, so they run one at a time.

mod api_support;

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api_support::{Client, SLOW, Server, eventually, open_descriptors, request, threads};
use ballast_api::server::Limits;
use vmm::state::State;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Open descriptors while the server is up and nobody is connected.
fn baseline(server: &Server) -> usize {
    let mut client = server.connect();
    assert_eq!(client.get("vmm.ping").status, 200);
    let connected = open_descriptors();
    drop(client);
    eventually("both ends are closed", || {
        open_descriptors() == connected - 2
    });
    connected - 2
}

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_slow_command_holds_up_neither_ping_nor_info() {
    let _alone = alone();
    let server = Server::with_vm(State::Running);
    let mut slow = server.connect();
    let start = Instant::now();
    slow.send(request("PUT", "vm.add-disk", r#"{"path":"/slow"}"#));
    let mut quick = server.connect();
    for _ in 0..20 {
        assert_eq!(quick.get("vmm.ping").status, 200);
        assert_eq!(quick.get("vm.info").json()["state"], "Running");
        assert_eq!(server.connect().get("vmm.ping").status, 200);
    }
    assert!(start.elapsed() < SLOW, "{:?}", start.elapsed());
    assert_eq!(slow.answer().status, 200);
    assert!(start.elapsed() >= SLOW);
}

#[test]
fn who_goes_away_before_the_answer_leaves_nothing_behind() {
    let _alone = alone();
    let server = Server::with_vm(State::Running);
    let before = baseline(&server);
    for _ in 0..20 {
        let mut client = server.connect();
        client.send(request("PUT", "vm.nmi", ""));
    }
    let mut slow = server.connect();
    slow.send(request("PUT", "vm.add-disk", r#"{"path":"/slow"}"#));
    drop(slow);
    eventually("descriptors are closed", || open_descriptors() <= before);
    assert_eq!(server.connect().get("vmm.ping").status, 200);
}

#[test]
fn five_hundred_connections_are_served_or_told_and_leave_nothing_behind() {
    let _alone = alone();
    let server = Server::start();
    let (descriptors, tasks) = (baseline(&server), threads());
    let mut clients: Vec<_> = (0..500).map(|_| server.connect()).collect();
    let (mut served, mut refused) = (0, 0);
    for client in &mut clients {
        // Who was refused may find the connection closed.
        let _ = client
            .stream
            .write_all(b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n");
        match client.answer().status {
            200 => served += 1,
            503 => refused += 1,
            other => panic!("{other}"),
        }
    }
    assert_eq!((served, refused), (256, 244));
    // Those that are served stay so.
    assert_eq!(clients[0].get("vmm.ping").status, 200);
    assert_eq!(threads(), tasks);
    drop(clients);
    eventually("descriptors are closed", || {
        open_descriptors() <= descriptors
    });
    assert_eq!(server.connect().get("vmm.ping").status, 200);
}

#[test]
fn a_half_sent_request_is_dropped_in_time_but_an_idle_connection_is_not() {
    let _alone = alone();
    let server = Server::with_limits(Limits {
        head_timeout: Duration::from_millis(200),
        ..Limits::default()
    });
    let descriptors = baseline(&server);
    let mut fresh = server.connect();
    let mut used = server.connect();
    assert_eq!(used.get("vmm.ping").status, 200);
    let mut half = server.connect();
    half.send("GET /api/v1/vmm.ping HTT");
    let mut second = server.connect();
    assert_eq!(second.get("vmm.ping").status, 200);
    second.send("PUT /api/v1/vm.boot HTTP/1.1\r\nHost");
    let start = Instant::now();
    assert_eq!(half.rest(), "");
    assert_eq!(second.rest(), "");
    assert!(start.elapsed() < Duration::from_secs(5));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(fresh.get("vmm.ping").status, 200);
    assert_eq!(used.get("vmm.ping").status, 200);
    drop((fresh, used, half, second));
    eventually("descriptors are closed", || {
        open_descriptors() <= descriptors
    });
}

#[test]
fn a_slow_answer_is_not_taken_for_a_half_sent_request() {
    let _alone = alone();
    let server = Server::with_limits(Limits {
        head_timeout: Duration::from_millis(100),
        ..Limits::default()
    });
    let mut client = server.connect();
    assert_eq!(client.put("vm.create", "{}").status, 204);
    let answer = client.put("vm.add-disk", r#"{"path":"/slow"}"#);
    assert_eq!(answer.status, 200);
    assert_eq!(client.get("vmm.ping").status, 200);
}

#[test]
fn half_sent_bodies_and_requests_leave_nothing_behind() {
    let _alone = alone();
    let server = Server::start();
    let descriptors = baseline(&server);
    for bytes in [
        &b"G"[..],
        b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n",
    ] {
        for _ in 0..20 {
            server.connect().send(bytes);
        }
    }
    eventually("descriptors are closed", || {
        open_descriptors() <= descriptors
    });
    let mut client = server.connect();
    assert_eq!(client.get("vm.info").status, 404);
}

#[test]
fn events_come_as_server_sent_events() {
    let _alone = alone();
    let server = Server::start();
    let mut client = server.connect();
    client.send("GET /api/v1/vm.events HTTP/1.1\r\nHost: x\r\n\r\n");
    let head = client.read_until(": listening\n\n");
    assert!(head.starts_with("HTTP/1.1 200 \r\n"), "{head}");
    assert!(head.contains("Content-Type: text/event-stream\r\n"));
    assert!(head.contains("Transfer-Encoding: chunked\r\n"));
    server.events.emit("vm", "booted", &[]);
    server
        .events
        .emit("virtio-device", "activated", &[("id", "_disk0")]);
    let text = client.read_until("_disk0\"}}\n\n");
    assert!(
        text.contains("event: booted\ndata: {\"timestamp\":{\"secs\":0,"),
        "{text}"
    );
    assert!(text.contains("\"source\":\"vm\",\"event\":\"booted\",\"properties\":null}\n\n"));
    assert!(text.contains("event: activated\n"));
}

#[test]
fn the_end_of_the_process_is_the_last_event() {
    let _alone = alone();
    let server = Server::start();
    let mut listener = server.connect();
    listener.send("GET /api/v1/vm.events HTTP/1.1\r\nHost: x\r\n\r\n");
    listener.read_until(": listening\n\n");
    assert_eq!(server.connect().put("vmm.shutdown", "").status, 204);
    let text = listener.rest();
    assert!(text.contains("event: shutdown\n"), "{text}");
    assert!(text.ends_with("0\r\n\r\n"), "{text}");
}

#[test]
fn a_client_that_never_reads_its_events_costs_nothing_and_is_told_what_it_lost() {
    let _alone = alone();
    let server = Server::start();
    let mut silent = server.connect();
    silent.send("GET /api/v1/vm.events HTTP/1.1\r\nHost: x\r\n\r\n");
    silent.read_until(": listening\n\n");
    let mut other = server.connect();
    let long = "x".repeat(2000);
    let emit = |count| {
        for _ in 0..count {
            server.events.emit("vm", "io-error", &[("error", &long)]);
        }
    };
    emit(2000);
    std::thread::sleep(Duration::from_millis(100));
    let before = resident_kib();
    emit(20_000);
    std::thread::sleep(Duration::from_millis(100));
    let grown = resident_kib().saturating_sub(before);
    assert!(grown < 4096, "{grown} KiB");
    assert_eq!(other.get("vmm.ping").status, 200);
    assert_eq!(other.put("vm.create", "{}").status, 204);
    let text = silent.read_until("\"event\":\"events-lost\",\"properties\":{\"count\":\"");
    assert!(text.contains("event: io-error\n"));
}

#[test]
fn a_client_that_never_reads_does_not_hold_up_the_end() {
    let _alone = alone();
    let server = Server::start();
    let mut silent = server.connect();
    silent.send("GET /api/v1/vm.events HTTP/1.1\r\nHost: x\r\n\r\n");
    silent.read_until(": listening\n\n");
    let mut hoarder = server.connect();
    for _ in 0..50 {
        hoarder.send("GET /api/v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n");
    }
    let long = "x".repeat(2000);
    for _ in 0..2000 {
        server.events.emit("vm", "io-error", &[("error", &long)]);
    }
    let start = Instant::now();
    assert_eq!(server.connect().put("vmm.shutdown", "").status, 204);
    drop(server);
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn a_listener_that_leaves_is_forgotten_at_the_next_event() {
    let _alone = alone();
    let server = Server::start();
    let descriptors = baseline(&server);
    for _ in 0..20 {
        let mut client = server.connect();
        client.send("GET /api/v1/vm.events HTTP/1.1\r\nHost: x\r\n\r\n");
        client.read_until(": listening\n\n");
    }
    eventually("descriptors are closed", || {
        server.events.emit("vm", "booted", &[]);
        open_descriptors() <= descriptors
    });
}

#[test]
fn requests_with_descriptors_leave_nothing_behind() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::os::fd::AsFd;

    let _alone = alone();
    let server = Server::start();
    let before = baseline(&server);
    let send = |client: &Client, bytes: &str| {
        let null = std::fs::File::open("/dev/null").unwrap();
        let descriptors = [null.as_fd(); 60];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(60))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let bytes = [std::io::IoSlice::new(bytes.as_bytes())];
        sendmsg(&client.stream, &bytes, &mut control, SendFlags::empty())
    };
    let mut client = server.connect();
    for _ in 0..100 {
        send(&client, "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        assert_eq!(client.answer().status, 200);
    }
    // A request that never ends can't collect descriptors without end.
    let hoarder = server.connect();
    send(&hoarder, "GET /api/v1/vmm.ping HTTP/1.1\r\n").unwrap();
    for _ in 0..20 {
        send(&hoarder, "X: y\r\n").unwrap();
    }
    assert_eq!(client.get("vmm.ping").status, 200);
    assert!(open_descriptors() < before + 700, "{}", open_descriptors());
    drop((client, hoarder));
    eventually("descriptors are closed", || open_descriptors() <= before);
}

#[test]
fn running_out_of_descriptors_is_waited_out_without_spinning() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    use rustix::time::{ClockId, clock_gettime};

    let _alone = alone();
    let server = Server::start();
    let mut served = server.connect();
    assert_eq!(served.get("vmm.ping").status, 200);
    let waiting = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let address = SocketAddrUnix::new(&server.path).unwrap();

    let limit = getrlimit(Resource::Nofile);
    let none = Rlimit {
        current: Some(3),
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, none).unwrap();
    connect(&waiting, &address).unwrap();
    let before = Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let used = Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap() - before;
    let still_served = served.get("vmm.ping").status;
    setrlimit(Resource::Nofile, limit).unwrap();

    assert_eq!(still_served, 200);
    assert!(used < Duration::from_millis(100), "{used:?}");
    let mut waiting = Client::over(waiting.into());
    assert_eq!(waiting.get("vmm.ping").status, 200);
}

/// Not a benchmark, only a figure to look at; the machine may be busy.
#[test]
fn ping_over_a_kept_connection_is_quick() {
    let _alone = alone();
    let server = Server::start();
    let mut client = server.connect();
    let mut times: Vec<_> = (0..2000)
        .map(|_| {
            let start = Instant::now();
            assert_eq!(client.get("vmm.ping").status, 200);
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("vmm.ping: median {:?}, p99 {:?}", times[1000], times[1980]);
    assert!(times[1000] < Duration::from_millis(5), "{:?}", times[1000]);
}

//! Consoles against real files, pseudo-terminals and sockets, each with its thread in its real
//! filter.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::bus::BusDevice;
use crate::event::Reporter;
use crate::guest_memory::discard::inhibit::Inhibitor;
use crate::legacy::{DebugConsole, SerialDevice};
use crate::sandbox::SeccompMode;

fn context() -> BuildContext {
    BuildContext {
        reporter: Reporter::silent(),
        seccomp: SeccompMode::Enforce,
        discards: Inhibitor::default(),
    }
}

fn config(mode: ConsoleMode, path: Option<&Path>) -> ConsoleConfig {
    ConsoleConfig {
        mode,
        file: path.map(Path::to_owned),
        socket: path.map(Path::to_owned),
    }
}

fn open(mode: ConsoleMode, path: Option<&Path>) -> ConsoleBackend {
    ConsoleBackend::open(&config(mode, path), context()).unwrap()
}

fn refused_field(mode: ConsoleMode, path: Option<&Path>) -> String {
    match ConsoleBackend::open(&config(mode, path), context()) {
        Err(BuildError::Invalid(invalid)) => invalid.field,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("was accepted"),
    }
}

fn boot(backend: &ConsoleBackend) -> Arc<SerialDevice> {
    SerialDevice::attach(backend, EventFd::new(EFD_NONBLOCK).unwrap())
}

/// Prints as a guest does: one byte per exit.
fn print(device: &dyn BusDevice, text: &[u8]) {
    for byte in text {
        device.write(0, &[*byte]);
    }
}

/// Reads as a driver does: while the line status says that there is data.
fn receive(device: &SerialDevice, count: usize) -> Vec<u8> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut received = Vec::new();
    while received.len() < count {
        let mut byte = [0];
        device.read(5, &mut byte);
        if byte[0] & 1 != 0 {
            device.read(0, &mut byte);
            received.push(byte[0]);
        } else {
            assert!(Instant::now() < deadline, "{} of {count}", received.len());
            std::thread::yield_now();
        }
    }
    received
}

/// The interrupt handler of a driver that takes `most` bytes at a time, and looks again for as long
/// as the UART says that something is pending.
fn handle_interrupt(device: &SerialDevice, most: usize, received: &mut Vec<u8>) {
    let read = |register| {
        let mut byte = [0];
        device.read(register, &mut byte);
        byte[0]
    };
    while read(2) & 1 == 0 {
        for _ in 0..most {
            if read(5) & 1 == 0 {
                break;
            }
            received.push(read(0));
        }
    }
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

#[test]
fn output_reaches_a_file_in_order_over_several_boots() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let backend = open(ConsoleMode::File, Some(&path));
    let text = pattern(100_000);
    print(&*boot(&backend), &text[..60_000]);
    print(&*boot(&backend), &text[60_000..]);
    eventually("the file is written while the VM runs", || {
        std::fs::read(&path).unwrap() == text
    });
    assert_eq!(backend.dropped_bytes(), 0);
    drop(backend);
    let mode = path.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn an_old_log_is_replaced_by_the_first_byte_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    std::fs::write(&path, "old").unwrap();
    drop(open(ConsoleMode::File, Some(&path)));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    let backend = open(ConsoleMode::File, Some(&path));
    print(&*boot(&backend), b"n");
    drop(backend);
    assert_eq!(std::fs::read(&path).unwrap(), b"n");
}

#[test]
fn a_file_nobody_wrote_to_does_not_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let backend = open(ConsoleMode::File, Some(&path));
    assert!(path.exists());
    drop(backend);
    assert!(!path.exists());
}

#[test]
fn what_is_no_file_is_refused_without_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let missing = dir.path().join("no/such/dir");
    for path in [Some(fifo.as_path()), Some(dir.path()), Some(&missing), None] {
        assert_eq!(refused_field(ConsoleMode::File, path), "file");
    }
    let _reader = rustix::fs::open(
        &fifo,
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    assert_eq!(refused_field(ConsoleMode::File, Some(&fifo)), "file");
}

#[test]
fn a_full_disk_loses_output_and_nothing_else() {
    let backend = open(ConsoleMode::File, Some(Path::new("/dev/full")));
    let device = boot(&backend);
    print(&*device, &pattern(1000));
    drop(backend);
    print(&*device, b"still here");
}

#[test]
fn a_pty_carries_bytes_both_ways_unchanged() {
    let backend = open(ConsoleMode::Pty, None);
    let device = boot(&backend);
    let path = backend.pty_path().unwrap().to_owned();
    for _ in 0..2 {
        // The client may come and go.
        let mut client = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let text = b"login: \r\n\x03\x04\x7f\xff";
        print(&*device, text);
        let mut read = vec![0; text.len()];
        client.read_exact(&mut read).unwrap();
        assert_eq!(read, text);
        client.write_all(b"root\n\x03\x1a\x00").unwrap();
        assert_eq!(receive(&device, 8), b"root\n\x03\x1a\x00");
    }
}

#[test]
fn a_pty_nobody_reads_drops_the_oldest_output_and_costs_no_time() {
    let backend = open(ConsoleMode::Pty, None);
    let device = boot(&backend);
    let text = pattern(300_000);
    let start = Instant::now();
    print(&*device, &text);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(backend.dropped_bytes() > 100_000);
    let path = backend.pty_path().unwrap();
    let mut client = std::fs::File::open(path).unwrap();
    let mut read = vec![0; 1000];
    let mut seen = Vec::new();
    while !seen.ends_with(&text[text.len() - 100..]) {
        let count = client.read(&mut read).unwrap();
        seen.extend_from_slice(&read[..count]);
    }
}

#[test]
fn input_larger_than_the_fifo_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let backend = open(ConsoleMode::Socket, Some(&path));
    let device = boot(&backend);
    let text = pattern(200_000);
    let mut client = UnixStream::connect(&path).unwrap();
    let sent = text.clone();
    let sender = std::thread::spawn(move || client.write_all(&sent).unwrap());
    assert_eq!(receive(&device, text.len()), text);
    sender.join().unwrap();
}

#[test]
fn input_waits_while_the_uart_is_in_loopback_mode() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let backend = open(ConsoleMode::Socket, Some(&path));
    let device = boot(&backend);
    device.write(4, &[0x10]);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"hello").unwrap();
    std::thread::sleep(Duration::from_millis(50));
    device.write(4, &[0]);
    assert_eq!(receive(&device, 5), b"hello");
}

#[test]
fn input_that_comes_before_the_boot_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let backend = open(ConsoleMode::Socket, Some(&path));
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"early").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(receive(&boot(&backend), 5), b"early");
}

#[test]
fn input_raises_the_interrupt_that_the_driver_enabled() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let backend = open(ConsoleMode::Socket, Some(&path));
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let device = SerialDevice::attach(&backend, interrupt.try_clone().unwrap());
    device.write(1, &[1]);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"x").unwrap();
    eventually("an interrupt", || interrupt.read().is_ok());
    let mut iir = [0];
    device.read(2, &mut iir);
    assert_eq!(iir[0] & 0xf, 4);
}

#[test]
fn a_socket_greets_its_client_with_what_was_said_before_and_can_be_reconnected() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let backend = open(ConsoleMode::Socket, Some(&path));
    let device = boot(&backend);
    print(&*device, b"one ");
    for round in 0..20 {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"in").unwrap();
        assert_eq!(receive(&device, 2), b"in");
        print(&*device, b"two");
        let expected: &[u8] = if round == 0 { b"one two" } else { b"two" };
        let mut read = vec![0; expected.len()];
        client.read_exact(&mut read).unwrap();
        assert_eq!(read, expected);
    }
}

#[test]
fn a_socket_nobody_is_connected_to_keeps_the_newest_64_kib() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let backend = open(ConsoleMode::Socket, Some(&path));
    let text = pattern(200_000);
    print(&*boot(&backend), &text);
    let mut client = UnixStream::connect(&path).unwrap();
    let mut read = vec![0; 64 << 10];
    client.read_exact(&mut read).unwrap();
    assert!(text.ends_with(&read));
}

#[test]
fn the_last_client_to_come_has_the_console() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let backend = open(ConsoleMode::Socket, Some(&path));
    let device = boot(&backend);
    let mut first = UnixStream::connect(&path).unwrap();
    first.write_all(b"1").unwrap();
    assert_eq!(receive(&device, 1), b"1");
    let mut second = UnixStream::connect(&path).unwrap();
    let mut byte = [0];
    assert_eq!(first.read(&mut byte).unwrap(), 0, "the first is let go");
    print(&*device, b"x");
    second.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
fn a_client_that_sends_and_hangs_up_is_heard_and_one_that_only_stops_sending_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let backend = open(ConsoleMode::Socket, Some(&path));
    let device = boot(&backend);
    let text = pattern(3000);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(&text).unwrap();
    drop(client);
    assert_eq!(receive(&device, text.len()), text);

    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"ls\n").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(receive(&device, 3), b"ls\n");
    print(&*device, b"answer");
    let mut read = [0; 6];
    client.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"answer");
}

#[test]
fn only_a_stale_socket_is_replaced_and_only_our_own_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    std::fs::write(&path, "precious").unwrap();
    assert_eq!(refused_field(ConsoleMode::Socket, Some(&path)), "socket");
    std::fs::remove_file(&path).unwrap();

    let live = UnixListener::bind(&path).unwrap();
    assert_eq!(refused_field(ConsoleMode::Socket, Some(&path)), "socket");
    drop(live);
    let backend = open(ConsoleMode::Socket, Some(&path));
    let mode = path.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(refused_field(ConsoleMode::Socket, Some(&path)), "socket");
    drop(backend);
    assert!(!path.exists());

    let backend = open(ConsoleMode::Socket, Some(&path));
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "somebody else's").unwrap();
    drop(backend);
    assert!(path.exists());

    let long = dir.path().join("x".repeat(200));
    assert_eq!(refused_field(ConsoleMode::Socket, Some(&long)), "socket");
}

fn on_terminal(host: Host) -> ConsoleBackend {
    ConsoleBackend::start(ConsoleMode::Tty, host, "tty-test", context()).unwrap()
}

#[test]
fn a_terminal_is_raw_while_it_is_a_console_and_as_before_afterwards() {
    use rustix::termios::{LocalModes, OutputModes, tcgetattr};
    let Host {
        reader: operator_reads,
        writer: operator_writes,
        leftovers,
        ..
    } = host::pty().unwrap();
    let terminal = leftovers.pty_client_side.unwrap();
    let mut cooked = tcgetattr(&terminal).unwrap();
    cooked.local_modes |= LocalModes::ICANON | LocalModes::ECHO;
    rustix::termios::tcsetattr(&terminal, rustix::termios::OptionalActions::Now, &cooked).unwrap();

    let host = host::terminal(Some(terminal.as_fd()), terminal.as_fd()).unwrap();
    let backend = on_terminal(host);
    let raw = tcgetattr(&terminal).unwrap();
    assert!(
        !raw.local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO)
    );
    assert!(raw.output_modes.contains(OutputModes::OPOST));

    let device = boot(&backend);
    rustix::io::write(&operator_writes.unwrap().fd, b"ls\r").unwrap();
    assert_eq!(receive(&device, 3), b"ls\r");
    print(&*device, b"file");
    let mut operator_reads = std::fs::File::from(operator_reads.unwrap());
    let mut read = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    while read != b"file" {
        let mut bytes = [0; 16];
        // Non-blocking, so there may be nothing yet.
        let count = operator_reads.read(&mut bytes).unwrap_or(0);
        read.extend_from_slice(&bytes[..count]);
        assert!(Instant::now() < deadline, "{read:?}");
    }
    drop(backend);
    let after = tcgetattr(&terminal).unwrap();
    assert!(
        after
            .local_modes
            .contains(LocalModes::ICANON | LocalModes::ECHO)
    );
}

#[test]
fn standard_streams_may_be_pipes_files_or_sockets_and_may_close() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script");
    let text = pattern(20_000);
    std::fs::write(&script, &text).unwrap();
    let script = std::fs::File::open(&script).unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let backend = on_terminal(host::terminal(Some(script.as_fd()), theirs.as_fd()).unwrap());
    let device = boot(&backend);
    assert_eq!(receive(&device, text.len()), text);
    print(&*device, b"to a socket");
    let mut read = [0; 11];
    ours.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"to a socket");
    drop(backend);

    let (reader, writer) = std::io::pipe().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let backend = on_terminal(host::terminal(Some(null.as_fd()), writer.as_fd()).unwrap());
    let device = boot(&backend);
    // A pipe that nobody empties blocks neither the guest nor the end.
    print(&*device, &pattern(500_000));
    drop(reader);
    print(&*device, b"into the void");
    drop(backend);
}

#[test]
fn no_console_takes_output_and_keeps_nothing() {
    for mode in [ConsoleMode::Off, ConsoleMode::Null] {
        let backend = open(mode, None);
        let device = boot(&backend);
        print(&*device, &pattern(10_000));
        assert_eq!((backend.mode(), backend.dropped_bytes()), (mode, 0));
    }
}

#[test]
fn the_debug_console_writes_and_reads_back_its_mark() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("debug");
    let config = DebugConsoleConfig {
        mode: ConsoleMode::File,
        file: Some(path.clone()),
        ..DebugConsoleConfig::default()
    };
    let backend = ConsoleBackend::open_debug(&config, context()).unwrap();
    let port = DebugConsole::new(&backend);
    print(&port, b"SeaBIOS");
    let mut byte = [0];
    port.read(0, &mut byte);
    assert_eq!(byte[0], 0xe9);
    drop(backend);
    assert_eq!(std::fs::read(&path).unwrap(), b"SeaBIOS");
}

#[test]
fn backends_open_and_close_without_leaving_descriptors_or_threads() {
    let count = |what: &str| {
        std::fs::read_dir(format!("/proc/self/{what}"))
            .unwrap()
            .count()
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("path");
    // Other tests run beside this one, so what counts is that the numbers do not grow with it.
    let before = (count("fd"), count("task"));
    for _ in 0..100 {
        for mode in [ConsoleMode::File, ConsoleMode::Socket, ConsoleMode::Pty] {
            drop(boot(&open(mode, Some(&path))));
        }
    }
    assert!(count("fd") < before.0 + 100 && count("task") < before.1 + 50);
}

#[test]
fn a_sandboxed_thread_with_the_open_list_can_open_and_close_every_mode() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("path");
    let spawning: &[Allow] = &[
        allow!(clone3),
        allow!(clone),
        allow!(rseq),
        allow!(set_robust_list),
        allow!(seccomp),
        allow!(prctl),
        allow!(sched_getaffinity),
    ];
    let lists = [sandbox::COMMON, sandbox::WORKER, OPEN, spawning];
    let filter = Filter::compile("vmm-test", SeccompMode::Enforce, &lists).unwrap();
    std::thread::spawn(move || {
        let (reader, writer) = std::io::pipe().unwrap();
        let pty = host::pty().unwrap().leftovers.pty_client_side.unwrap();
        filter.install().unwrap();
        for mode in [ConsoleMode::File, ConsoleMode::Socket, ConsoleMode::Pty] {
            for _ in 0..2 {
                let backend = open(mode, Some(&path));
                let device = boot(&backend);
                print(&*device, b"x");
                drop(backend);
                if mode == ConsoleMode::File {
                    std::fs::remove_file(&path).unwrap();
                }
            }
        }
        // A stale socket, and a file made and never used.
        drop(open(ConsoleMode::File, Some(&path)));
        assert!(!path.exists());
        let stale = host::socket(&path).unwrap();
        drop(stale.listener);
        std::mem::forget(stale.leftovers);
        drop(open(ConsoleMode::Socket, Some(&path)));
        for (input, output) in [(reader.as_fd(), writer.as_fd()), (pty.as_fd(), pty.as_fd())] {
            let backend = on_terminal(host::terminal(Some(input), output).unwrap());
            print(&*boot(&backend), b"x");
        }
    })
    .join()
    .unwrap();
}

#[test]
fn input_left_in_the_fifo_stays_announced_until_it_is_read() {
    let backend = open(ConsoleMode::Null, None);
    let device = boot(&backend);
    let identify = || {
        let mut byte = [0];
        device.read(2, &mut byte);
        byte[0]
    };
    device.write(1, &[3]);
    assert_eq!(device.offer(b"four"), 4);
    for _ in 0..4 {
        assert_eq!(identify(), 0xc4);
        device.read(0, &mut [0]);
    }
    // The transmitter's turn, which reading does take back.
    assert_eq!(identify(), 0xc2);
    assert_eq!(identify(), 0xc1);
    // Not announced to a driver that does not want to know.
    device.write(1, &[0]);
    assert_eq!(device.offer(b"x"), 1);
    assert_eq!(identify(), 0xc1);
}

#[test]
fn a_driver_that_takes_a_few_bytes_an_interrupt_gets_a_long_line_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let backend = open(ConsoleMode::Socket, Some(&path));
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let device = SerialDevice::attach(&backend, interrupt.try_clone().unwrap());
    device.write(1, &[1]);
    let mut client = UnixStream::connect(&path).unwrap();
    let line: Vec<u8> = (0..4000_u32).map(|n| (n % 251) as u8).collect();
    client.write_all(&line).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut received = Vec::new();
    while received.len() < line.len() {
        if interrupt.read().is_ok() {
            handle_interrupt(&device, 5, &mut received);
        }
        assert!(Instant::now() < deadline, "{} bytes", received.len());
    }
    assert!(received == line);
}

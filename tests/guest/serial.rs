//! Where the guest's serial line can lead.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;

use serde_json::json;

use crate::support::agent::{Agent, READY};
use crate::support::ballast::{Ballast, Launch};
use crate::support::eventually;
use crate::vm::{Vm, add_to_cmdline, config};

#[test]
fn a_file_receives_what_the_guest_prints() {
    let ballast = Ballast::start();
    let mut config = config(ballast.dir());
    config["serial"] = json!({"mode": "File", "file": ballast.path("serial.txt")});
    let mut api = ballast.api();
    api.put_json("vm.create", &config);
    api.put("vm.boot");
    eventually("the guest is ready", || {
        let text = fs::read(ballast.path("serial.txt")).ok()?;
        String::from_utf8_lossy(&text).contains(READY).then_some(())
    });
}

#[test]
fn a_terminal_is_made_named_and_spoken_over() {
    let ballast = Ballast::start();
    let mut config = config(ballast.dir());
    config["serial"] = json!({"mode": "Pty"});
    let mut api = ballast.api();
    api.put_json("vm.create", &config);
    let path = api.get("vm.info")["config"]["serial"]["file"].clone();
    let path = path.as_str().expect("the terminal's path").to_owned();
    assert!(path.starts_with("/dev/pts/"), "{path}");
    let agent = Agent::on_terminal(Path::new(&path));
    api.put("vm.boot");
    agent.wait_ready();
    assert_eq!(agent.ok("echo over the terminal"), "over the terminal");
    let long = "x".repeat(900);
    assert_eq!(agent.ok(&format!("echo {long}")), long);
    // Nobody needs to listen.
    drop(agent);
    api.put("vm.pause");
    api.put("vm.resume");
}

#[test]
fn nobody_needs_to_open_the_terminal() {
    let mut ballast = Ballast::start();
    let mut config = config(ballast.dir());
    config["serial"] = json!({"mode": "Pty"});
    config["payload"]["cmdline"] = json!("console=ttyS0 ballast.poweroff");
    let mut api = ballast.api();
    api.put_json("vm.create", &config);
    api.put("vm.boot");
    ballast.wait_for_clean_end();
}

#[test]
fn the_socket_takes_one_client_after_the_other() {
    let vm = Vm::boot(|_, _| {});
    assert_eq!(vm.agent.ok("echo first"), "first");
    let path = vm.path("serial.sock");
    let Vm {
        agent,
        ballast,
        mut api,
        ..
    } = vm;
    drop(agent);
    // A dropped agent ends at its next byte.
    api.put("vm.reboot");
    let mut text = String::new();
    eventually("a second client hears the guest", || {
        let mut stream = UnixStream::connect(&path).ok()?;
        stream
            .set_read_timeout(Some(std::time::Duration::from_secs(30)))
            .ok()?;
        let mut chunk = [0; 1024];
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            text.push_str(&String::from_utf8_lossy(&chunk[..count]));
            if text.contains(READY) {
                return Some(());
            }
        }
        None
    });
    let agent = Agent::on_socket(&path);
    assert_eq!(agent.ok("echo third"), "third");
    drop(ballast);
}

#[test]
fn standard_input_and_output_are_a_serial_line_too() {
    let mut launch = Launch::new();
    launch
        .command()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut ballast = launch.start();
    let (input, output) = ballast.take_streams();
    let agent = Agent::over(output, input);
    let mut config = config(ballast.dir());
    config["serial"] = json!({"mode": "Tty"});
    let mut api = ballast.api();
    api.put_json("vm.create", &config);
    api.put("vm.boot");
    agent.wait_ready();
    assert_eq!(agent.ok("echo over the pipes"), "over the pipes");
    let line = agent.mark();
    api.put("vm.reboot");
    agent.wait_ready_after(line);
    assert_eq!(agent.ok("echo again"), "again");
}

#[test]
fn a_guest_boots_without_a_listener_on_its_serial_port() {
    let mut ballast = Ballast::start();
    let mut config = config(ballast.dir());
    config["serial"] = json!({"mode": "Null"});
    add_to_cmdline(&mut config, "ballast.poweroff");
    let mut api = ballast.api();
    api.put_json("vm.create", &config);
    api.put("vm.boot");
    ballast.wait_for_clean_end();
}

#[test]
fn a_guest_boots_without_a_serial_port() {
    let mut ballast = Ballast::start();
    let mut config = config(ballast.dir());
    config["serial"] = json!({"mode": "Off"});
    // Nothing of our init, which needs the port: the kernel starts one program, which powers off.
    config["payload"]["cmdline"] = json!("quiet rdinit=/bin/poweroff -- -f");
    let mut api = ballast.api();
    api.put_json("vm.create", &config);
    api.put("vm.boot");
    ballast.wait_for_clean_end();
}

#[test]
fn thousands_of_lines_arrive_whole() {
    let vm = Vm::boot(|_, _| {});
    let count = 4000;
    let output = vm.agent.ok(&format!("seq {count}"));
    let expected: Vec<String> = (1..=count).map(|n| n.to_string()).collect();
    assert!(
        output.lines().eq(expected.iter().map(String::as_str)),
        "lines are missing"
    );
}

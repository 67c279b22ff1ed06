//! A process that may not open enough: the request is not to blame, and nothing is left half done.

use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use serde_json::json;

use crate::support::artifacts::empty_image;
use crate::support::ballast::{Ballast, Launch};
use crate::support::payload;

/// A pseudo-terminal: our end, and that of who runs on it.
fn terminal() -> (OwnedFd, OwnedFd) {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let ours = openat(CWD, "/dev/ptmx", flags, Mode::empty()).unwrap();
    rustix::pty::unlockpt(&ours).unwrap();
    let name = rustix::pty::ptsname(&ours, Vec::new()).unwrap();
    let theirs = openat(CWD, name.as_c_str(), flags, Mode::empty()).unwrap();
    (ours, theirs)
}

/// Lets the process have descriptors below `number` only; those it has, it keeps.
fn limit_descriptors(ballast: &Ballast, number: Option<u64>) {
    let pid = Pid::from_raw(ballast.pid().cast_signed());
    let old = prlimit(
        pid,
        Resource::Nofile,
        Rlimit {
            current: Some(1024),
            maximum: Some(4096),
        },
    );
    old.unwrap();
    if let Some(number) = number {
        let limit = Rlimit {
            current: Some(number),
            maximum: Some(4096),
        };
        prlimit(pid, Resource::Nofile, limit).unwrap();
    }
}

fn is_raw(termios: &Termios) -> bool {
    !termios
        .local_modes
        .intersects(LocalModes::ICANON | LocalModes::ECHO)
}

#[test]
fn a_process_out_of_descriptors_says_so_and_leaves_the_terminal_alone() {
    let (_ours, theirs) = terminal();
    let mut launch = Launch::new();
    launch.command().stdin(theirs.try_clone().unwrap());
    let mut ballast = launch.start();
    let disk = empty_image(ballast.dir(), "disk.raw", 1 << 20);
    let config = json!({
        "memory": {"size": 64 << 20},
        "payload": {"kernel": payload::sleeper(ballast.dir())},
        "serial": {"mode": "Tty"},
        "disks": [{"path": disk, "readonly": true}],
        "balloons": [{"size": 0}],
    });
    let mut client = ballast.api();
    let before = super::before(&ballast, &mut client);
    assert!(
        !is_raw(&tcgetattr(&theirs).unwrap()),
        "a new terminal is not raw"
    );
    let (mut creations_refused, mut boots_refused) = (0, 0);
    let booted = (3..200).any(|number| {
        limit_descriptors(&ballast, Some(number));
        let created = client.try_put_json("vm.create", &config);
        let booted = match created.status {
            204 => {
                let booted = client.request("PUT", "vm.boot", None);
                if booted.status != 204 {
                    assert_eq!(booted.status, 503, "limit {number}: {}", booted.text());
                    boots_refused += 1;
                }
                client.put("vm.delete");
                booted.status == 204
            }
            status => {
                assert_eq!(status, 503, "limit {number}: {}", created.text());
                creations_refused += 1;
                false
            }
        };
        assert!(
            !is_raw(&tcgetattr(&theirs).unwrap()),
            "limit {number}: there is no VM, and the terminal is raw"
        );
        booted
    });
    assert!(booted, "with enough descriptors it boots");
    assert!(
        creations_refused > 0 && boots_refused > 0,
        "no limit was low enough"
    );
    limit_descriptors(&ballast, None);
    before.assert_unchanged(&mut ballast, &mut client, "too few descriptors");
}

//! How many guests run on one host, each with bursts of memory use, and what they get done: with
//! the governor and with nothing. For the lab host: it fills the memory of the machine it runs on.
//!
//! Guests are started one after another until something breaks: a program killed in a guest for
//! lack of memory, a process of the host likewise, or no burst done by some guest for long. What
//! counts is the largest number with which all was well for a while.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::Options;
use crate::support::agent::{Agent, READY};
use crate::support::ballast::{Ballast, Launch};
use crate::support::http::Client;
use crate::support::within;

const MIB: u64 = 1 << 20;
const MAX_SIZE: u64 = 512 * MIB;
const GUARANTEED_SIZE: u64 = 160 * MIB;
/// What one burst touches: more than a guest is guaranteed, less than it may have.
const BURST_MIB: u64 = 200;
/// From one burst of a guest to its next, in seconds.
const PERIOD: u64 = 40;
/// So many are started before anything is looked at, and so many join at a time then.
const FIRST: usize = 10;
const MORE: usize = 3;
/// How long they run together before more join them: each has a burst.
const SETTLE: Duration = Duration::from_secs(45);
/// How many processes are killed.
const KILLS: usize = 12;
/// A guest that has done no burst for so long does not keep up any more.
const STARVED: Duration = Duration::from_secs(240);

/// Who looks after the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Nobody: guests keep what they touched once.
    Off,
    /// Each guest reports what it frees.
    Reporting,
    /// The governor, and the ledger that the processes share.
    Auto,
}

/// When guests have their bursts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bursts {
    /// Spread over the period.
    Staggered,
    /// All at once.
    Coincident,
}

struct Guest {
    ballast: Ballast,
    agent: Agent,
    started: Instant,
}

/// What the guests told so far.
#[derive(Default)]
struct Told {
    bursts: usize,
    killed: usize,
    starved: usize,
    dead: usize,
}

struct Host<'a> {
    options: &'a Options,
    policy: Policy,
    bursts: Bursts,
    ledger: tempfile::TempDir,
    guests: Vec<Guest>,
    kills_before: u64,
}

/// Prints a table: one line for each policy and way of bursting, as it is measured.
pub fn measure(options: &Options) {
    // The host's OOM killer takes guests, not who counts them.
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        eprintln!("bench: may be killed itself: {error}");
    }
    println!(
        "| bursts | policy | guests that ran well | bursts each minute then | what ended it |"
    );
    println!("|---|---|---|---|---|");
    for bursts in [Bursts::Staggered, Bursts::Coincident] {
        for policy in [Policy::Off, Policy::Auto, Policy::Reporting] {
            let (well, line) = Host::new(options, policy, bursts).fill();
            println!("{line}");
            if policy == Policy::Auto {
                println!("{}", Host::new(options, policy, bursts).with_kills(well));
            }
        }
    }
}

impl<'a> Host<'a> {
    fn new(options: &'a Options, policy: Policy, bursts: Bursts) -> Self {
        Self {
            options,
            policy,
            bursts,
            ledger: tempfile::tempdir().expect("a folder"),
            guests: Vec::new(),
            kills_before: host_kills(),
        }
    }

    /// Starts guests until something breaks or there are as many as `--runs` says; how many ran
    /// well, and the table's line.
    fn fill(mut self) -> (usize, String) {
        let (mut well, mut pace) = (0, 0.0);
        let ended = loop {
            if self.guests.len() >= self.options.runs {
                break "nothing: no more were started".to_owned();
            }
            let more = if well == 0 { FIRST } else { MORE };
            let room = self.options.runs - self.guests.len();
            let started: Result<(), String> = (0..more.min(room)).try_for_each(|_| {
                self.start_guest()?;
                self.trouble().map_or(Ok(()), Err)
            });
            if let Err(trouble) = started {
                break trouble;
            }
            let begun = Instant::now();
            let before = self.told().bursts;
            let trouble = within(SETTLE, || {
                thread::sleep(Duration::from_millis(500));
                self.trouble()
            });
            if let Some(trouble) = trouble {
                break trouble;
            }
            well = self.guests.len();
            let done = self.told().bursts - before;
            pace = done as f64 * 60.0 / begun.elapsed().as_secs_f64();
            eprintln!(
                "bench: {:?} {:?}: {well} guests, {pace:.1} bursts/min, {} MiB available",
                self.policy,
                self.bursts,
                available() / MIB
            );
        };
        let line = format!(
            "| {:?} | {:?} | {well} | {pace:.1} | {ended}, with {} |",
            self.bursts,
            self.policy,
            self.guests.len()
        );
        (well, line)
    }

    /// Runs `count` guests, of which one after another is killed at a random moment and replaced;
    /// the table's line. Whoever lives must not suffer from it, and nothing may stay in the ledger.
    fn with_kills(mut self, count: usize) -> String {
        let mut kills = 0;
        let ended = (0..count)
            .try_for_each(|_| self.start_guest())
            .and_then(|()| {
                let before = (Instant::now(), self.told().bursts);
                for _ in 0..KILLS {
                    let wait = Duration::from_millis(u64::from(random()) % 5000);
                    let trouble = within(wait, || {
                        thread::sleep(Duration::from_millis(200));
                        self.trouble()
                    });
                    if let Some(trouble) = trouble {
                        return Err(trouble);
                    }
                    let victim = self.guests.remove(random() as usize % self.guests.len());
                    victim.ballast.signal(Signal::KILL);
                    drop(victim);
                    kills += 1;
                    self.start_guest()?;
                }
                let minutes = before.0.elapsed().as_secs_f64() / 60.0;
                let done = self.told().bursts.saturating_sub(before.1);
                let living = self.living_records();
                Ok((done as f64 / minutes, living))
            });
        let (pace, ended) = match ended {
            Ok((pace, living)) => (pace, format!("nothing; the ledger has {living} VMs")),
            Err(trouble) => (0.0, trouble),
        };
        format!(
            "| {:?} | {:?}, {kills} killed at random | {count} | {pace:.1} | {ended} |",
            self.bursts, self.policy
        )
    }

    /// VMs that the ledger tells of.
    fn living_records(&self) -> usize {
        let output = Command::new(&self.options.ballast)
            .args(["host", "overcommit", "--json", "--ledger"])
            .arg(self.ledger.path())
            .output()
            .expect("ballast host overcommit");
        let overview: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        overview["vms"].as_array().map_or(0, Vec::len)
    }

    fn start_guest(&mut self) -> Result<(), String> {
        let started = Instant::now();
        let number = self.guests.len() as u64;
        let mut launch = Launch::of("/bin/sh".as_ref());
        let (socket, serial) = (launch.path("api.sock"), launch.path("serial"));
        let mut command = format!(
            "echo 0 >/proc/self/oom_score_adj; exec {} --api-socket {}",
            self.options.ballast.display(),
            socket.display()
        );
        if self.policy == Policy::Auto {
            let ledger = self.ledger.path().display();
            command.push_str(&format!(" --overcommit-ledger {ledger}"));
        }
        launch.command().arg("-c").arg(command);
        let ballast = launch.start();
        let mut api = Client::connect(&socket).map_err(|e| format!("no API: {e}"))?;
        let mut config = json!({
            "memory": { "size": MAX_SIZE },
            "payload": {
                "kernel": self.options.guest_file("vmlinux"),
                "initramfs": self.options.guest_file("initramfs.cpio"),
                "cmdline": "console=ttyS0 quiet noxsave mitigations=off",
            },
            "serial": { "mode": "Socket", "socket": serial },
        });
        if self.policy != Policy::Off {
            config["balloon"] = json!({
                "size": 0,
                "deflate_on_oom": true,
                "free_page_reporting": true,
            });
        }
        if self.policy == Policy::Auto {
            config["overcommit"] = json!({
                "mode": "auto",
                "guaranteed_size": GUARANTEED_SIZE,
            });
        }
        for (operation, body) in [
            ("vm.create", config.to_string()),
            ("vm.boot", String::new()),
        ] {
            let body = Some(body.as_str()).filter(|body| !body.is_empty());
            let answer = api.request("PUT", operation, body);
            if answer.status >= 300 {
                return Err(format!("{operation} answered {}", answer.status));
            }
        }
        let agent = Agent::on_socket(&serial);
        let up = within(STARVED, || agent.transcript().contains(READY).then_some(()));
        up.ok_or("a guest that does not come up")?;
        agent.type_in(&format!("RUN work {}\n", self.work(number)));
        self.guests.push(Guest {
            ballast,
            agent,
            started,
        });
        Ok(())
    }

    /// The guest's workload: a shell command that goes on in the background.
    fn work(&self, number: u64) -> String {
        let offset = match self.bursts {
            Bursts::Staggered => number * 17 % PERIOD,
            Bursts::Coincident => 0,
        };
        // By the wall clock, so that coincident ones are; a burst that is late skips a turn.
        format!(
            "(while :; do now=$(date +%s); \
             sleep $(( ({PERIOD} + {offset} - now % {PERIOD}) % {PERIOD} + 1 )); \
             dd if=/dev/zero of=/dev/null bs={BURST_MIB}M count=2 2>/dev/null; \
             echo \"@burst $? $(awk '/^oom_kill /{{print $2}}' /proc/vmstat)@\"; done) &"
        )
    }

    fn told(&self) -> Told {
        let mut told = Told::default();
        for guest in &self.guests {
            let text = guest.agent.transcript();
            let bursts: Vec<&str> = text
                .split("@burst ")
                .skip(1)
                .filter_map(|rest| rest.split_once('@').map(|(burst, _)| burst))
                .collect();
            told.bursts += bursts.iter().filter(|b| b.starts_with("0 ")).count();
            told.killed += bursts.iter().filter(|b| **b != "0 0").count();
            // Bursts are counted from the guest's start on: whoever has done none in
            // the time of several is starved.
            let expected = guest.started.elapsed().as_secs() / STARVED.as_secs();
            told.starved += usize::from((bursts.len() as u64) < expected);
            told.dead += usize::from(
                !PathBuf::from(format!("/proc/{}/exe", guest.ballast.pid())).exists()
                    || is_zombie(guest.ballast.pid()),
            );
        }
        told
    }

    fn trouble(&self) -> Option<String> {
        let told = self.told();
        let kills = host_kills() - self.kills_before;
        match () {
            () if kills > 0 => Some(format!("the host's OOM killer ({kills} killed)")),
            () if told.dead > 0 => Some("a process that died".to_owned()),
            () if told.killed > 0 => Some("the OOM killer of a guest".to_owned()),
            () if told.starved > 0 => Some("a guest that did not keep up".to_owned()),
            () => None,
        }
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        for guest in &self.guests {
            if !is_zombie(guest.ballast.pid()) {
                guest.ballast.signal(Signal::KILL);
            }
        }
        self.guests.clear();
        // What they had comes back by and by.
        thread::sleep(Duration::from_secs(2));
    }
}

/// Whether the process has ended (it stays in /proc until it is waited for).
fn is_zombie(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_none_or(|rest| rest.starts_with(['Z', 'X']))
}

/// Processes that the host's OOM killer has killed since its start.
fn host_kills() -> u64 {
    let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    line.and_then(|count| count.trim().parse().ok())
        .unwrap_or(0)
}

fn random() -> u32 {
    let mut bytes = [0; 4];
    // A machine without randomness kills the first one always.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u32::from_ne_bytes(bytes)
}

/// Bytes of the host's memory that are available.
fn available() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

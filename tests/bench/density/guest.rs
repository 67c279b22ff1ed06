//! One guest of the density figures: its process, its workload and what it tells of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{BURST_MIB, Case, GUARANTEED_SIZE, MAX_SIZE, Policy, Stop};
use crate::Options;
use crate::support::agent::{Agent, READY};
use crate::support::ballast::{Ballast, Launch};
use crate::support::http::Client;

/// A guest, from the start of its process on.
pub struct Guest {
    ballast: Ballast,
    agent: Agent,
    /// When it was set to work.
    began: Option<Instant>,
    /// Seconds after the beginning of each period at which its burst begins.
    offset: u64,
}

/// What a guest has told so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Told {
    /// Bursts that were done.
    pub bursts: usize,
    /// Seconds they took, all together.
    pub seconds: u64,
    /// Bursts in which something was killed for lack of memory.
    pub killed: usize,
}

impl Guest {
    /// Starts a process and boots its VM; does not wait for the guest.
    pub fn start(
        options: &Options,
        case: Case,
        ledger: &Path,
        number: usize,
    ) -> Result<Self, Stop> {
        let mut launch = Launch::of("/bin/sh".as_ref());
        let (socket, serial) = (launch.path("api.sock"), launch.path("serial"));
        // Who counts is spared by the host's OOM killer, and a guest is not.
        let mut command = format!(
            "echo 0 >/proc/self/oom_score_adj; exec {} --api-socket {} --event-monitor path={}",
            options.ballast.display(),
            socket.display(),
            launch.path("events").display(),
        );
        if case.policy == Policy::Auto {
            command.push_str(&format!(" --overcommit-ledger {}", ledger.display()));
        }
        launch.command().arg("-c").arg(command);
        let ballast = launch.start();
        let mut api =
            Client::connect(&socket).map_err(|e| Stop::Trouble(format!("no API: {e}")))?;
        let config = config(options, case.policy, &serial).to_string();
        for (operation, body) in [("vm.create", Some(config.as_str())), ("vm.boot", None)] {
            let answer = api.request("PUT", operation, body);
            if answer.status == 507 {
                return Err(Stop::Refused(answer.text()));
            }
            if answer.status >= 300 {
                let (status, text) = (answer.status, answer.text());
                return Err(Stop::Trouble(format!(
                    "{operation} answered {status}: {text}"
                )));
            }
        }
        Ok(Self {
            agent: Agent::on_socket(&serial),
            ballast,
            began: None,
            offset: case.offset(number, options.period),
        })
    }

    /// Whether it is up.
    pub fn is_up(&self) -> bool {
        self.agent.transcript().contains(READY)
    }

    /// Has it begin with its workload, a shell command that goes on in the background.
    pub fn set_to_work(&mut self, period: u64) {
        self.began = Some(Instant::now());
        let offset = self.offset;
        // By the wall clock, so that coincident ones are; a burst that is late skips a turn.
        let work = format!(
            "(while :; do now=$(date +%s); \
             sleep $(( ({period} + {offset} - now % {period}) % {period} + 1 )); \
             now=$(date +%s); \
             dd if=/dev/zero of=/dev/null bs={BURST_MIB}M count=1 2>/dev/null; \
             echo \"@burst $? $(awk '/^oom_kill /{{print $2}}' /proc/vmstat) \
             $(( $(date +%s) - now ))@\"; done) &"
        );
        self.agent.type_in(&format!("RUN work {work}\n"));
    }

    /// What it told so far.
    pub fn told(&self) -> Told {
        let text = self.agent.transcript();
        let mut told = Told::default();
        let bursts = text.split("@burst ").skip(1);
        for burst in bursts.filter_map(|rest| rest.split_once('@').map(|(burst, _)| burst)) {
            let mut words = burst
                .split_whitespace()
                .map(|word| word.parse().unwrap_or(1));
            let mut next = || words.next().unwrap_or(1);
            let (status, kills, seconds): (u64, u64, u64) = (next(), next(), next());
            told.bursts += usize::from(status == 0);
            told.seconds += if status == 0 { seconds } else { 0 };
            told.killed += usize::from(status != 0 || kills != 0);
        }
        told
    }

    /// Whether it has done so little for its age that it does not keep up.
    pub fn is_starved(&self, patience: Duration) -> bool {
        let worked = self.began.map(|began| began.elapsed().as_secs());
        let expected = worked.unwrap_or(0) / patience.as_secs().max(1);
        let told = self.told();
        ((told.bursts + told.killed) as u64) < expected
    }

    /// Whether its process has ended (it stays in /proc until it is waited for).
    pub fn is_dead(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.ballast.pid()));
        stat.unwrap_or_default()
            .rsplit(") ")
            .next()
            .is_none_or(|rest| rest.starts_with(['Z', 'X']) || rest.is_empty())
    }

    /// Kills its process, without waiting for its end.
    pub fn kill(&self) {
        if !self.is_dead() {
            self.ballast.signal(Signal::KILL);
        }
    }

    /// How often the governor did what for which reason, since it was started.
    pub fn actions(&self, actions: &mut BTreeMap<String, usize>) {
        let text = fs::read_to_string(self.ballast.path("events")).unwrap_or_default();
        for event in serde_json::Deserializer::from_str(&text).into_iter::<Value>() {
            let Ok(event) = event else { break };
            if event["event"] == "overcommit-action" {
                let word = |name: &str| event["properties"][name].as_str().unwrap_or("?");
                let name = format!("{} {}", word("action"), word("reason"));
                *actions.entry(name).or_default() += 1;
            }
        }
    }

    /// Where its API is.
    pub fn socket(&self) -> std::path::PathBuf {
        self.ballast.path("api.sock")
    }
}

fn config(options: &Options, policy: Policy, serial: &Path) -> Value {
    let mut config = json!({
        "memory": { "size": MAX_SIZE },
        "payload": {
            "kernel": options.guest_file("vmlinux"),
            "initramfs": options.guest_file("initramfs.cpio"),
            "cmdline": "console=ttyS0 quiet noxsave mitigations=off",
        },
        "serial": { "mode": "Socket", "socket": serial },
    });
    if policy != Policy::Off {
        config["balloon"] = json!({
            "size": 0,
            "deflate_on_oom": true,
            "free_page_reporting": true,
        });
    }
    if policy == Policy::Auto {
        config["overcommit"] = json!({
            "mode": "auto",
            "guaranteed_size": GUARANTEED_SIZE,
            "interval_ms": options.interval_ms,
        });
    }
    config
}

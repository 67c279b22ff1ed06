//! How many guests run on one host, each with bursts of memory use, and what they get done: with
//! the governor and with nothing. For the lab host: it fills the memory of the machine it runs on.
//!
//! Guests are started one after another until something breaks: a program killed in a guest for
//! lack of memory, a process of the host likewise, or no burst done by some guest for long. What
//! counts is the largest number with which all was well for a while.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Options;
use crate::support::http::Client;
use crate::support::within;
use guest::{Guest, Told};
use trace::Recorder;

mod guest;
mod trace;

const MIB: u64 = 1 << 20;
const MAX_SIZE: u64 = 512 * MIB;
const GUARANTEED_SIZE: u64 = 160 * MIB;
/// What one burst touches: more than a guest is guaranteed, less than it may have.
const BURST_MIB: u64 = 200;
/// So many join at a time, after the first.
const MORE: usize = 4;
/// So many boot at once: one after another, those that work already would have most of the CPU.
const AT_ONCE: usize = 4;
/// How long after a full period is looked, for bursts that are on their way.
const GRACE: Duration = Duration::from_secs(15);
/// How many processes are killed, and the longest time from one to the next.
const KILLS: usize = 12;
const KILL_GAP_MS: u64 = 5000;
/// A guest that has done no burst in so many periods does not keep up any more.
const STARVED_PERIODS: u64 = 3;

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

/// What is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    policy: Policy,
    bursts: Bursts,
    /// Whether processes are killed at random.
    kills: bool,
}

impl Case {
    /// All of them, what matters most first.
    fn all() -> Vec<Self> {
        let case = |policy, bursts, kills| Self {
            policy,
            bursts,
            kills,
        };
        vec![
            case(Policy::Off, Bursts::Staggered, false),
            case(Policy::Auto, Bursts::Staggered, false),
            case(Policy::Auto, Bursts::Coincident, false),
            case(Policy::Off, Bursts::Coincident, false),
            case(Policy::Auto, Bursts::Staggered, true),
            case(Policy::Auto, Bursts::Coincident, true),
            case(Policy::Reporting, Bursts::Staggered, false),
            case(Policy::Reporting, Bursts::Coincident, false),
        ]
    }

    /// What `--case` calls it: `auto-staggered`, `auto-staggered-kills`.
    fn name(self) -> String {
        let kills = if self.kills { "-kills" } else { "" };
        format!("{:?}-{:?}{kills}", self.policy, self.bursts).to_lowercase()
    }

    /// Seconds after the beginning of each period at which a guest's burst begins.
    fn offset(self, number: usize, period: u64) -> u64 {
        match self.bursts {
            // The golden ratio's part of the period: whoever comes next falls between the others.
            Bursts::Staggered => number as u64 * period * 618 / 1000 % period,
            Bursts::Coincident => 0,
        }
    }
}

/// Why no more guests are started.
pub enum Stop {
    /// The ledger did not admit one more: its answer.
    Refused(String),
    /// Something went wrong.
    Trouble(String),
}

struct Host<'a> {
    options: &'a Options,
    case: Case,
    ledger: tempfile::TempDir,
    guests: Vec<Guest>,
    /// How many were ever started.
    started: usize,
    kills_before: u64,
    recorder: Option<Recorder>,
}

/// Prints a table: one line for each case, as it is measured.
pub fn measure(options: &Options) {
    // The host's OOM killer takes guests, not who counts them.
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        eprintln!("bench: may be killed itself: {error}");
    }
    println!(
        "| case | guests that ran well | bursts each minute, of each | a burst takes | what ended it |"
    );
    println!("|---|---|---|---|---|");
    for case in Case::all() {
        let wanted = options.case.as_ref();
        if wanted.is_none_or(|name| *name == case.name()) {
            let host = Host::new(options, case);
            println!(
                "{}",
                if case.kills {
                    host.with_kills(options.first)
                } else {
                    host.fill()
                }
            );
        }
    }
}

impl<'a> Host<'a> {
    fn new(options: &'a Options, case: Case) -> Self {
        Self {
            options,
            case,
            ledger: tempfile::tempdir().expect("a folder"),
            guests: Vec::new(),
            started: 0,
            kills_before: host_kills(),
            recorder: None,
        }
    }

    /// Starts guests until something breaks or there are as many as `--runs` says; the table's
    /// line.
    fn fill(mut self) -> String {
        let (mut well, mut pace) = (0, Pace::default());
        let ended = loop {
            let room = self.options.runs.saturating_sub(self.guests.len());
            if room == 0 {
                break "nothing: no more were started".to_owned();
            }
            let more = if well == 0 { self.options.first } else { MORE };
            let began = Instant::now();
            let refused = match self.start_guests(more.min(room)) {
                Ok(()) => None,
                // Those that were admitted before are looked at like any others.
                Err(Stop::Refused(numbers)) => Some(numbers),
                Err(Stop::Trouble(trouble)) => break trouble,
            };
            if let Some(numbers) = &refused
                && self.guests.len() == well
            {
                break format!("admission: one more was refused ({numbers})");
            }
            eprintln!(
                "bench: {}: {} guests are up after {:.0} s",
                self.case.name(),
                self.guests.len(),
                began.elapsed().as_secs_f64()
            );
            let before = (Instant::now(), self.told());
            let settle = Duration::from_secs(self.options.period) + GRACE;
            if let Err(trouble) = self.watch(settle) {
                break trouble;
            }
            well = self.guests.len();
            pace = self.pace(before);
            self.tell(pace);
            if let Some(numbers) = refused {
                break format!("admission: one more was refused ({numbers})");
            }
        };
        self.tell(pace);
        let with = self.guests.len();
        self.line(well, pace, &format!("{ended}, with {with}"))
    }

    /// Runs `count` guests, of which one after another is killed at a random moment and replaced;
    /// the table's line. Whoever lives must not suffer from it, and nothing may stay in the ledger.
    fn with_kills(mut self, count: usize) -> String {
        let mut kills = 0;
        let before = (Instant::now(), Told::default());
        let ended = self.start_all(count).and_then(|()| {
            while kills < KILLS {
                let wait = Duration::from_millis(u64::from(random()) % KILL_GAP_MS);
                self.watch(wait)?;
                let victim = self.guests.remove(random() as usize % self.guests.len());
                victim.kill();
                drop(victim);
                kills += 1;
                self.start_all(1)?;
                // The lab host ends what says nothing for long.
                eprintln!("bench: {}: {kills} killed and replaced", self.case.name());
            }
            // What was done with the dead is no rule: a period without kills, for the pace.
            let before = (Instant::now(), self.told());
            self.watch(Duration::from_secs(self.options.period) + GRACE)?;
            Ok((self.pace(before), self.living_records()))
        });
        let (well, pace, ended) = match ended {
            Ok((pace, living)) => (count, pace, format!("nothing; the ledger has {living} VMs")),
            Err(trouble) => (0, self.pace(before), trouble),
        };
        self.tell(pace);
        self.line(well, pace, &format!("{ended}, after {kills} kills"))
    }

    fn line(&self, well: usize, pace: Pace, ended: &str) -> String {
        format!(
            "| {} | {well} | {:.2} of {:.2} | {:.1} s | {ended} |",
            self.case.name(),
            pace.each_minute,
            60.0 / self.options.period as f64,
            pace.seconds
        )
    }

    /// Starts guests, none of which may be refused.
    fn start_all(&mut self, count: usize) -> Result<(), String> {
        self.start_guests(count).map_err(|stop| match stop {
            Stop::Refused(numbers) => format!("admission ({numbers})"),
            Stop::Trouble(trouble) => trouble,
        })
    }

    /// Starts guests, some at a time, and sets them to work when all are up, or all that were
    /// admitted.
    fn start_guests(&mut self, count: usize) -> Result<(), Stop> {
        let old = self.guests.len();
        let mut refused = None;
        while self.guests.len() < old + count && refused.is_none() {
            let from = self.guests.len();
            for _ in 0..AT_ONCE.min(old + count - from) {
                match self.start_guest() {
                    Ok(()) => {}
                    Err(Stop::Refused(numbers)) => {
                        refused = Some(numbers);
                        break;
                    }
                    trouble @ Err(_) => return trouble,
                }
            }
            let up = within(self.patience(), || {
                thread::sleep(Duration::from_millis(100));
                let all = self.guests[from..].iter().all(Guest::is_up);
                let trouble = self.trouble();
                (all || trouble.is_some()).then_some(trouble)
            });
            match up {
                Some(None) => {}
                Some(Some(trouble)) => return Err(Stop::Trouble(trouble)),
                None => return Err(Stop::Trouble("a guest that does not come up".to_owned())),
            }
        }
        for guest in &mut self.guests[old..] {
            guest.set_to_work(self.options.period);
        }
        refused.map_or(Ok(()), |numbers| Err(Stop::Refused(numbers)))
    }

    fn start_guest(&mut self) -> Result<(), Stop> {
        let (options, case) = (self.options, self.case);
        let guest = Guest::start(options, case, self.ledger.path(), self.started)?;
        if self.started == 0
            && case.policy == Policy::Auto
            && let Some(folder) = &options.traces
        {
            let file = folder.join(format!("{}.txt", case.name()));
            self.recorder = Some(Recorder::start(guest.socket(), &file));
        }
        self.guests.push(guest);
        self.started += 1;
        Ok(())
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(self.options.period * STARVED_PERIODS)
    }

    /// Waits for so long, or until there is trouble.
    fn watch(&self, time: Duration) -> Result<(), String> {
        let trouble = within(time, || {
            thread::sleep(Duration::from_millis(500));
            self.trouble()
        });
        trouble.map_or(Ok(()), Err)
    }

    fn told(&self) -> Told {
        let each = self.guests.iter().map(Guest::told);
        each.fold(Told::default(), |sum, told| Told {
            bursts: sum.bursts + told.bursts,
            seconds: sum.seconds + told.seconds,
            killed: sum.killed + told.killed,
        })
    }

    fn pace(&self, (since, before): (Instant, Told)) -> Pace {
        let now = self.told();
        let bursts = now.bursts.saturating_sub(before.bursts) as f64;
        let guests_minutes = since.elapsed().as_secs_f64() / 60.0 * self.guests.len().max(1) as f64;
        Pace {
            each_minute: bursts / guests_minutes,
            seconds: now.seconds.saturating_sub(before.seconds) as f64 / bursts.max(1.0),
        }
    }

    fn trouble(&self) -> Option<String> {
        let kills = host_kills() - self.kills_before;
        let any = |what: &dyn Fn(&Guest) -> bool| self.guests.iter().any(what);
        match () {
            () if kills > 0 => Some(format!("the host's OOM killer ({kills} killed)")),
            () if any(&Guest::is_dead) => Some("a process that died".to_owned()),
            () if any(&|guest| guest.told().killed > 0) => {
                Some("the OOM killer of a guest".to_owned())
            }
            () if any(&|guest| guest.is_starved(self.patience())) => {
                Some("a guest that did not keep up".to_owned())
            }
            () => None,
        }
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

    /// Tells on stderr how it goes.
    fn tell(&self, pace: Pace) {
        let mut actions = BTreeMap::new();
        for guest in &self.guests {
            guest.actions(&mut actions);
        }
        let balloons = self.guests.iter().filter_map(|guest| {
            let mut api = Client::connect(&guest.socket()).ok()?;
            let answer = api.try_request("GET", "vm.balloons", None, "").ok()?;
            let balloons: Value = serde_json::from_slice(&answer.body).ok()?;
            balloons[0]["actual"].as_u64()
        });
        eprintln!(
            "bench: {}: {} guests, {:.2} bursts/min each, {:.1} s each, {} MiB available,              {} MiB in balloons, idle {:.0} s; {actions:?}",
            self.case.name(),
            self.guests.len(),
            pace.each_minute,
            pace.seconds,
            meminfo("MemAvailable:") / MIB,
            balloons.sum::<u64>() / MIB,
            idle_seconds(),
        );
    }
}

/// What guests get done.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    /// Bursts of one guest.
    each_minute: f64,
    /// How long one takes.
    seconds: f64,
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        self.recorder = None;
        for guest in &self.guests {
            guest.kill();
        }
        self.guests.clear();
        // What they had comes back by and by.
        thread::sleep(Duration::from_secs(2));
    }
}

/// Seconds in which the host's CPUs had nothing to do: where they hardly grow, it is not memory
/// that is short.
fn idle_seconds() -> f64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let idle = text.split_whitespace().nth(1);
    idle.and_then(|word| word.parse().ok()).unwrap_or(0.0)
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

/// A line of the host's /proc/meminfo, in bytes.
fn meminfo(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

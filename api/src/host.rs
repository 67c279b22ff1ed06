//! `ballast host …`: the host's view, without a VM and without its API.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use vmm::overcommit::ksm::HOST as KSM;
use vmm::overcommit::ledger::Limits;
use vmm::overcommit::ledger::overview::{self, Overview, VmOverview};

use self::ksm::KsmCommand;
use crate::json;

pub mod ksm;

/// Where `ballast host overcommit` looks unless it is told.
pub const DEFAULT_LEDGER: &str = "/run/ballast/overcommit";

/// Commands about the host.
#[derive(Clone, Debug, Subcommand)]
pub enum HostCommand {
    /// Show all VMs of a ledger: what they are promised, what they have, and what is left. Reads
    /// only
    Overcommit {
        /// The ledger's directory, as `--overcommit-ledger` of the VMs names it
        #[arg(long, value_name = "DIR")]
        ledger: Option<PathBuf>,
        /// Print JSON; all sizes are in bytes
        #[arg(long)]
        json: bool,
    },
    /// Show, start or stop the host's merging of equal pages
    #[command(subcommand)]
    Ksm(KsmCommand),
}

impl HostCommand {
    /// Does it.
    pub fn run(&self) -> ExitCode {
        let text = match self {
            Self::Overcommit { ledger, json } => overcommit(ledger.as_deref(), *json),
            Self::Ksm(command) => command.run(Path::new(KSM)),
        };
        match text.and_then(|text| print(&text)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("ballast: {error}");
                ExitCode::FAILURE
            }
        }
    }
}

fn print(text: &str) -> Result<(), String> {
    match io::stdout().write_all(text.as_bytes()) {
        // As `head` does to those whose output it has seen enough of.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|error| format!("standard output: {error}")),
    }
}

fn overcommit(ledger: Option<&Path>, as_json: bool) -> Result<String, String> {
    let path = ledger.unwrap_or(Path::new(DEFAULT_LEDGER));
    // Nobody has said that there is one.
    let overview = if ledger.is_none() && !path.exists() {
        overview::empty(&Limits::default())?
    } else {
        overview::read(path).map_err(|error| error.to_string())?
    };
    if !as_json {
        return Ok(table(&overview));
    }
    let bytes = json::to_vec(&overview).map_err(|error| error.to_string())?;
    String::from_utf8(bytes)
        .map(|text| text + "\n")
        .map_err(|error| error.to_string())
}

const HEADINGS: [&str; 15] = [
    "PID",
    "STATE",
    "PROMISED",
    "GUARANTEED",
    "ACTUAL",
    "RESIDENT",
    "SWAP",
    "KSM",
    "IDLE",
    "BALLOON",
    "DISKS",
    "FREE",
    "WEIGHT",
    "AGE",
    "API",
];

/// The overview for people; sizes in MiB.
fn table(overview: &Overview) -> String {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(overview.vms.iter().map(row));
    let mut widths = [0; HEADINGS.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (index, (cell, width)) in row.iter().zip(widths).enumerate() {
            // Words to the left, numbers to the right.
            let words = matches!(index, 1 | 14);
            // Writing to a string does not fail.
            let _ = if words {
                write!(line, "{cell:width$}  ")
            } else {
                write!(line, "{cell:>width$}  ")
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text.push('\n');
    text + &summary(overview)
}

fn row(vm: &VmOverview) -> [String; HEADINGS.len()] {
    let record = &vm.record;
    let (reservation, measures) = (&record.reservation, &record.measures);
    let known = |bytes: Option<u64>| bytes.map_or("-".to_owned(), mib);
    let balloon = match (measures.balloon_actual, measures.balloon_target) {
        (Some(actual), Some(target)) => format!("{}/{}", mib(actual), mib(target)),
        _ => "-".to_owned(),
    };
    let disks = match (measures.disk_allocated, measures.disk_virtual) {
        (Some(allocated), Some(size)) => format!("{}/{}", mib(allocated), mib(size)),
        _ => "-".to_owned(),
    };
    let state = if record.state.is_empty() {
        "-"
    } else {
        &record.state
    };
    [
        record.pid.to_string(),
        printable(state),
        mib(reservation.max),
        mib(reservation.guaranteed),
        known(measures.actual),
        known(measures.resident),
        known(measures.swap),
        measures
            .ksm_profit
            .map_or("-".to_owned(), |profit| signed_mib(profit.cast_signed())),
        known(measures.idle),
        balloon,
        disks,
        known(measures.disk_host_free),
        record.weight.to_string(),
        format!("{}s", vm.age_ms / 1000),
        printable(&record.api_socket),
    ]
}

fn summary(overview: &Overview) -> String {
    let (host, totals) = (&overview.host, &overview.totals);
    let mut text = format!(
        "{} VMs are promised {} MiB and guaranteed {} MiB, with their VMMs; the host has {} MiB",
        totals.vms,
        mib(totals.promised),
        mib(totals.guaranteed),
        mib(host.memory),
    );
    if let Some(bytes) = host.cgroup_memory {
        text += &format!(", our cgroup {} MiB", mib(bytes));
    }
    text += &format!(
        "\novercommit ratio {:.2}{}; {} MiB more can be guaranteed beside a reserve of {} MiB\n",
        totals.overcommit_ratio,
        host.max_ratio
            .map_or_else(String::new, |ratio| format!(" of at most {ratio}")),
        mib(totals.free_for_guarantees),
        mib(host.reserve),
    );
    text += &format!(
        "{} MiB resident, {} MiB on swap; KSM saves {} MiB (as far as they know)\n",
        mib(totals.resident),
        mib(totals.swap),
        signed_mib(totals.ksm_profit),
    );
    text += &format!(
        "disks of {} MiB take {} MiB of the host; they may come to take {} MiB more\n",
        mib(totals.disk_virtual),
        mib(totals.disk_allocated),
        mib(totals.disk_unallocated),
    );
    if overview.stale_records > 0 {
        text += &format!(
            "{} records of processes that have died; the next VM that starts removes them\n",
            overview.stale_records
        );
    }
    for record in &overview.unreadable_records {
        text += &format!(
            "can't be read, so nothing more is admitted: {}\n",
            printable(record)
        );
    }
    if overview.foreign_entries > 0 {
        text += &format!(
            "{} entries of the directory are no records\n",
            overview.foreign_entries
        );
    }
    text
}

fn mib(bytes: u64) -> String {
    bytes.div_ceil(1 << 20).to_string()
}

/// Away from 0, so that what costs something is not shown as nothing.
fn signed_mib(bytes: i64) -> String {
    let sign = if bytes < 0 { "-" } else { "" };
    format!("{sign}{}", mib(bytes.unsigned_abs()))
}

/// What other processes tell may not reach a terminal as it is.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use vmm::overcommit::ledger::overview::{HostMemory, Totals};
    use vmm::overcommit::ledger::{Measures, Record, Reservation};

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_table_has_a_line_for_each_vm_and_says_what_is_unknown() {
        let running = Record {
            pid: 4711,
            state: "Running".into(),
            api_socket: "/run/a\u{1b}.sock".into(),
            weight: 100,
            reservation: Reservation {
                max: 512 * MIB,
                guaranteed: 160 * MIB,
                overhead: 11 * MIB,
                huge_pages: 0,
            },
            measures: Measures {
                actual: Some(300 * MIB),
                balloon_actual: Some(212 * MIB),
                balloon_target: Some(256 * MIB),
                resident: Some(290 * MIB),
                swap: Some(0),
                ksm_profit: Some((-4096_i64).cast_unsigned()),
                disk_virtual: Some(10240 * MIB),
                disk_allocated: Some(700 * MIB),
                disk_host_free: Some(8000 * MIB),
                ..Measures::default()
            },
            ..Record::default()
        };
        let idle = Record {
            pid: 7,
            weight: 1,
            ..Record::default()
        };
        let vms = [running, idle].map(|record| VmOverview {
            record,
            age_ms: 1999,
        });
        let overview = Overview {
            host: HostMemory {
                memory: 6000 * MIB,
                reserve: 300 * MIB,
                max_ratio: Some(1.5),
                ..HostMemory::default()
            },
            totals: Totals {
                vms: 1,
                promised: 523 * MIB,
                overcommit_ratio: 0.087,
                swap: 33 * MIB,
                ksm_profit: -(2 * MIB as i64),
                disk_virtual: 10240 * MIB,
                disk_allocated: 700 * MIB,
                disk_unallocated: 9540 * MIB,
                ..Totals::default()
            },
            vms: vms.to_vec(),
            stale_records: 2,
            unreadable_records: vec!["vm-9: version 2".into()],
            foreign_entries: 0,
        };
        let text = table(&overview);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_ascii_whitespace().collect())
            .collect();
        assert_eq!(lines[0], HEADINGS);
        assert_eq!(
            lines[1],
            [
                "4711",
                "Running",
                "512",
                "160",
                "300",
                "290",
                "0",
                "-1",
                "-",
                "212/256",
                "700/10240",
                "8000",
                "100",
                "1s",
                "/run/a?.sock"
            ]
        );
        assert_eq!(
            lines[2],
            [
                "7", "-", "0", "0", "-", "-", "-", "-", "-", "-", "-", "-", "1", "1s"
            ]
        );
        assert!(text.contains("ratio 0.09 of at most 1.5"), "{text}");
        assert!(text.contains("33 MiB on swap; KSM saves -2 MiB"), "{text}");
        let disks =
            "disks of 10240 MiB take 700 MiB of the host; they may come to take 9540 MiB more";
        assert!(text.contains(disks), "{text}");
        assert!(text.contains("2 records of processes that have died"));
        assert!(text.contains("vm-9: version 2"));
        assert!(!text.contains("no records"));
    }
}

use std::collections::{BTreeMap, BTreeSet};

use ::devices::balloon::{Inhibited, Sample as Told, State as BalloonState};
use ::devices::block::DiskReading;
use ::devices::block::job::JobKind;
use ::devices::disk::space::{FileSpace, FileSystemSpace, Place};
use ::vmm::config::OvercommitMode;
use ::vmm::jobs::{JobInfo, JobState};
use ::vmm::overcommit::cost::{Cost, Source};
use ::vmm::overcommit::ksm::KsmGain;
use ::vmm::overcommit::pressure::{Pressure, Stall};
use ::vmm::overcommit::storage::DiskTotals;
use ::vmm::overcommit::view::{
    BalloonTotals, Governor, HugePages, PressureReading, Resources, VcpuTime, View,
};
use ::vmm::state::State;
use prometheus_parse::Value;

use super::*;

fn stall(total_us: u64) -> Stall {
    Stall {
        avg10: 12.5,
        total_us,
        ..Stall::default()
    }
}

/// One in a file and one on a block device.
fn disks() -> Vec<DiskReading> {
    let thin = DiskReading {
        id: "_disk0".to_owned(),
        writable: true,
        virtual_bytes: 4096,
        place: Ok(Some(Place {
            device: 1,
            inode: 2,
            file: FileSpace {
                length: 2048,
                allocated: 512,
            },
            system: Some(FileSystemSpace {
                free: 1024,
                total: 9000,
            }),
        })),
        held_requests: 3,
        held_bytes: 12288,
        cache: Some((7, 10)),
    };
    let device = DiskReading {
        id: "lv".to_owned(),
        place: Ok(None),
        cache: None,
        ..thin.clone()
    };
    vec![thin, device]
}

/// One that runs, and one that is over.
fn jobs() -> Vec<JobInfo> {
    let job = |id: &str, state| JobInfo {
        id: id.to_owned(),
        disk: "thin".to_owned(),
        kind: JobKind::Stream,
        state,
        done_bytes: 8192,
        total_bytes: 65536,
        copied_bytes: 4096,
        speed: None,
        waiting_for_space: None,
        reason: None,
    };
    vec![
        job("job1", JobState::Running),
        job("job0", JobState::Cancelled),
    ]
}

fn observation() -> Observation {
    let balloon = ::devices::balloon::BalloonInfo {
        id: "a \"quoted\\ id\n".to_owned(),
        target: 4096,
        actual: 8192,
        given: 4096,
        held_off: 0,
        retried: 0,
        state: BalloonState::Stalled,
        rate: -1,
        driver: true,
        inflated: 1,
        deflated: 2,
        pending: 0,
        inhibited_by: Vec::new(),
        reported_free: 3,
        inhibited: Inhibited::default(),
        ignored: 0,
        statistics: [(
            "free_memory",
            Told {
                value: 7,
                age_ms: 1500,
            },
        )]
        .into(),
    };
    let vcpu = |vcpu, run_ns| VcpuTime {
        vcpu,
        thread: 100 + vcpu,
        run_ns,
        run_delay_ns: run_ns.map(|ns| ns / 2),
        unavailable: None,
        age_ms: 0,
    };
    Observation {
        state: State::Paused,
        view: View {
            mode: OvercommitMode::Auto,
            governor: Some(Governor {
                pressure_triggers: vec!["host"],
                balloon: "__balloon".to_owned(),
                host: "pressure",
                reason: "host-pressure",
                back_off_ms: Some(1500),
                age_ms: 0,
            }),
            promised: 512 << 20,
            guaranteed: 160 << 20,
            cost: Some(Cost {
                source: Source::Cgroup,
                no_cgroup: None,
                resident: 1000,
                anon: 600,
                shmem: 100,
                file: 200,
                kernel: None,
                anon_huge: Some(50),
                hugetlb: 0,
                swap: Some(9),
                zswap: None,
                age_ms: 250,
            }),
            cost_unavailable: None,
            balloons: BalloonTotals::default(),
            disks: DiskTotals {
                count: 2,
                virtual_size: 4096,
                allocated_size: 512,
                unallocated_size: 3584,
                host_free: 1024,
                age_ms: 2500,
                ..DiskTotals::default()
            },
            ksm: KsmGain {
                merged_pages: Some(5),
                net_profit: Some(-64),
                ..KsmGain::default()
            },
            huge_pages: HugePages {
                wanted: true,
                huge: Some(50),
                lost: Some(550),
                age_ms: 0,
            },
            vcpus: vec![vcpu(0, Some(1_500_000_000)), vcpu(1, None)],
            pressure: PressureReading {
                host: Resources {
                    memory: Some(Pressure {
                        some: stall(2_000_000),
                        full: Some(stall(1)),
                    }),
                    ..Resources::default()
                },
                cgroup: Resources::default(),
                age_ms: 0,
            },
        },
        balloons: vec![balloon],
        disks: disks(),
        jobs: jobs(),
        counters: [(
            "_disk0".to_owned(),
            BTreeMap::from([
                ("read_bytes".to_owned(), 4096),
                ("read_latency_max".to_owned(), 1_000_000),
            ]),
        )]
        .into(),
        exits: vec![BTreeMap::from([("mmio-read", 3), ("other", 0)])],
    }
}

fn page(observation: Option<Observation>) -> String {
    let requests = Requests::default();
    requests.add("vm.info", 200);
    requests.add("vm.info", 200);
    requests.add("other", 404);
    render(&Scrape {
        requests,
        events: [(("vm", "booted"), 2)].into(),
        answered: true,
        observation: observation.map(Box::new),
    })
    .unwrap()
}

/// Reads the page with a parser that is not the encoder's.
fn parse(text: &str) -> prometheus_parse::Scrape {
    let lines = text.lines().map(|line| Ok(line.to_owned()));
    prometheus_parse::Scrape::parse(lines).unwrap()
}

fn value(text: &str, name: &str, labels: &[(&str, &str)]) -> Value {
    let scrape = parse(text);
    let found: Vec<_> = scrape
        .samples
        .iter()
        .filter(|s| s.metric == name && labels.iter().all(|(k, v)| s.labels.get(k) == Some(*v)))
        .collect();
    assert_eq!(found.len(), 1, "{name} {labels:?} in\n{text}");
    found[0].value.clone()
}

#[test]
fn an_independent_parser_reads_what_was_counted() {
    let text = page(Some(observation()));
    for (name, labels, expected) in [
        ("ballast_vm_exists", &[][..], Value::Gauge(1.0)),
        ("ballast_vmm_answered", &[], Value::Gauge(1.0)),
        (
            "ballast_api_requests_total",
            &[("operation", "vm.info"), ("status", "200")],
            Value::Counter(2.0),
        ),
        (
            "ballast_api_requests_total",
            &[("operation", "other"), ("status", "404")],
            Value::Counter(1.0),
        ),
        (
            "ballast_events_total",
            &[("source", "vm"), ("event", "booted")],
            Value::Counter(2.0),
        ),
        (
            "ballast_vm_state",
            &[("state", "Paused")],
            Value::Gauge(1.0),
        ),
        (
            "ballast_vm_state",
            &[("state", "Running")],
            Value::Gauge(0.0),
        ),
        (
            "ballast_memory_promised_bytes",
            &[],
            Value::Gauge((512 << 20) as f64),
        ),
        ("ballast_memory_resident_bytes", &[], Value::Gauge(1000.0)),
        (
            "ballast_memory_bytes",
            &[("kind", "swap")],
            Value::Gauge(9.0),
        ),
        (
            "ballast_memory_age_seconds",
            &[("source", "cgroup")],
            Value::Gauge(0.25),
        ),
        (
            "ballast_memory_huge_pages_lost_bytes",
            &[],
            Value::Gauge(550.0),
        ),
        (
            "ballast_governor_host",
            &[("level", "pressure")],
            Value::Gauge(1.0),
        ),
        ("ballast_governor_back_off_seconds", &[], Value::Gauge(1.5)),
        ("ballast_ksm_merged_pages", &[], Value::Gauge(5.0)),
        ("ballast_ksm_net_profit_bytes", &[], Value::Gauge(-64.0)),
        (
            "ballast_vcpu_run_seconds_total",
            &[("vcpu", "0")],
            Value::Counter(1.5),
        ),
        (
            "ballast_vcpu_run_delay_seconds_total",
            &[("vcpu", "0")],
            Value::Counter(0.75),
        ),
        (
            "ballast_vcpu_exits_total",
            &[("vcpu", "0"), ("reason", "mmio-read")],
            Value::Counter(3.0),
        ),
        (
            "ballast_pressure_stalled_seconds_total",
            &[("scope", "host"), ("resource", "memory"), ("tasks", "some")],
            Value::Counter(2.0),
        ),
        (
            "ballast_pressure_stalled_ratio",
            &[("scope", "host"), ("resource", "memory"), ("tasks", "full")],
            Value::Gauge(0.125),
        ),
        ("ballast_balloon_actual_bytes", &[], Value::Gauge(8192.0)),
        ("ballast_balloon_given_bytes", &[], Value::Gauge(4096.0)),
        ("ballast_balloon_stalled", &[], Value::Gauge(1.0)),
        (
            "ballast_balloon_guest_statistic",
            &[("statistic", "free_memory")],
            Value::Gauge(7.0),
        ),
        (
            "ballast_balloon_guest_statistic_age_seconds",
            &[],
            Value::Gauge(1.5),
        ),
        ("ballast_disks_virtual_bytes", &[], Value::Gauge(4096.0)),
        ("ballast_disks_allocated_bytes", &[], Value::Gauge(512.0)),
        ("ballast_disks_unallocated_bytes", &[], Value::Gauge(3584.0)),
        ("ballast_disks_host_free_bytes", &[], Value::Gauge(1024.0)),
        ("ballast_disks_age_seconds", &[], Value::Gauge(2.5)),
        (
            "ballast_disk_virtual_bytes",
            &[("device", "lv")],
            Value::Gauge(4096.0),
        ),
        ("ballast_disk_allocated_bytes", &[], Value::Gauge(512.0)),
        ("ballast_disk_file_bytes", &[], Value::Gauge(2048.0)),
        ("ballast_disk_host_free_bytes", &[], Value::Gauge(1024.0)),
        ("ballast_disk_host_total_bytes", &[], Value::Gauge(9000.0)),
        (
            "ballast_disk_held_requests",
            &[("device", "_disk0")],
            Value::Gauge(3.0),
        ),
        (
            "ballast_disk_job_done_bytes",
            &[("device", "thin"), ("job", "job1"), ("kind", "stream")],
            Value::Gauge(8192.0),
        ),
        (
            "ballast_disk_job_copied_bytes",
            &[("job", "job1")],
            Value::Gauge(4096.0),
        ),
        (
            "ballast_disk_held_bytes",
            &[("device", "_disk0")],
            Value::Gauge(12288.0),
        ),
        (
            "ballast_disk_cache_lookups_total",
            &[],
            Value::Counter(10.0),
        ),
        ("ballast_disk_cache_misses_total", &[], Value::Counter(3.0)),
        (
            "ballast_device_counter_total",
            &[("device", "_disk0"), ("counter", "read_bytes")],
            Value::Counter(4096.0),
        ),
        (
            "ballast_device_latency_seconds",
            &[("device", "_disk0"), ("statistic", "read_latency_max")],
            Value::Gauge(1.0),
        ),
    ] {
        assert_eq!(value(&text, name, labels), expected, "{name}");
    }
}

#[test]
fn every_sample_has_help_and_a_type_that_its_name_agrees_with() {
    let text = page(Some(observation()));
    let scrape = parse(&text);
    let names: BTreeSet<_> = scrape.samples.iter().map(|s| s.metric.as_str()).collect();
    let described: BTreeSet<_> = scrape.docs.keys().map(String::as_str).collect();
    assert_eq!(names, described);
    for sample in &scrape.samples {
        let name = &sample.metric;
        assert!(name.starts_with("ballast_"), "{name}");
        match sample.value {
            Value::Counter(_) => assert!(name.ends_with("_total"), "{name}"),
            Value::Gauge(_) => assert!(!name.ends_with("_total"), "{name}"),
            _ => panic!("{name} has no type"),
        }
    }
    // No line that the parser passed over: each is a comment or a sample.
    let lines = text.lines().filter(|line| !line.starts_with('#')).count();
    assert_eq!(lines, scrape.samples.len());
    let types = text
        .lines()
        .filter(|line| line.starts_with("# TYPE"))
        .count();
    assert_eq!(types, names.len(), "one type each");
}

#[test]
fn what_is_not_known_is_not_there() {
    let text = page(Some(observation()));
    assert!(!text.contains("kind=\"kernel\"") && !text.contains("kind=\"zswap\""));
    assert!(!text.contains("vcpu=\"1\""));
    assert!(!text.contains("scope=\"cgroup\""));
    assert!(!text.contains("ballast_ksm_zero_pages"));
    let text = page(None);
    assert_eq!(value(&text, "ballast_vm_exists", &[]), Value::Gauge(0.0));
    assert!(!text.contains("ballast_memory"));
    let mut without = observation();
    without.view.disks = DiskTotals::default();
    without.disks.clear();
    without.jobs.clear();
    assert!(!page(Some(without)).contains("ballast_disk"));
}

#[test]
fn an_odd_id_does_not_break_the_page() {
    let text = page(Some(observation()));
    assert!(text.contains(r#"device="a \"quoted\\ id\n""#), "{text}");
}

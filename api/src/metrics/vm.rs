//! The families of a VM. Units are those of Prometheus: bytes, seconds, ratios.

use devices::balloon::{BalloonInfo, State as BalloonState};
use vmm::overcommit::cost::{Cost, Source};
use vmm::overcommit::view::{Governor, Resources, View};
use vmm::state::State;
use vmm::status::{Observation, VmCounters};

use super::page::{Kind, Page, Sample};
use super::{disks, jobs};

/// Adds all there is to say of a VM.
pub(super) fn add(page: &mut Page, observation: &Observation) {
    let states = [State::Created, State::Running, State::Paused];
    page.family(
        "vm_state",
        "What the VM is doing: 1 for the state it is in.",
        Kind::Gauge,
        states.map(|state| {
            let is = u8::from(state == observation.state);
            (vec![("state", format!("{state:?}"))], is.into())
        }),
    );
    let view = &observation.view;
    promises(page, view);
    if let Some(found) = &view.governor {
        governor(page, found);
    }
    if let Some(cost) = &view.cost {
        memory(page, cost);
    }
    ksm(page, view);
    vcpus(page, observation);
    pressure(page, view);
    balloons(page, &observation.balloons);
    disks::add(page, observation);
    jobs::add(page, observation);
    devices(page, &observation.counters);
}

fn promises(page: &mut Page, view: &View) {
    page.amount(
        "memory_promised_bytes",
        "RAM the guest was promised.",
        view.promised,
    );
    page.amount(
        "memory_guaranteed_bytes",
        "Memory the host must have for the guest whatever happens.",
        view.guaranteed,
    );
    page.amount(
        "memory_huge_pages_lost_bytes",
        "Memory that could be in transparent huge pages and is not; the most that was lost.",
        view.huge_pages.lost,
    );
}

fn governor(page: &mut Page, governor: &Governor) {
    page.family(
        "governor_host",
        "How the governor found the host: 1 for the level it is at.",
        Kind::Gauge,
        ["ease", "pressure", "critical"].map(|level| {
            let is = u8::from(level == governor.host);
            (vec![("level", level.to_owned())], is.into())
        }),
    );
    page.one(
        "governor_back_off_seconds",
        "How long the governor will take nothing, because of trouble.",
        &[],
        governor.back_off_ms.unwrap_or(0) as f64 / 1e3,
    );
}

fn memory(page: &mut Page, cost: &Cost) {
    page.amount(
        "memory_resident_bytes",
        "Memory of the host that the VM takes, with the VMM around it.",
        cost.resident,
    );
    let kinds = [
        ("anon", Some(cost.anon)),
        ("shmem", Some(cost.shmem)),
        ("file", Some(cost.file)),
        ("kernel", cost.kernel),
        ("anon_huge", cost.anon_huge),
        ("hugetlb", Some(cost.hugetlb)),
        ("swap", cost.swap),
        ("zswap", cost.zswap),
    ];
    page.family(
        "memory_bytes",
        "The same by kind; anon_huge is part of anon, swap and hugetlb are beside the resident.",
        Kind::Gauge,
        kinds
            .into_iter()
            .filter_map(|(kind, bytes)| Some((vec![("kind", kind.to_owned())], bytes? as f64))),
    );
    let source = match cost.source {
        Source::Cgroup => "cgroup",
        Source::SmapsRollup => "smaps_rollup",
    };
    page.one(
        "memory_age_seconds",
        "How old these are, and where they were read.",
        &[("source", source)],
        cost.age_ms as f64 / 1e3,
    );
}

fn ksm(page: &mut Page, view: &View) {
    let gain = &view.ksm;
    page.amount(
        "ksm_merged_pages",
        "Pages of the process that are merged.",
        gain.merged_pages,
    );
    page.amount(
        "ksm_zero_pages",
        "Pages of zeroes that are merged.",
        gain.zero_pages,
    );
    page.amount(
        "ksm_rmap_items",
        "Pages that KSM keeps an eye on.",
        gain.rmap_items,
    );
    page.family(
        "ksm_net_profit_bytes",
        "What merging saves, less what it costs.",
        Kind::Gauge,
        gain.net_profit.map(|profit| (Vec::new(), profit as f64)),
    );
}

fn vcpus(page: &mut Page, observation: &Observation) {
    let seconds = |ns: u64| ns as f64 / 1e9;
    let vcpus = &observation.view.vcpus;
    page.family(
        "vcpu_run_seconds_total",
        "Time the vCPU's thread ran.",
        Kind::Counter,
        vcpus
            .iter()
            .filter_map(|v| Some((vcpu(v.vcpu), seconds(v.run_ns?)))),
    );
    page.family(
        "vcpu_run_delay_seconds_total",
        "Time the vCPU's thread was ready and had to wait for a CPU: the guest's steal time.",
        Kind::Counter,
        vcpus
            .iter()
            .filter_map(|v| Some((vcpu(v.vcpu), seconds(v.run_delay_ns?)))),
    );
    page.family(
        "vcpu_exits_total",
        "Times the vCPU left the guest for the VMM, by what for.",
        Kind::Counter,
        (0..).zip(&observation.exits).flat_map(|(index, exits)| {
            exits.iter().map(move |(reason, count)| {
                let mut labels = vcpu(index);
                labels.push(("reason", (*reason).to_owned()));
                (labels, *count as f64)
            })
        }),
    );
}

fn vcpu(index: u32) -> Vec<(&'static str, String)> {
    vec![("vcpu", index.to_string())]
}

fn pressure(page: &mut Page, view: &View) {
    let mut totals: Vec<Sample> = Vec::new();
    let mut ratios: Vec<Sample> = Vec::new();
    for (scope, resources) in [
        ("host", &view.pressure.host),
        ("cgroup", &view.pressure.cgroup),
    ] {
        let Resources {
            cpu, memory, io, ..
        } = resources;
        for (resource, pressure) in [("cpu", cpu), ("memory", memory), ("io", io)] {
            let Some(pressure) = pressure else { continue };
            for (tasks, stall) in [("some", Some(pressure.some)), ("full", pressure.full)] {
                let Some(stall) = stall else { continue };
                let labels: Vec<_> = [("scope", scope), ("resource", resource), ("tasks", tasks)]
                    .map(|(name, value)| (name, value.to_owned()))
                    .into();
                totals.push((labels.clone(), stall.total_us as f64 / 1e6));
                ratios.push((labels, stall.avg10 / 1e2));
            }
        }
    }
    page.family(
        "pressure_stalled_seconds_total",
        "Time tasks stood still for want of a resource (PSI).",
        Kind::Counter,
        totals,
    );
    page.family(
        "pressure_stalled_ratio",
        "Part of the last ten seconds that tasks stood still.",
        Kind::Gauge,
        ratios,
    );
}

fn balloons(page: &mut Page, balloons: &[BalloonInfo]) {
    let mut of_each = |name, help, value: fn(&BalloonInfo) -> u64| {
        let samples = balloons
            .iter()
            .map(|info| (device(&info.id), value(info) as f64));
        page.family(name, help, Kind::Gauge, samples);
    };
    of_each(
        "balloon_target_bytes",
        "Memory the guest is asked to give.",
        |info| info.target,
    );
    of_each(
        "balloon_actual_bytes",
        "Memory the guest says it has given.",
        |info| info.actual,
    );
    of_each(
        "balloon_given_bytes",
        "Memory whose pages the guest has truly sent and not taken back.",
        |info| info.given,
    );
    of_each(
        "balloon_stalled",
        "Whether the balloon comes no closer to its target.",
        |info| u64::from(info.state == BalloonState::Stalled),
    );
    of_each(
        "balloon_driver",
        "Whether the guest has a driver that runs the balloon.",
        |info| info.driver.into(),
    );
    let told = |value: fn(&devices::balloon::Sample) -> f64| {
        balloons.iter().flat_map(move |info| {
            info.statistics.iter().map(move |(name, sample)| {
                let mut labels = device(&info.id);
                labels.push(("statistic", (*name).to_owned()));
                (labels, value(sample))
            })
        })
    };
    page.family(
        "balloon_guest_statistic",
        "What the guest tells of its memory: bytes, or numbers since it booted.",
        Kind::Gauge,
        told(|sample| sample.value as f64),
    );
    page.family(
        "balloon_guest_statistic_age_seconds",
        "How old that is.",
        Kind::Gauge,
        told(|sample| sample.age_ms as f64 / 1e3),
    );
}

/// The counters of `vm.counters`. Latencies are no totals, so they are gauges.
fn devices(page: &mut Page, counters: &VmCounters) {
    let is_latency = |name: &str| name.contains("_latency_");
    let all = || {
        counters.iter().flat_map(|(id, counters)| {
            counters
                .iter()
                .map(move |(name, value)| (id, name.as_str(), *value as f64))
        })
    };
    let sample = |id: &str, label, name: &str, value| {
        let mut labels = device(id);
        labels.push((label, name.to_owned()));
        (labels, value)
    };
    page.family(
        "device_counter_total",
        "Totals of each device since it was plugged, and of the governor (`__overcommit`), by their names in vm.counters.",
        Kind::Counter,
        all()
            .filter(|(_, name, _)| !is_latency(name))
            .map(|(id, name, value)| sample(id, "counter", name, value)),
    );
    page.family(
        "device_latency_seconds",
        "Latencies of each disk since it was plugged.",
        Kind::Gauge,
        all()
            .filter(|(_, name, _)| is_latency(name))
            .map(|(id, name, value)| sample(id, "statistic", name, value / 1e6)),
    );
}

fn device(id: &str) -> Vec<(&'static str, String)> {
    vec![("device", id.to_owned())]
}

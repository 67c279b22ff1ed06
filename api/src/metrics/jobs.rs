//! The families of jobs on disks.

use vmm::jobs::{JobInfo, JobState};
use vmm::status::Observation;

use super::page::{Kind, Page};

/// Those that have not ended; how others did, the events tell, which are counted.
pub(super) fn add(page: &mut Page, observation: &Observation) {
    let mut family = |name, help, value: fn(&JobInfo) -> u64| {
        let running = observation.jobs.iter();
        let running = running.filter(|job| job.state == JobState::Running);
        let samples = running.map(|job| {
            let labels = vec![
                ("device", job.disk.clone()),
                ("job", job.id.clone()),
                ("kind", job.kind.name().to_owned()),
            ];
            (labels, value(job) as f64)
        });
        page.family(name, help, Kind::Gauge, samples);
    };
    family(
        "disk_job_done_bytes",
        "Bytes of the disk that its job has looked at.",
        |job| job.done_bytes,
    );
    family(
        "disk_job_total_bytes",
        "Bytes that it has to look at.",
        |job| job.total_bytes,
    );
    family(
        "disk_job_copied_bytes",
        "Bytes that it had to write.",
        |job| job.copied_bytes,
    );
    family(
        "disk_job_waits_for_space",
        "1 while the host has no space for what it is to write, else 0.",
        |job| u64::from(job.waiting_for_space.is_some()),
    );
}

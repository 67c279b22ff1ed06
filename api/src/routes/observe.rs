//! Where the memory is, and what is counted: `vm.overcommit`, `metrics`.

use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use vmm::command::Command;
use vmm::overcommit::view::View;
use vmm::{Error, Handle};

use super::answer;
use crate::error::ApiError;
use crate::metrics::{self, Requests, Scrape};

/// How long a scrape waits for the VMM thread, which may be building a machine.
const PATIENCE: Duration = Duration::from_secs(2);

/// Show where the memory is
///
/// What the VM was promised and guaranteed, what it truly costs the host and where that was read,
/// what balloons, page reporting and merging give back, what its disks take and may yet take of the
/// host's file systems, how long vCPUs waited for a CPU, and the pressure on the host. Everything is read when asked and has its age; what this host does not
/// tell is absent, and a text says why.
#[utoipa::path(
    get, path = "/vm.overcommit", operation_id = "getOvercommit", tag = "overcommit",
    responses((
        status = 200, description = "The truth, as far as the kernel tells it.", body = View,
        example = json!({
            "mode": "off",
            "promised": 536870912, "guaranteed": 536870912,
            "cost": {
                "source": "cgroup", "resident": 160000000, "anon": 134217728, "shmem": 0,
                "file": 20480000, "kernel": 3145728, "anon_huge": 104857600, "hugetlb": 0,
                "swap": 0, "zswap": 0, "age_ms": 0
            },
            "balloons": {
                "count": 1, "target": 268435456, "actual": 268435456, "given": 268435456, "inflated": 268435456,
                "deflated": 0, "reported_free": 12582912, "age_ms": 0
            },
            "disks": {
                "count": 2, "virtual_size": 107374182400_u64, "allocated_size": 21474836480_u64,
                "unallocated_size": 85899345920_u64, "block_device_size": 1073741824,
                "host_free": 64424509440_u64,
                "file_systems": [{
                    "disks": ["_disk0"], "unallocated_size": 85899345920_u64,
                    "host_free": 64424509440_u64, "host_total": 214748364800_u64
                }],
                "age_ms": 0
            },
            "ksm": {
                "mergeable": true, "merged_pages": 500, "zero_pages": 10, "rmap_items": 1000,
                "net_profit": 2024960, "age_ms": 0
            },
            "huge_pages": {"wanted": true, "huge": 104857600, "lost": 29360128, "age_ms": 0},
            "vcpus": [{
                "vcpu": 0, "thread": 4711, "run_ns": 81000000, "run_delay_ns": 120000, "age_ms": 0
            }],
            "pressure": {
                "host": {"memory": {"some": {
                    "avg10": 0.0, "avg60": 0.12, "avg300": 0.06, "total_us": 702570
                }}},
                "cgroup": {"unavailable": "the process is in the root cgroup"},
                "age_ms": 0
            }
        }),
    )),
)]
pub async fn overcommit(State(handle): State<Handle>) -> Result<Response, ApiError> {
    let view = handle
        .request(|reply| Command::Overcommit { reply })
        .await?;
    answer(&view)
}

/// Show what is counted, for Prometheus
///
/// The text format, version 0.0.4; also at `/metrics`. Where there is no VM, only the process is
/// counted. A VMM thread that is busy for two seconds is not waited for: `ballast_vmm_answered` is
/// 0 then, and the VM is missing.
#[utoipa::path(
    get, path = "/metrics", operation_id = "getMetrics", tag = "overcommit",
    responses((
        status = 200, description = "The metrics.", content_type = "text/plain", body = String,
        example = "# HELP ballast_vm_exists Whether there is a VM.\n\
                   # TYPE ballast_vm_exists gauge\nballast_vm_exists 0\n",
    )),
)]
pub async fn metrics(
    State(handle): State<Handle>,
    Extension(requests): Extension<Requests>,
) -> Result<Response, ApiError> {
    let observation = handle.request(|reply| Command::Observe { reply });
    let (answered, observation) = match tokio::time::timeout(PATIENCE, observation).await {
        Ok(observation) => (true, observation?),
        Err(_) => (false, None),
    };
    let page = metrics::render(&Scrape {
        requests,
        events: handle.event_counts(),
        answered,
        observation,
    })
    .map_err(|error| Error::host("writing the metrics", error))?;
    let text = HeaderValue::from_static(metrics::CONTENT_TYPE);
    Ok(([(header::CONTENT_TYPE, text)], page).into_response())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use http_body_util::BodyExt;
    use vmm::command::channel;
    use vmm::event::Events;

    use super::*;

    #[test]
    fn a_vmm_thread_that_does_not_answer_is_not_waited_for_for_ever() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let (handle, endpoint) = channel(Events::new(Instant::now()));
        endpoint.events.emit("vm", "booting", &[]);
        let text = runtime.block_on(async {
            let answer = metrics(State(handle), Extension(Requests::default())).await;
            let body = answer.unwrap().into_body().collect().await.unwrap();
            String::from_utf8(body.to_bytes().to_vec()).unwrap()
        });
        assert!(text.contains("\nballast_vmm_answered 0\n"), "{text}");
        assert!(text.contains("event=\"booting\""), "{text}");
        assert!(!text.contains("ballast_memory"), "{text}");
        drop(endpoint);
    }
}

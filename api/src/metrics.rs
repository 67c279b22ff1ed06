//! What is counted, in the text format of Prometheus.
//!
//! Made anew at each scrape out of what the VMM thread answers: nothing is kept here but the
//! number of requests. Every label has a bounded set of values: names of the program, numbers of
//! vCPUs, and ids of the devices that there are.

mod disks;
mod jobs;
mod page;
mod vm;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use vmm::status::Observation;

use self::page::{Kind, Page};
use crate::routes::ROOT;

/// The content type of [`render`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// How many requests were answered, by operation and status; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Requests(Arc<Mutex<BTreeMap<(String, u16), u64>>>);

impl Requests {
    fn add(&self, operation: &str, status: u16) {
        let counts = self.0.lock();
        let mut counts = counts.unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry((operation.to_owned(), status)).or_default();
        *count = count.wrapping_add(1);
    }

    fn all(&self) -> BTreeMap<(String, u16), u64> {
        let counts = self.0.lock();
        counts.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Counts the request when it is answered. All that is no operation of ours counts as `other`.
pub async fn count(State(requests): State<Requests>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    let operation = path.as_ref().map_or("other", |path| {
        let path = path.as_str();
        path.strip_prefix(ROOT)
            .unwrap_or(path)
            .trim_start_matches('/')
    });
    requests.add(operation, response.status().as_u16());
    response
}

/// What is known at a scrape.
#[derive(Debug, Default)]
pub struct Scrape {
    /// The requests so far.
    pub requests: Requests,
    /// The events so far, by source and name.
    pub events: BTreeMap<(&'static str, &'static str), u64>,
    /// Whether the VMM thread answered in time.
    pub answered: bool,
    /// What it answered, where there is a VM.
    pub observation: Option<Box<Observation>>,
}

/// The page.
pub fn render(scrape: &Scrape) -> Result<String, prometheus::Error> {
    let mut page = Page::default();
    page.one(
        "build_info",
        "The program's version.",
        &[("version", env!("CARGO_PKG_VERSION"))],
        1,
    );
    page.one(
        "vmm_answered",
        "Whether the VMM thread answered this scrape in time; where not, all of the VM is missing.",
        &[],
        u8::from(scrape.answered),
    );
    let requests = scrape.requests.all();
    page.family(
        "api_requests_total",
        "Requests answered, by operation and status.",
        Kind::Counter,
        requests.iter().map(|((operation, status), count)| {
            let labels = [
                ("operation", operation.clone()),
                ("status", status.to_string()),
            ];
            (labels.into(), *count as f64)
        }),
    );
    page.family(
        "events_total",
        "Events, by what sent them and name.",
        Kind::Counter,
        scrape.events.iter().map(|((source, event), count)| {
            let labels = [
                ("source", (*source).to_owned()),
                ("event", (*event).to_owned()),
            ];
            (labels.into(), *count as f64)
        }),
    );
    page.one(
        "vm_exists",
        "Whether there is a VM.",
        &[],
        u8::from(scrape.observation.is_some()),
    );
    if let Some(observation) = &scrape.observation {
        vm::add(&mut page, observation);
    }
    page.text()
}

#[cfg(test)]
mod tests;

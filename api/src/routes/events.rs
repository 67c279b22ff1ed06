//! `vm.events`: what happens, as Server-Sent Events (the HTML standard, §9.2).
//!
//! Each event goes through a channel of one, so a client that does not read holds up its own
//! channel only; the bounded ring of `vmm::event` overwrites what it misses, and it is told how
//! much that was.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::mpsc;
use vmm::Handle;
use vmm::event::{Event, Timestamp};

use crate::json;

/// Silence after which a comment is sent, so that both sides notice a dead connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Follow events
///
/// Server-Sent Events: `event` is the event's name, `data` the event as JSON. The names are Cloud
/// Hypervisor's, plus the failures that it does not tell: `boot-failed`, `device-failed`,
/// `device-removal-timed-out`, `io-error`, `guest-reset`, `vcpu-error`; and what balloons do:
/// `balloon-progress`, `balloon-reached`, `balloon-stalled`; and of the ledger that VMs share:
/// `admission-refused`, `overcommit-record-removed`, `overcommit-ledger-degraded`,
/// `overcommit-ledger-restored`. A client that reads too slowly misses events and gets
/// `events-lost` with their number.
#[utoipa::path(
    get, path = "/vm.events", operation_id = "followEvents", tag = "vm",
    responses((
        status = 200, description = "Events, from now on, for as long as the process lives.",
        content_type = "text/event-stream", body = String,
        example = "event: booted\ndata: {\"timestamp\":{\"secs\":0,\"nanos\":118447},\
                   \"source\":\"vm\",\"event\":\"booted\",\"properties\":null}\n\n",
    )),
)]
pub async fn stream(State(handle): State<Handle>) -> Response {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(forward(handle.events(), handle, sender));
    let media_type = HeaderValue::from_static("text/event-stream");
    let no_store = HeaderValue::from_static("no-store");
    (
        [
            (header::CONTENT_TYPE, media_type),
            (header::CACHE_CONTROL, no_store),
        ],
        Body::new(EventStream(receiver)),
    )
        .into_response()
}

/// Sends events until the client is gone or the process ends.
async fn forward(
    mut events: broadcast::Receiver<Event>,
    handle: Handle,
    sender: mpsc::Sender<Bytes>,
) {
    // Tells the client that it is listening from now on.
    let mut next = Bytes::from_static(b": listening\n\n");
    let ended = handle.ended();
    tokio::pin!(ended);
    let mut ending = false;
    let mut last = Timestamp { secs: 0, nanos: 0 };
    loop {
        if sender.send(next).await.is_err() {
            return;
        }
        let received = if ending {
            // What was emitted on the way out is still told.
            match events.try_recv() {
                Ok(event) => Ok(event),
                Err(broadcast::error::TryRecvError::Lagged(lost)) => Err(RecvError::Lagged(lost)),
                Err(_) => return,
            }
        } else {
            tokio::select! {
                biased;
                received = events.recv() => received,
                () = sender.closed() => return,
                () = &mut ended => {
                    ending = true;
                    next = Bytes::from_static(b": ending\n\n");
                    continue;
                }
                () = tokio::time::sleep(KEEP_ALIVE) => {
                    next = Bytes::from_static(b": keep-alive\n\n");
                    continue;
                }
            }
        };
        next = match received {
            Ok(event) => {
                last = event.timestamp;
                encode(&event)
            }
            Err(RecvError::Lagged(lost)) => encode(&events_lost(lost, last)),
            Err(RecvError::Closed) => return,
        };
    }
}

/// What a reader is told in place of `lost` events that it was too slow for.
pub fn events_lost(lost: u64, timestamp: Timestamp) -> Event {
    Event {
        timestamp,
        source: "vmm",
        event: "events-lost",
        properties: Some([("count".to_owned(), lost.to_string())].into()),
    }
}

fn encode(event: &Event) -> Bytes {
    // Names, numbers and strings can't fail to be written.
    let data = json::to_vec(event).unwrap_or_default();
    let mut bytes = format!("event: {}\ndata: ", event.event).into_bytes();
    bytes.extend_from_slice(&data);
    bytes.extend_from_slice(b"\n\n");
    bytes.into()
}

/// The body of the answer: what comes out of the channel.
struct EventStream(mpsc::Receiver<Bytes>);

impl HttpBody for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0
            .poll_recv(cx)
            .map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_its_name_and_one_line_of_json() {
        let event = Event {
            timestamp: Timestamp { secs: 1, nanos: 2 },
            source: "vm",
            event: "booted",
            properties: Some([("a".to_owned(), "b\nc".to_owned())].into()),
        };
        assert_eq!(
            encode(&event),
            "event: booted\ndata: {\"timestamp\":{\"secs\":1,\"nanos\":2},\"source\":\"vm\",\
             \"event\":\"booted\",\"properties\":{\"a\":\"b\\nc\"}}\n\n"
        );
    }
}

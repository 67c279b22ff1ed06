//! HTTP/1.1 over a Unix socket, with the wire behaviour that Cloud Hypervisor's clients rely on.
//!
//! hyper drives each connection, the router of [`crate::routes`] answers. On the wire:
//! - no reason phrase, Title-Case headers, `Content-Length` with every body but the event stream;
//! - a small answer is one write (libvirt does a single `recv`);
//! - connections live for ever between requests, but a request must arrive in bounded time;
//! - descriptors received by SCM_RIGHTS are handed to the request they came with;
//! - whatever is refused, by whomever, has the one shape of errors.
//!
//! Everything runs on the main thread.

mod stream;

use std::io;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::ext::ReasonPhrase;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tower::ServiceExt;
use vmm::Handle;

use crate::error::{self, ApiError};
use stream::Stream;
pub use stream::{Descriptors, Shared};

/// The `Server` header.
pub const SERVER: &str = concat!("ballast/", env!("CARGO_PKG_VERSION"));

/// Pause after the process ran out of descriptors, so that the accept loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long requests in flight may take to end when the process ends.
const GRACE: Duration = Duration::from_secs(1);

/// What clients may take of the process.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; who comes beyond is answered 503. It leaves most of the usual 1024
    /// descriptors to the VM's devices.
    pub connections: usize,
    /// From the first byte of a request to the end of its headers.
    pub head_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            head_timeout: Duration::from_secs(30),
        }
    }
}

/// Serves connections until the VMM has ended, then lets the requests in flight end.
pub async fn serve(listener: UnixListener, router: Router, handle: Handle, limits: Limits) {
    let mut connections = JoinSet::new();
    let ended = handle.ended();
    tokio::pin!(ended);
    loop {
        tokio::select! {
            () = &mut ended => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) if connections.len() >= limits.connections => refuse(&socket),
                Ok((socket, _)) => {
                    connections.spawn(connection(socket, router.clone(), handle.clone(), limits));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    if !is_per_connection(&error) {
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            },
        }
    }
    drop(listener);
    let all_ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, all_ended).await.is_err() {
        tracing::info!("some clients did not take their answers in time");
    }
}

/// Whether the error concerns just the one connection that was to be accepted.
fn is_per_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
    )
}

/// Says why, as far as the socket takes it without waiting, and closes the connection.
fn refuse(socket: &UnixStream) {
    let error = ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "too-many-connections",
        "too many connections; close some, or use one for many requests",
    );
    // A socket that was just connected has room; who is gone already needs no answer.
    let _ = socket.try_write(&error::raw_response(&error));
}

async fn connection(socket: UnixStream, router: Router, handle: Handle, limits: Limits) {
    let shared = Shared::default();
    let stream = Stream::new(socket, shared.clone(), limits.head_timeout);
    let service = service_fn(move |request| answer(router.clone(), shared.clone(), request));
    let connection = http1::Builder::new()
        .title_case_headers(true)
        .auto_date_header(false)
        // A client may close its writing half after the request and still read the answer.
        .half_close(true)
        // Head and body in one buffer, so that a small answer is one write.
        .writev(false)
        .max_header_size(32 << 10)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = handle.ended() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended badly");
    }
}

async fn answer(
    router: Router,
    shared: Shared,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, std::convert::Infallible> {
    let descriptors = shared.request_begins();
    if !descriptors.is_empty() {
        request.extensions_mut().insert(descriptors);
    }
    let path = request.uri().path().to_owned();
    let problem = error::wants_problem(request.headers());
    let response = match router.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    shared.request_ends();
    let mut response = error::render(response, &path, problem);
    tracing::debug!(path, status = response.status().as_u16(), "answered");
    response
        .extensions_mut()
        .insert(ReasonPhrase::from_static(b""));
    response
        .headers_mut()
        .insert(header::SERVER, HeaderValue::from_static(SERVER));
    Ok(response)
}

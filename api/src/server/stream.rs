//! A connection's bytes, and what comes beside them.
//!
//! Reading is `recvmsg`, which collects file descriptors (SCM_RIGHTS, unix(7)); they belong to the
//! request whose head is read next. A request must be complete in its head within a deadline that
//! starts with its first byte, so that idle connections may live for ever and half-sent requests
//! may not. hyper's own answers to what is not HTTP are replaced by ours on the way out.

use std::future::Future;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::http::StatusCode;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::Sleep;

use crate::error::{ApiError, raw_response};

/// The most descriptors one message can carry (SCM_MAX_FD), and the most kept for a request.
const DESCRIPTORS_MAX: usize = 253;
/// Bytes read at once.
const READ_MAX: usize = 16 << 10;

/// File descriptors that came with a request; closed when dropped.
#[derive(Clone, Debug, Default)]
pub struct Descriptors(Arc<Vec<OwnedFd>>);

impl Descriptors {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What the byte stream and the service of one connection tell each other.
#[derive(Clone, Debug, Default)]
pub struct Shared(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    descriptors: Vec<OwnedFd>,
    /// Requests whose head is read.
    begun: u64,
    /// Requests whose answer is made.
    ended: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request's head is complete; takes the descriptors that came with it.
    pub fn request_begins(&self) -> Descriptors {
        let mut state = self.state();
        state.begun += 1;
        Descriptors(Arc::new(std::mem::take(&mut state.descriptors)))
    }

    /// The answer to the request is made.
    pub fn request_ends(&self) {
        self.state().ended += 1;
    }

    /// How many requests have begun, and whether one is not answered yet.
    fn progress(&self) -> (u64, bool) {
        let state = self.state();
        (state.begun, state.begun != state.ended)
    }

    fn keep(&self, descriptor: OwnedFd) {
        let mut state = self.state();
        if state.descriptors.len() < DESCRIPTORS_MAX {
            state.descriptors.push(descriptor);
        }
    }
}

/// The byte stream that hyper reads and writes.
pub struct Stream {
    socket: UnixStream,
    shared: Shared,
    head_timeout: Duration,
    /// Runs while a request's head is incomplete: how many had begun when it was set.
    deadline: Option<(u64, Pin<Box<Sleep>>)>,
    /// Our own answer in place of hyper's, as far as it is not written yet.
    own: Vec<u8>,
    /// The last write took only a part, so the next one does not begin with a message.
    mid_message: bool,
}

impl Stream {
    /// Wraps a connected socket.
    pub fn new(socket: UnixStream, shared: Shared, head_timeout: Duration) -> Self {
        Self {
            socket,
            shared,
            head_timeout,
            deadline: None,
            own: Vec::new(),
            mid_message: false,
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(buffer)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                descriptors.for_each(|descriptor| self.shared.keep(descriptor));
            }
        }
        Ok(received.bytes)
    }

    /// Ready with an error when a head has been incomplete for too long.
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let (begun, _) = self.shared.progress();
        let Some((before, deadline)) = &mut self.deadline else {
            return Poll::Pending;
        };
        if *before != begun {
            // The head is complete.
            self.deadline = None;
            return Poll::Pending;
        }
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(io::Error::new(
            io::ErrorKind::TimedOut,
            "the head of a request did not come in time",
        ))
    }

    fn poll_write_own(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.own.is_empty() {
            let written = ready!(Pin::new(&mut self.socket).poll_write(cx, &self.own))?;
            self.own.drain(..written);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let length = buffer.remaining().min(READ_MAX);
        let received = loop {
            match self.socket.poll_read_ready(cx) {
                Poll::Pending => return self.poll_deadline(cx).map(Err),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(())) => {}
            }
            let unfilled = buffer.initialize_unfilled_to(length);
            let attempt = self
                .socket
                .try_io(Interest::READABLE, || self.receive(unfilled));
            match attempt {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        buffer.advance(received);
        let (begun, busy) = self.shared.progress();
        if busy || received == 0 {
            // A body, or the end.
            self.deadline = None;
        } else if self
            .deadline
            .as_ref()
            .is_none_or(|(before, _)| *before != begun)
        {
            let sleep = tokio::time::sleep(self.head_timeout);
            self.deadline = Some((begun, Box::pin(sleep)));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_write_own(cx))?;
        if !self.mid_message
            && let Some(error) = answer_to_no_http(bytes)
        {
            self.own = raw_response(&error);
            // What does not fit now is written by poll_flush.
            if let Poll::Ready(result) = self.poll_write_own(cx) {
                result?;
            }
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = ready!(Pin::new(&mut self.socket).poll_write(cx, bytes))?;
        self.mid_message = written < bytes.len();
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_write_own(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_own(cx))?;
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// Our words for the answer that hyper makes by itself to what is not HTTP. It is told from ours
/// by its reason phrase: our answers have none.
fn answer_to_no_http(bytes: &[u8]) -> Option<ApiError> {
    let line = bytes.strip_prefix(b"HTTP/1.1 ")?;
    if line.get(3) != Some(&b' ') || line.get(4).is_none_or(|byte| *byte == b'\r') {
        return None;
    }
    let (status, message) = match line.get(..3)? {
        b"400" => (StatusCode::BAD_REQUEST, "Bad Request: this is not HTTP/1.1"),
        b"414" => (StatusCode::URI_TOO_LONG, "the path is too long"),
        b"431" => (
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "the headers are too large",
        ),
        _ => return None,
    };
    Some(ApiError::new(status, "not-http", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_with_a_reason_phrase_is_hypers_own() {
        assert!(answer_to_no_http(b"HTTP/1.1 400 Bad Request\r\n").is_some());
        assert!(answer_to_no_http(b"HTTP/1.1 431 Request Header\r\n").is_some());
        for ours in [
            &b"HTTP/1.1 400 \r\nServer: x\r\n"[..],
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 4",
            b"HTTP/1.1 400",
            b"",
            b"data",
        ] {
            assert!(answer_to_no_http(ours).is_none());
        }
    }
}

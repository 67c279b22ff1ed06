//! An HTTP/1.1 client over a Unix socket, small enough to see every byte: one connection, kept
//! alive, and a raw mode for requests that no proper client would send.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use super::PATIENCE;

/// A connection to the API.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// Received and not yet consumed.
    buffer: Vec<u8>,
}

/// An answer.
#[derive(Debug)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The status line and the headers as they were sent.
    pub head: String,
    /// The body.
    pub body: Vec<u8>,
}

impl Client {
    /// Connects.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self::over(stream))
    }

    /// Speaks over a stream.
    pub fn over(stream: UnixStream) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    /// A request to `/api/v1/<path>`, and its answer.
    #[track_caller]
    pub fn request(&mut self, method: &str, path: &str, body: Option<&str>) -> Response {
        self.try_request(method, path, body, "")
            .unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// The same with more header lines (each ended by CRLF), telling of a lost connection.
    pub fn try_request(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&str>,
        headers: &str,
    ) -> io::Result<Response> {
        let length = body.map_or(String::new(), |b| {
            format!("Content-Length: {}\r\n", b.len())
        });
        let head =
            format!("{method} /api/v1/{path} HTTP/1.1\r\nHost: localhost\r\n{headers}{length}\r\n");
        self.send(&[head.as_bytes(), body.unwrap_or_default().as_bytes()].concat())?;
        self.receive()
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Receives an answer.
    pub fn receive(&mut self) -> io::Result<Response> {
        let head = self.head()?;
        let status = head
            .strip_prefix("HTTP/1.1 ")
            .and_then(|rest| rest.get(..3))
            .and_then(|status| status.parse().ok())
            .ok_or_else(|| broken(&head))?;
        let length = match header(&head, "Content-Length") {
            Some(length) => length.parse().map_err(|_| broken(&head))?,
            None => 0,
        };
        while self.buffer.len() < length {
            self.fill()?;
        }
        let body = self.buffer.drain(..length).collect();
        Ok(Response { status, head, body })
    }

    /// Receives a status line and headers, up to the empty line.
    pub fn head(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                let head: Vec<u8> = self.buffer.drain(..end + 4).collect();
                return String::from_utf8(head).map_err(|e| broken(&e.to_string()));
            }
            self.fill()?;
        }
    }

    /// Takes what was received and the stream, for protocols that go on differently.
    pub fn into_parts(self) -> (UnixStream, Vec<u8>) {
        (self.stream, self.buffer)
    }

    /// The stream itself.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut chunk = [0; 16384];
        let count = self.stream.read(&mut chunk)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.buffer.extend_from_slice(&chunk[..count]);
        Ok(())
    }

    /// GET, which must answer 200 with JSON.
    #[track_caller]
    pub fn get(&mut self, path: &str) -> Value {
        self.request("GET", path, None).expect(200).json()
    }

    /// PUT without a body, which must answer 204 or 200.
    #[track_caller]
    pub fn put(&mut self, path: &str) -> Response {
        self.request("PUT", path, None).expect_success(path)
    }

    /// PUT with a body, which must answer 204 or 200.
    #[track_caller]
    pub fn put_json(&mut self, path: &str, body: &Value) -> Response {
        self.request("PUT", path, Some(&body.to_string()))
            .expect_success(path)
    }

    /// PUT with a body, whatever the answer.
    #[track_caller]
    pub fn try_put_json(&mut self, path: &str, body: &Value) -> Response {
        self.request("PUT", path, Some(&body.to_string()))
    }

    /// `state` of `vm.info`.
    #[track_caller]
    pub fn state(&mut self) -> String {
        self.get("vm.info")["state"]
            .as_str()
            .expect("a state")
            .to_owned()
    }
}

impl Response {
    /// Panics unless the status is `status`.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}{}", self.head, self.text());
        self
    }

    /// Panics unless the status is one of success.
    #[track_caller]
    pub fn expect_success(self, what: &str) -> Self {
        assert!(
            matches!(self.status, 200 | 204),
            "{what}: {}{}",
            self.head,
            self.text()
        );
        self
    }

    /// Panics unless the request was refused as the client's fault, in words.
    #[track_caller]
    pub fn expect_refusal(self, what: &str) -> Self {
        assert!(
            (400..500).contains(&self.status),
            "{what}: {}{}",
            self.head,
            self.text()
        );
        assert!(!self.reasons().is_empty(), "{what}: without a reason");
        self
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The strings of an error.
    #[track_caller]
    pub fn reasons(&self) -> String {
        let reasons: Vec<String> = serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("not an array of strings ({error}): {}", self.text()));
        reasons.join(": ")
    }
}

/// The value of a header, whose name must have exactly this case: some clients look for it so.
pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// Where `needle` begins in `haystack`.
pub fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("no HTTP: {what}"))
}

//! The smallest HTTP client that keeps a connection: what is measured is the server.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::{Failure, fail};

/// No answer takes this long, in the slowest lab.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// One connection to a ballast process.
pub struct Client {
    stream: BufReader<UnixStream>,
    line: String,
    body: Vec<u8>,
}

impl Client {
    /// Connects; fails when nobody listens yet.
    pub fn connect(socket: &Path) -> std::io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Self {
            stream: BufReader::new(stream),
            line: String::new(),
            body: Vec::new(),
        })
    }

    /// `GET /api/v1/{name}`.
    pub fn get(&mut self, name: &str) -> Result<Value, Failure> {
        self.request("GET", name, "")
    }

    /// `PUT /api/v1/{name}`, with a body where `body` is not null.
    pub fn put(&mut self, name: &str, body: &Value) -> Result<Value, Failure> {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        self.request("PUT", name, &body)
    }

    fn request(&mut self, method: &str, name: &str, body: &str) -> Result<Value, Failure> {
        let status = self.exchange(method, name, body)?;
        if !(200..300).contains(&status) {
            return fail(format!(
                "{method} {name}: {status} {}",
                String::from_utf8_lossy(&self.body)
            ));
        }
        if self.body.is_empty() {
            return Ok(Value::Null);
        }
        Ok(serde_json::from_slice(&self.body)?)
    }

    /// Sends a request in one write and reads its answer; leaves the body in `self.body`, whose
    /// allocation is kept: the ping loop allocates nothing.
    pub fn exchange(&mut self, method: &str, name: &str, body: &str) -> Result<u16, Failure> {
        let length = body.len();
        let head = format!(
            "{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        self.stream.get_mut().write_all(head.as_bytes())?;
        let status = self
            .header_line()?
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok());
        let mut length = 0;
        loop {
            let line = self.header_line()?;
            if line.is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse()?;
            }
        }
        self.body.resize(length, 0);
        self.stream.read_exact(&mut self.body)?;
        status.map_or_else(|| fail("an answer without a status"), Ok)
    }

    fn header_line(&mut self) -> Result<&str, Failure> {
        self.line.clear();
        if self.stream.read_line(&mut self.line)? == 0 {
            return fail("the connection was closed before the answer");
        }
        Ok(self.line.trim_end())
    }
}

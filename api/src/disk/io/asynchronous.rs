//! Requests that are under way while other commands are read.

use std::collections::HashMap;
use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use devices::disk::buffers::{AlignedBuffer, Buffers};
use devices::disk::{Completion, Operation, Request};

use super::Failure;
use super::access::{FILL, Range};
use super::options::Options;
use super::report::{self, dump, pattern};
use super::session::Session;

/// Those there are, by their tags.
#[derive(Default)]
pub struct Pending {
    requests: HashMap<u16, Waiting>,
    next: u16,
}

struct Waiting {
    verb: &'static str,
    range: Range,
    memory: Option<Arc<AlignedBuffer>>,
    /// What is expected to be read.
    pattern: Option<u8>,
    quiet: bool,
    dump: bool,
    machine: bool,
    begin: Instant,
}

impl Session {
    /// `aio_read`.
    pub fn aio_read(&mut self, given: &Options<'_>) -> Result<(), Failure> {
        let pattern = given
            .get('P')
            .map(pattern)
            .transpose()
            .map_err(Failure::Said)?;
        let range = Range::read(&given.rest)?;
        self.begin(given, range, Operation::Read, pattern, None)
    }

    /// `aio_write`.
    pub fn aio_write(&mut self, given: &Options<'_>) -> Result<(), Failure> {
        let say = |text: &str| Err(Failure::Said(format!("{text}\n")));
        let fill = given
            .get('P')
            .map(pattern)
            .transpose()
            .map_err(Failure::Said)?;
        if given.has('u') && !given.has('z') {
            return say("-u requires -z to be specified");
        }
        if given.has('z') && given.rest.len() != 2 {
            return Err(Failure::Usage);
        }
        let range = Range::read(&given.rest)?;
        self.writable()?;
        let choices = &self.image()?.choices;
        let durable = given.has('f') || choices.writethrough;
        let unmap = given.has('u') && choices.unmap;
        match given.has('z') {
            true => self.begin(
                given,
                range,
                Operation::WriteZeroes { unmap, durable },
                None,
                None,
            ),
            false => {
                let fill = Some(fill.unwrap_or(FILL));
                self.begin(given, range, Operation::Write { durable }, None, fill)
            }
        }
    }

    fn begin(
        &mut self,
        given: &Options<'_>,
        range: Range,
        operation: Operation,
        pattern: Option<u8>,
        fill: Option<u8>,
    ) -> Result<(), Failure> {
        let verb = if operation == Operation::Read {
            "read"
        } else {
            "wrote"
        };
        let size = self.image()?.disk.size_bytes();
        let whole = (range.offset | range.length).is_multiple_of(512);
        if range.offset.saturating_add(range.length) > size {
            let failed = if verb == "read" { "readv" } else { "aio_write" };
            return Err(Failure::Later(format!(
                "{failed} failed: Input/output error\n"
            )));
        }
        if !whole || range.length == 0 {
            let reason = "asynchronous requests must be whole sectors of 512 bytes";
            return Err(Failure::Error(format!("qemu-io: {reason}")));
        }
        let mut buffers = Buffers::default();
        let memory = match operation {
            Operation::Read | Operation::Write { .. } => {
                let len = range.length as usize;
                let mut memory = AlignedBuffer::zeroed(len, 4096)?;
                if let Some(fill) = fill {
                    memory.bytes_mut().fill(fill);
                }
                let memory = Arc::new(memory);
                let pushed = buffers.push_own(&memory, 0, len);
                pushed.map_err(std::io::Error::other)?;
                Some(memory)
            }
            _ => None,
        };
        while self.pending.requests.contains_key(&self.pending.next) {
            self.pending.next = (self.pending.next + 1) % 1024;
        }
        let tag = self.pending.next;
        self.pending.next = (tag + 1) % 1024;
        let (offset, length) = (range.offset, range.length);
        let request = Request {
            tag,
            operation,
            offset,
            length,
            buffers,
        };
        let begin = Instant::now();
        let pushed = self.image()?.disk.push(request);
        pushed.map_err(|error| Failure::Error(format!("qemu-io: {}", report::error(&error))))?;
        let waiting = Waiting {
            verb,
            range,
            memory,
            pattern,
            quiet: given.has('q'),
            dump: given.has('v'),
            machine: given.has('C'),
            begin,
        };
        self.pending.requests.insert(tag, waiting);
        Ok(())
    }

    /// Tells what has been completed; with `all`, waits for all of it.
    pub fn reap(&mut self, out: &mut dyn Write, all: bool) -> std::io::Result<()> {
        while let Some(open) = &mut self.open
            && !self.pending.requests.is_empty()
        {
            let completed = open.disk.completed(all)?;
            let none = completed.is_empty();
            for completion in completed {
                self.pending.tell(completion, out)?;
            }
            if none || !all {
                break;
            }
        }
        Ok(())
    }
}

impl Pending {
    fn tell(&mut self, completion: Completion, out: &mut dyn Write) -> std::io::Result<()> {
        let Some(waiting) = self.requests.remove(&completion.tag) else {
            return Ok(());
        };
        let offset = waiting.range.offset;
        // The buffers' pointers into the memory go before anybody looks at it.
        drop(completion.buffers);
        if let Err(error) = completion.result {
            let failed = if waiting.verb == "read" {
                "readv"
            } else {
                "aio_write"
            };
            return writeln!(out, "{failed} failed: {}", report::error(&error));
        }
        let bytes = waiting
            .memory
            .as_ref()
            .map_or(&[][..], |memory| memory.bytes());
        if let Some(byte) = waiting.pattern
            && bytes.iter().any(|other| *other != byte)
        {
            let length = waiting.range.length;
            writeln!(
                out,
                "Pattern verification failed at offset {offset}, {length} bytes"
            )?;
        }
        if waiting.quiet {
            return Ok(());
        }
        if waiting.dump {
            write!(out, "{}", dump(offset, bytes))?;
        }
        let time = waiting.begin.elapsed();
        let length = waiting.range.length;
        let text = report::report(waiting.verb, offset, length, time, waiting.machine);
        write!(out, "{text}")
    }
}

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
    /// What is expected to be read.
    pattern: Option<u8>,
    quiet: bool,
    dump: bool,
    machine: bool,
    begin: Instant,
    /// And where in it the bytes begin.
    memory: Option<(Arc<AlignedBuffer>, usize)>,
}

impl Session {
    /// `aio_read`.
    pub fn aio_read(&mut self, given: &Options<'_>, out: &mut dyn Write) -> Result<(), Failure> {
        let pattern = given
            .get('P')
            .map(pattern)
            .transpose()
            .map_err(Failure::Said)?;
        let range = Range::read(&given.rest)?;
        let waiting = Waiting::new("read", given, range, pattern);
        self.begin(waiting, Operation::Read, 0, out)
    }

    /// `aio_write`.
    pub fn aio_write(&mut self, given: &Options<'_>, out: &mut dyn Write) -> Result<(), Failure> {
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
        let operation = match given.has('z') {
            true => Operation::WriteZeroes { unmap, durable },
            false => Operation::Write { durable },
        };
        let waiting = Waiting::new("wrote", given, range, None);
        self.begin(waiting, operation, fill.unwrap_or(FILL), out)
    }

    fn begin(
        &mut self,
        mut waiting: Waiting,
        operation: Operation,
        fill: u8,
        out: &mut dyn Write,
    ) -> Result<(), Failure> {
        let disk = &self.image()?.disk;
        let (offset, length) = (waiting.range.offset, waiting.range.length);
        if offset.saturating_add(length) > disk.size_bytes() {
            let failed = waiting.failed();
            return Err(Failure::Later(format!(
                "{failed} failed: Input/output error\n"
            )));
        }
        if length == 0 || !(offset | length).is_multiple_of(disk.unit()) {
            return self.at_once(&waiting, operation, fill, out);
        }
        while self.image()?.disk.is_full() {
            self.reap_some(out, true)?;
        }
        let mut buffers = Buffers::default();
        if matches!(operation, Operation::Read | Operation::Write { .. }) {
            let (skew, len) = (self.image()?.disk.skew(), length as usize);
            let mut memory = AlignedBuffer::zeroed(skew + len, 4096)?;
            if operation != Operation::Read {
                memory.bytes_mut().fill(fill);
            }
            let memory = Arc::new(memory);
            let pushed = buffers.push_own(&memory, skew, len);
            pushed.map_err(std::io::Error::other)?;
            waiting.memory = Some((memory, skew));
        }
        while self.pending.requests.contains_key(&self.pending.next) {
            self.pending.next = (self.pending.next + 1) % 1024;
        }
        let tag = self.pending.next;
        self.pending.next = (tag + 1) % 1024;
        let request = Request {
            tag,
            operation,
            offset,
            length,
            buffers,
        };
        let pushed = self.image()?.disk.push(request);
        pushed.map_err(|error| Failure::Error(format!("qemu-io: {}", report::error(&error))))?;
        self.pending.requests.insert(tag, waiting);
        Ok(())
    }

    /// What is not whole sectors: they are read, changed and written back, which others that are
    /// under way must not come into.
    fn at_once(
        &mut self,
        waiting: &Waiting,
        operation: Operation,
        fill: u8,
        out: &mut dyn Write,
    ) -> Result<(), Failure> {
        self.reap(out, true)?;
        let disk = &mut self.image()?.disk;
        let (offset, length) = (waiting.range.offset, waiting.range.length);
        let none = |()| Vec::new();
        let result = match operation {
            Operation::Read => disk
                .read(offset, length as usize)
                .map(|bytes| bytes.get().to_vec()),
            Operation::Write { durable } => disk
                .write(offset, &vec![fill; length as usize], durable)
                .map(none),
            Operation::WriteZeroes { unmap, durable } => {
                disk.write_zeroes(offset, length, unmap, durable).map(none)
            }
            Operation::Flush | Operation::Discard => Ok(Vec::new()),
        };
        waiting.tell(result.as_deref(), out)?;
        Ok(())
    }

    /// Tells what has been completed; with `all`, waits for all of it.
    pub fn reap(&mut self, out: &mut dyn Write, all: bool) -> std::io::Result<()> {
        loop {
            let any = !self.pending.requests.is_empty() && self.reap_some(out, all)?;
            if !any || !all {
                return Ok(());
            }
        }
    }

    /// Tells what has been completed, after waiting for something if need be; whether there was
    /// anything.
    fn reap_some(&mut self, out: &mut dyn Write, wait: bool) -> std::io::Result<bool> {
        let Some(open) = &mut self.open else {
            return Ok(false);
        };
        let completed = open.disk.completed(wait)?;
        let any = !completed.is_empty();
        for completion in completed {
            self.pending.tell(completion, out)?;
        }
        Ok(any)
    }
}

impl Pending {
    fn tell(&mut self, completion: Completion, out: &mut dyn Write) -> std::io::Result<()> {
        let Some(waiting) = self.requests.remove(&completion.tag) else {
            return Ok(());
        };
        // The buffers' pointers into the memory go before anybody looks at it.
        drop(completion.buffers);
        let bytes = waiting
            .memory
            .as_ref()
            .map_or(&[][..], |(memory, skew)| &memory.bytes()[*skew..]);
        waiting.tell(completion.result.as_ref().map(|()| bytes), out)
    }
}

impl Waiting {
    fn new(verb: &'static str, given: &Options<'_>, range: Range, pattern: Option<u8>) -> Self {
        Self {
            verb,
            range,
            pattern,
            quiet: given.has('q'),
            dump: given.has('v'),
            machine: given.has('C'),
            begin: Instant::now(),
            memory: None,
        }
    }

    /// What failed, if it did.
    fn failed(&self) -> &'static str {
        match self.verb {
            "read" => "readv",
            _ => "aio_write",
        }
    }

    /// Tells how it went: with what was read, if it was a read.
    fn tell(
        &self,
        result: Result<&[u8], &std::io::Error>,
        out: &mut dyn Write,
    ) -> std::io::Result<()> {
        let (offset, length) = (self.range.offset, self.range.length);
        let bytes = match result {
            Ok(bytes) => bytes,
            Err(error) => {
                return writeln!(out, "{} failed: {}", self.failed(), report::error(error));
            }
        };
        if let Some(byte) = self.pattern
            && bytes.iter().any(|other| *other != byte)
        {
            writeln!(
                out,
                "Pattern verification failed at offset {offset}, {length} bytes"
            )?;
        }
        if self.quiet {
            return Ok(());
        }
        if self.dump {
            write!(out, "{}", dump(offset, bytes))?;
        }
        let time = self.begin.elapsed();
        let text = report::report(self.verb, offset, length, time, self.machine);
        write!(out, "{text}")
    }
}

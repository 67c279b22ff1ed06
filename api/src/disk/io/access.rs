//! Reading, writing and discarding, one request at a time.

use std::io::Write;
use std::time::Instant;

use super::Failure;
use super::options::Options;
use super::report::{self, dump, number, pattern};
use super::session::{Open, Session};

/// The most bytes of a request, as QEMU's block layer has it.
pub const MOST: u64 = 2_147_483_136;

/// What a write that is not told otherwise writes.
pub const FILL: u8 = 0xcd;

/// A range of one or more pieces.
pub struct Range {
    pub offset: u64,
    pub length: u64,
}

impl Range {
    /// An offset and the lengths of pieces that lie one behind another.
    pub fn read(words: &[&str]) -> Result<Self, Failure> {
        let [offset, lengths @ ..] = words else {
            return Err(Failure::Usage);
        };
        if lengths.is_empty() {
            return Err(Failure::Usage);
        }
        let offset = number(offset).map_err(Failure::Said)?;
        let mut total = 0_u64;
        for text in lengths {
            let length = number(text).map_err(Failure::Said)?;
            total = total.saturating_add(length);
            if total > MOST {
                return Err(Failure::Said(format!(
                    "The length is {total} bytes, but only {MOST} are allowed.\n"
                )));
            }
        }
        Ok(Self {
            offset,
            length: total,
        })
    }
}

/// An offset and one length.
fn single(words: &[&str], given: &str) -> Result<Range, Failure> {
    let [offset, length] = words else {
        return Err(Failure::Usage);
    };
    let offset = number(offset).map_err(Failure::Said)?;
    let amount = number(length).map_err(Failure::Said)?;
    if amount > MOST {
        let message = format!("length cannot exceed {MOST}{given}, given {length}\n");
        return Err(Failure::Said(message));
    }
    Ok(Range {
        offset,
        length: amount,
    })
}

fn failed<'a>(what: &'a str) -> impl Fn(std::io::Error) -> Failure + 'a {
    move |error| Failure::Said(format!("{what} failed: {}\n", report::error(&error)))
}

fn unsupported(what: &str) -> Failure {
    Failure::Said(format!("{what} failed: Operation not supported\n"))
}

impl Session {
    /// `read` and `readv`.
    pub fn read(
        &mut self,
        given: &Options<'_>,
        vector: bool,
        out: &mut dyn Write,
    ) -> Result<(), Failure> {
        let expected = given
            .get('P')
            .map(pattern)
            .transpose()
            .map_err(Failure::Said)?;
        let start = given
            .get('s')
            .map(number)
            .transpose()
            .map_err(Failure::Said)?;
        let length = given
            .get('l')
            .map(number)
            .transpose()
            .map_err(Failure::Said)?;
        let range = match vector {
            true => Range::read(&given.rest)?,
            false => single(&given.rest, "")?,
        };
        if expected.is_none() && (start.is_some() || length.is_some()) {
            return Err(Failure::Usage);
        }
        let start = start.unwrap_or(0);
        let past = "pattern verification range exceeds end of read data\n";
        let rest = range.length.checked_sub(start);
        let rest = rest.ok_or_else(|| Failure::Said(past.into()))?;
        let length = length.unwrap_or(rest);
        if length > rest {
            return Err(Failure::Said(past.into()));
        }
        if given.has('b') {
            return Err(unsupported("read"));
        }
        self.settle(out)?;
        let disk = &mut self.image()?.disk;
        let begin = Instant::now();
        let bytes = disk.read(range.offset, range.length as usize);
        let bytes = bytes.map_err(failed(if vector { "readv" } else { "read" }))?;
        let time = begin.elapsed();
        let checked = &bytes.get()[start as usize..(start + length) as usize];
        let wrong = expected.is_some_and(|byte| checked.iter().any(|other| *other != byte));
        if wrong {
            writeln!(
                out,
                "Pattern verification failed at offset {}, {length} bytes",
                range.offset + start
            )?;
        }
        if !given.has('q') {
            if given.has('v') {
                write!(out, "{}", dump(range.offset, bytes.get()))?;
            }
            let text = report::report("read", range.offset, range.length, time, given.has('C'));
            write!(out, "{text}")?;
        }
        match wrong {
            // Told already.
            true => Err(Failure::Said(String::new())),
            false => Ok(()),
        }
    }

    /// `write` and `writev`.
    pub fn write(
        &mut self,
        given: &Options<'_>,
        vector: bool,
        out: &mut dyn Write,
    ) -> Result<(), Failure> {
        let say = |text: &str| Err(Failure::Said(format!("{text}\n")));
        let fill = given
            .get('P')
            .map(pattern)
            .transpose()
            .map_err(Failure::Said)?;
        let zero = given.has('z');
        if given.has('b') && zero {
            return say("-b and -z cannot be specified at the same time");
        }
        if given.has('f') && (given.has('b') || given.has('c')) {
            return say("-f and -b or -c cannot be specified at the same time");
        }
        for letter in ['n', 'u'] {
            if given.has(letter) && !zero {
                return say(&format!("-{letter} requires -z to be specified"));
            }
        }
        let source = given.get('s');
        if usize::from(zero) + usize::from(fill.is_some()) + usize::from(source.is_some()) > 1 {
            return say("Only one of -z, -P, and -s can be specified at the same time");
        }
        let range = match vector {
            true => Range::read(&given.rest)?,
            false => single(&given.rest, " without -n")?,
        };
        if given.has('b') || given.has('c') {
            return Err(unsupported("write"));
        }
        let bytes = match source {
            Some(name) => repeated(name, range.length as usize)?,
            None if zero => Vec::new(),
            None => vec![fill.unwrap_or(FILL); range.length as usize],
        };
        self.settle(out)?;
        self.writable()?;
        let open = self.image()?;
        let durable = given.has('f') || open.choices.writethrough;
        let unmap = given.has('u') && open.choices.unmap;
        let disk = &mut open.disk;
        let begin = Instant::now();
        let result = match zero {
            true => disk.write_zeroes(range.offset, range.length, unmap, durable),
            false => disk.write(range.offset, &bytes, durable),
        };
        result.map_err(failed(if vector { "writev" } else { "write" }))?;
        if !given.has('q') {
            let time = begin.elapsed();
            let text = report::report("wrote", range.offset, range.length, time, given.has('C'));
            write!(out, "{text}")?;
        }
        Ok(())
    }

    /// `discard`.
    pub fn discard(&mut self, given: &Options<'_>, out: &mut dyn Write) -> Result<(), Failure> {
        let range = single(&given.rest, "")?;
        self.settle(out)?;
        self.writable()?;
        let Open { disk, choices, .. } = self.image()?;
        let begin = Instant::now();
        let discarded = match choices.unmap {
            true => disk.discard(range.offset, range.length),
            false if range.offset.saturating_add(range.length) <= disk.size_bytes() => Ok(()),
            false => Err(std::io::Error::from_raw_os_error(libc::EIO)),
        };
        discarded.map_err(failed("discard"))?;
        if !given.has('q') {
            let time = begin.elapsed();
            let text = report::report("discard", range.offset, range.length, time, given.has('C'));
            write!(out, "{text}")?;
        }
        Ok(())
    }

    pub fn writable(&mut self) -> Result<(), Failure> {
        match self.image()?.options.readonly {
            true => Err(Failure::Error("qemu-io: Block node is read-only".into())),
            false => Ok(()),
        }
    }

    /// Requests that are under way end before one that may touch the same sectors.
    fn settle(&mut self, out: &mut dyn Write) -> std::io::Result<()> {
        self.reap(out, true)
    }
}

/// The content of a file, again and again.
fn repeated(name: &str, length: usize) -> Result<Vec<u8>, Failure> {
    use std::io::Read;
    let mut content = Vec::new();
    let file = std::fs::File::open(name);
    let read = file.and_then(|file| file.take(length as u64).read_to_end(&mut content));
    read.map_err(|error| Failure::Error(format!("{name}: {}", report::error(&error))))?;
    if content.is_empty() && length > 0 {
        return Err(Failure::Error(format!("{name}: file is empty")));
    }
    Ok(content.iter().copied().cycle().take(length).collect())
}

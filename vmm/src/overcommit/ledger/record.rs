//! What one VM tells the others: a file of fixed size, text that a person can read too.
//!
//! ```text
//!  ballast-overcommit 1 89ab01ef      format, version, CRC-32 of all that follows
//!  pid=4711                           name=value, one a line
//!  guaranteed=167772160
//!  …                                  newlines up to 4096 bytes
//! ```
//! It is written in one call in place, so that it needs no room on a full disk; the checksum tells
//! a reader that it met a write half way. A name that a reader does not know is skipped, so fields
//! can be added without a new version; sizes are in bytes.

use serde::{Serialize, Serializer};
use thiserror::Error;
use utoipa::ToSchema;

use super::lineage::Lineage;

/// Size of the file.
pub const RECORD_BYTES: usize = 4096;
const MAGIC: &str = "ballast-overcommit";
const VERSION: u32 = 1;
/// `MAGIC VERSION CRC\n`.
const HEADER_BYTES: usize = MAGIC.len() + " 1 01234567\n".len();
/// A text's bytes in the file; more are cut off.
const TEXT_BYTES: usize = 320;

/// Why a record can't be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RecordError {
    /// Not of this kind, or not of its size.
    #[error("it is not a record")]
    NotARecord,
    /// Written by a newer program.
    #[error("it has version {0}, and this program knows {VERSION}")]
    Version(u32),
    /// A write half way, or damage.
    #[error("its checksum is wrong")]
    Checksum,
    /// A value is missing, or is none.
    #[error("`{0}` is missing or wrong")]
    Value(&'static str),
}

/// Declares a struct of numbers, each of which is a line of the file by its own name.
macro_rules! numbers {
    (
        $(#[$about:meta])*
        $name:ident { $($(#[$doc:meta])* $field:ident,)* }
    ) => {
        $(#[$about])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
        pub struct $name {
            $($(#[$doc])* #[serde(skip_serializing_if = "Option::is_none")]
            pub $field: Option<u64>,)*
        }

        impl $name {
            fn lines(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($field), self.$field)),*]
                    .into_iter()
                    .filter_map(|(name, value)| Some((name, value?)))
            }

            fn read(text: &Lines<'_>) -> Self {
                Self { $($field: text.number(stringify!($field)),)* }
            }

            /// One that has a number for everything, to try the largest.
            #[cfg(test)]
            fn all(value: u64) -> Self {
                Self { $($field: Some(value),)* }
            }
        }
    };
}

numbers! {
    /// What a VM measures and tells; absent is what it does not know. None of it is relied on for
    /// admission, as part of it is the guest's word.
    Measures {
        /// Bytes of RAM less those that the guest says its balloons have.
        actual,
        /// Bytes that the balloons are asked for.
        balloon_target,
        /// Bytes that they have, as the guest says.
        balloon_actual,
        /// Bytes of pages that the guest has truly sent to them and not taken back.
        balloon_given,
        /// Bytes that the guest's programs could have without swapping.
        idle,
        /// Milliseconds since the guest told that, when the record was written.
        idle_age_ms,
        /// Bytes the guest has reported free, in all.
        reported_free,
        /// Bytes of host memory that the VM has now.
        resident,
        /// Bytes of it on the host's swap.
        swap,
        /// Bytes that KSM saves, less what that costs; in the file as two's complement where it
        /// is below 0.
        #[serde(serialize_with = "signed")]
        #[schema(value_type = Option<i64>)]
        ksm_profit,
        /// Bytes of its disks whose images are files, as the guest sees them.
        disk_virtual,
        /// Bytes that the host keeps for these files.
        disk_allocated,
        /// Bytes that they may yet come to take.
        disk_unallocated,
        /// Bytes for the taking on their file systems, which other VMs may use too.
        disk_host_free,
        /// Its claim to give of what the host needs: idle memory by weight.
        claim,
        /// Bytes given back to the guest lately, which it may be about to touch.
        pending,
        /// Milliseconds of the host's boot clock when those two were told.
        told_at_ms,
    }
}

fn signed<S: Serializer>(number: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    number.map(u64::cast_signed).serialize(serializer)
}

/// What a VM is promised, and what admission has set aside for it; all zeroes while it is off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Reservation {
    /// Most bytes of RAM that it can have.
    pub max: u64,
    /// Bytes of RAM that are never taken from it.
    pub guaranteed: u64,
    /// Bytes that its VMM needs beside them.
    pub overhead: u64,
    /// Bytes of RAM in huge pages of the host's pool, which lie beside ordinary memory: they are
    /// in no other number here.
    pub huge_pages: u64,
}

impl Reservation {
    /// Bytes that must be there, whatever the others do.
    pub fn fixed(&self) -> u64 {
        self.guaranteed.saturating_add(self.overhead)
    }

    /// Bytes that it may come to have.
    pub fn promised(&self) -> u64 {
        self.max.saturating_add(self.overhead)
    }

    /// Whether this leaves room for `other` in its place.
    pub fn covers(&self, other: &Self) -> bool {
        *self != Self::default()
            && self.fixed() >= other.fixed()
            && self.promised() >= other.promised()
    }
}

/// One VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Record {
    /// Its process.
    pub pid: u32,
    /// When that started, in clock ticks since the host's boot: as `starttime` of /proc/PID/stat.
    /// Pids are used again.
    pub start_time: u64,
    /// What the VM is doing, as `vm.info` says it; `None` where there is none.
    pub state: String,
    /// The VM's `platform.system_uuid`, or nothing.
    pub vm: String,
    /// Where its API is, or nothing.
    pub api_socket: String,
    /// The process's cgroup, as it sees that itself.
    pub cgroup: String,
    /// The same for programs, whatever they see.
    #[serde(skip)]
    pub lineage: Lineage,
    /// Milliseconds of the host's boot clock when this was written.
    pub written_at_ms: u64,
    /// Its share where memory is scarce, against the others'; at least 1.
    pub weight: u64,
    /// What it is promised.
    #[serde(flatten)]
    pub reservation: Reservation,
    /// What it measures.
    #[serde(flatten)]
    pub measures: Measures,
}

impl Record {
    /// The file's content.
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let texts = [
            ("state", &self.state),
            ("vm", &self.vm),
            ("api_socket", &self.api_socket),
            ("cgroup", &self.cgroup),
        ];
        let numbers = [
            ("pid", self.pid.into()),
            ("start_time", self.start_time),
            ("written_at_ms", self.written_at_ms),
            ("weight", self.weight),
            ("max", self.reservation.max),
            ("guaranteed", self.reservation.guaranteed),
            ("overhead", self.reservation.overhead),
            ("huge_pages", self.reservation.huge_pages),
        ];
        let mut body = String::with_capacity(RECORD_BYTES);
        for (name, value) in numbers.into_iter().chain(self.measures.lines()) {
            body.push_str(&format!("{name}={value}\n"));
        }
        for (name, value) in texts {
            body.push_str(&format!("{name}={}\n", escape(value)));
        }
        body.push_str(&format!("cgroup_ids={}\n", self.lineage.encode()));
        // That it always fits is tested; were it not to, the checksum would say so.
        let mut bytes = [b'\n'; RECORD_BYTES];
        let (header, rest) = bytes.split_at_mut(HEADER_BYTES);
        let len = body.len().min(rest.len());
        rest[..len].copy_from_slice(&body.as_bytes()[..len]);
        let sum = crc32fast::hash(rest);
        header.copy_from_slice(format!("{MAGIC} {VERSION} {sum:08x}\n").as_bytes());
        bytes
    }

    /// Reads a file's content.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let whole = (bytes.len() == RECORD_BYTES).then_some(bytes);
        let (header, rest) = whole
            .ok_or(RecordError::NotARecord)?
            .split_at_checked(HEADER_BYTES)
            .ok_or(RecordError::NotARecord)?;
        let header = std::str::from_utf8(header).map_err(|_| RecordError::NotARecord)?;
        let mut words = header.split_ascii_whitespace();
        if words.next() != Some(MAGIC) {
            return Err(RecordError::NotARecord);
        }
        let version = words.next().and_then(|word| word.parse().ok());
        match version.ok_or(RecordError::NotARecord)? {
            VERSION => {}
            other => return Err(RecordError::Version(other)),
        }
        let sum = words.next().and_then(|w| u32::from_str_radix(w, 16).ok());
        if sum != Some(crc32fast::hash(rest)) {
            return Err(RecordError::Checksum);
        }
        let text = Lines(std::str::from_utf8(rest).map_err(|_| RecordError::NotARecord)?);
        let number = |name| text.number(name).ok_or(RecordError::Value(name));
        let word = |name| text.value(name).map(unescape).unwrap_or_default();
        Ok(Self {
            pid: number("pid")?
                .try_into()
                .map_err(|_| RecordError::Value("pid"))?,
            start_time: number("start_time")?,
            state: word("state"),
            vm: word("vm"),
            api_socket: word("api_socket"),
            cgroup: word("cgroup"),
            lineage: text
                .value("cgroup_ids")
                .map(Lineage::decode)
                .unwrap_or_default(),
            written_at_ms: number("written_at_ms")?,
            weight: number("weight")?.max(1),
            reservation: Reservation {
                max: number("max")?,
                guaranteed: number("guaranteed")?,
                overhead: number("overhead")?,
                huge_pages: text.number("huge_pages").unwrap_or_default(),
            },
            measures: Measures::read(&text),
        })
    }
}

/// Lines of `name=value`; the first of a name counts.
struct Lines<'a>(&'a str);

impl Lines<'_> {
    fn value(&self, name: &str) -> Option<&str> {
        self.0
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.value(name)?.parse().ok()
    }
}

/// Text on one line and of bounded length: control characters and `%` by their numbers.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        let mut piece = character.to_string();
        if character.is_control() || matches!(character, '%' | '\u{2028}' | '\u{2029}') {
            piece = piece.bytes().map(|byte| format!("%{byte:02x}")).collect();
        }
        if escaped.len() + piece.len() > TEXT_BYTES {
            break;
        }
        escaped += &piece;
    }
    escaped
}

fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = after.get(..2).filter(|_| first == b'%');
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> Record {
        Record {
            pid: 4711,
            start_time: 99,
            state: "Running".into(),
            vm: "00112233-4455-6677-8899-aabbccddeeff".into(),
            api_socket: "/run/a b%41\n=x.sock".into(),
            cgroup: "/ballast.slice/vm-ü.scope".into(),
            lineage: Lineage {
                device: 38,
                groups: vec![4711, 1],
                whole: true,
            },
            written_at_ms: 5,
            weight: 100,
            reservation: Reservation {
                max: 512 << 20,
                guaranteed: 160 << 20,
                overhead: 8 << 20,
                huge_pages: 0,
            },
            measures: Measures {
                actual: Some(300 << 20),
                ..Measures::default()
            },
        }
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(Record::decode(&record().encode()), Ok(record()));
    }

    #[test]
    fn what_costs_more_than_it_saves_is_shown_below_0() {
        let mut record = record();
        record.measures.ksm_profit = Some((-4096_i64).cast_unsigned());
        let record = Record::decode(&record.encode()).unwrap();
        let json = serde_json::to_value(record).unwrap();
        assert_eq!(json["ksm_profit"], -4096);
        assert_eq!(json["actual"], 300 << 20);
        assert_eq!(json.get("idle"), None);
    }

    #[test]
    fn a_record_of_an_older_program_is_read_without_what_that_did_not_tell() {
        let mut record = record();
        record.measures.swap = Some(1);
        let bytes = record.encode();
        let text = std::str::from_utf8(&bytes[HEADER_BYTES..]).unwrap();
        let old: String = text
            .lines()
            .filter(|line| {
                let new = ["swap=", "huge_pages=", "cgroup_ids="];
                !new.iter().any(|name| line.starts_with(name))
            })
            .map(|line| format!("{line}\n"))
            .collect();
        let mut body = old.into_bytes();
        body.resize(RECORD_BYTES - HEADER_BYTES, b'\n');
        let sum = crc32fast::hash(&body);
        let mut file = format!("{MAGIC} {VERSION} {sum:08x}\n").into_bytes();
        file.extend(body);
        record.measures.swap = None;
        record.lineage = Lineage::default();
        assert_eq!(Record::decode(&file), Ok(record));
    }

    #[test]
    fn the_largest_record_fits() {
        let long = "\u{1}".repeat(5000);
        let largest = Record {
            pid: u32::MAX,
            start_time: u64::MAX,
            state: long.clone(),
            vm: long.clone(),
            api_socket: long.clone(),
            cgroup: long,
            lineage: Lineage {
                device: u64::MAX,
                groups: vec![u64::MAX; 500],
                whole: true,
            },
            written_at_ms: u64::MAX,
            weight: u64::MAX,
            reservation: Reservation {
                max: u64::MAX,
                guaranteed: u64::MAX,
                overhead: u64::MAX,
                huge_pages: u64::MAX,
            },
            measures: Measures::all(u64::MAX),
        };
        let read = Record::decode(&largest.encode()).unwrap();
        assert_eq!(read.measures, largest.measures);
        assert_eq!(read.state, "\u{1}".repeat(TEXT_BYTES / 3));
        assert_eq!(read.reservation, largest.reservation);
        assert!(read.lineage.groups.len() > 40);
    }

    #[test]
    fn a_name_from_the_future_is_skipped_and_a_version_from_there_is_refused() {
        let reseal = |change: &dyn Fn(&str) -> String, version: u32| {
            let bytes = record().encode();
            let text = std::str::from_utf8(&bytes[HEADER_BYTES..]).unwrap();
            let mut body = change(text).into_bytes();
            body.resize(RECORD_BYTES - HEADER_BYTES, b'\n');
            let sum = crc32fast::hash(&body);
            let mut file = format!("{MAGIC} {version} {sum:08x}\n").into_bytes();
            file.extend(body);
            Record::decode(&file)
        };
        let added = |text: &str| format!("colour=red\n{}", text.trim_end_matches('\n'));
        assert_eq!(reseal(&added, 1), Ok(record()));
        assert_eq!(reseal(&added, 2), Err(RecordError::Version(2)));
        let without = |text: &str| text.replace("guaranteed=", "guarantee=");
        assert_eq!(reseal(&without, 1), Err(RecordError::Value("guaranteed")));
        let negative = |text: &str| text.replace("max=", "max=-");
        assert_eq!(reseal(&negative, 1), Err(RecordError::Value("max")));
    }

    #[test]
    fn what_is_no_record_is_refused() {
        assert_eq!(Record::decode(b""), Err(RecordError::NotARecord));
        assert_eq!(
            Record::decode(&[0; RECORD_BYTES]),
            Err(RecordError::NotARecord)
        );
        let long = [b'\n'; RECORD_BYTES + 1];
        assert_eq!(Record::decode(&long), Err(RecordError::NotARecord));
        let mut torn = record().encode();
        torn[RECORD_BYTES / 2..].fill(b'x');
        assert_eq!(Record::decode(&torn), Err(RecordError::Checksum));
    }

    proptest! {
        #[test]
        fn bytes_of_any_kind_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..=RECORD_BYTES)) {
            let _ = Record::decode(&bytes);
            let _ = unescape(&String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn a_changed_byte_is_noticed(at in 0..RECORD_BYTES, change in 1..=255_u8) {
            let mut bytes = record().encode();
            bytes[at] ^= change;
            // The case of the checksum's own digits means nothing.
            if Record::decode(&bytes) == Ok(record()) {
                prop_assert!(at < HEADER_BYTES);
            } else {
                prop_assert!(Record::decode(&bytes).is_err());
            }
        }

        #[test]
        fn short_text_comes_back(text in ".{0,60}") {
            prop_assert_eq!(unescape(&escape(&text)), text);
        }
    }
}

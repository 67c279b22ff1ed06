//! What the operator sets for all VMs of a ledger: the file `limits` in its directory.
//!
//! ```text
//!  # lines of name = value; absent is the default
//!  reserve = 512M     memory that no guarantee may use
//!  ratio = 1.5        most that may be promised for each byte of memory; none by default
//! ```
//! It belongs to the host and not to a VM, so it is not an option of a process: a change counts
//! from the next admission on, for all of them alike.

use serde::Serialize;
use thiserror::Error;
use utoipa::ToSchema;

const MIB: u64 = 1 << 20;

/// What the operator has set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Limits {
    /// Bytes that no guarantee may use; absent is the default, [`default_reserve`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserve: Option<u64>,
    /// Most that may be promised for each byte of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

/// What is wrong with the file.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("line {line}: {problem}")]
pub struct LimitsError {
    line: usize,
    problem: String,
}

/// The reserve where none is set: a twentieth of the memory, from 128 MiB to 4 GiB.
pub fn default_reserve(memory: u64) -> u64 {
    (memory / 20).clamp(128 * MIB, 4096 * MIB)
}

impl Limits {
    /// Reads the file's text.
    pub fn parse(text: &str) -> Result<Self, LimitsError> {
        let mut limits = Self::default();
        for (index, line) in text.lines().enumerate() {
            let fail = |problem: String| LimitsError {
                line: index + 1,
                problem,
            };
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let (name, value) = line
                .split_once('=')
                .ok_or_else(|| fail(format!("`{line}` is not name = value")))?;
            let value = value.trim();
            match name.trim() {
                "reserve" => {
                    let size = size(value);
                    limits.reserve = Some(size.ok_or_else(|| {
                        fail(format!(
                            "`{value}` is not a number of bytes, as 536870912 or 512M"
                        ))
                    })?);
                }
                "ratio" => {
                    let ratio = value.parse().ok().filter(|r| (0.01..=1000.0).contains(r));
                    limits.ratio = Some(ratio.ok_or_else(|| {
                        fail(format!("`{value}` is not a number from 0.01 to 1000"))
                    })?);
                }
                other => return Err(fail(format!("`{other}` is neither reserve nor ratio"))),
            }
        }
        Ok(limits)
    }

    /// The reserve, of a host with so much memory.
    pub fn reserve(&self, memory: u64) -> u64 {
        self.reserve.unwrap_or_else(|| default_reserve(memory))
    }
}

/// Bytes, or a number with K, M, G or T (powers of 1024).
fn size(text: &str) -> Option<u64> {
    let unit = text.chars().next_back()?.to_ascii_uppercase();
    let shift = match unit {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => 0,
    };
    let digits = if shift == 0 {
        text
    } else {
        &text[..text.len() - 1]
    };
    // `parse` would take a sign.
    let number: u64 = digits
        .bytes()
        .all(|b| b.is_ascii_digit())
        .then_some(digits)?
        .parse()
        .ok()?;
    number.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_read() {
        let text = "# of this host\n\nreserve = 512M # or more\n ratio=1.5\n";
        let limits = Limits::parse(text).unwrap();
        assert_eq!(limits.reserve, Some(512 * MIB));
        assert_eq!(limits.ratio, Some(1.5));
        assert_eq!(Limits::parse(""), Ok(Limits::default()));
        for (text, bytes) in [("7", 7), ("1K", 1024), ("3g", 3 << 30), ("0", 0)] {
            assert_eq!(size(text), Some(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_by_its_line() {
        for (text, line) in [
            ("reserve = 1\nreserve", 2),
            ("reserve = -1", 1),
            ("reserve = +1", 1),
            ("reserve = 1.5G", 1),
            ("reserve = M", 1),
            ("reserve =", 1),
            ("reserve = 99999999999999999999", 1),
            ("reserve = 99999999999T", 1),
            ("ratio = 0", 1),
            ("ratio = NaN", 1),
            ("ratio = -2", 1),
            ("ratio = inf", 1),
            ("\n\nweight = 3", 3),
            ("\u{0}\u{ff}", 1),
        ] {
            assert_eq!(Limits::parse(text).unwrap_err().line, line, "{text:?}");
        }
    }

    #[test]
    fn the_default_reserve_is_bounded() {
        assert_eq!(default_reserve(0), 128 * MIB);
        assert_eq!(default_reserve(10 << 30), 512 * MIB);
        assert_eq!(default_reserve(1 << 40), 4096 * MIB);
    }
}

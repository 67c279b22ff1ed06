//! Sizes as people write and read them, as QEMU's tools have them.

use thiserror::Error;

/// Why a text is not a size.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NotASize {
    /// It is no number, or something stands behind it.
    #[error("is not a number with k, M, G, T, P or E behind it")]
    Malformed,
    /// It has more than 63 bits.
    #[error("is too large")]
    TooLarge,
}

/// Bytes, with a decimal point and a suffix, or in hexadecimal.
pub fn parse_size(text: &str) -> Result<u64, NotASize> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return match u64::from_str_radix(digits, 16) {
            Ok(value) if digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                bounded(value.into())
            }
            Err(error) if *error.kind() == std::num::IntErrorKind::PosOverflow => {
                Err(NotASize::TooLarge)
            }
            _ => Err(NotASize::Malformed),
        };
    }
    let end = text
        .bytes()
        .position(|byte| !byte.is_ascii_digit() && byte != b'.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        "e" => 60,
        _ => return Err(NotASize::Malformed),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    // There is no part of a byte.
    let in_bytes = shift == 0 && fraction.bytes().any(|digit| digit != b'0');
    let dangling = number.contains('.') && (fraction.is_empty() || in_bytes);
    if whole.is_empty() || !digits(fraction) || fraction.len() > 18 || dangling {
        return Err(NotASize::Malformed);
    }
    let whole: u64 = whole.parse().map_err(|_| NotASize::TooLarge)?;
    let part = match fraction {
        "" => 0,
        fraction => {
            let digits: u128 = fraction.parse().map_err(|_| NotASize::Malformed)?;
            (digits << shift) / 10_u128.pow(fraction.len() as u32)
        }
    };
    bounded((u128::from(whole) << shift) + part)
}

fn bounded(value: u128) -> Result<u64, NotASize> {
    match u64::try_from(value) {
        Ok(value) if value <= i64::MAX as u64 => Ok(value),
        _ => Err(NotASize::TooLarge),
    }
}

const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// Three digits and a unit, as qemu-img has it: `1.27 MiB`.
pub fn short_size(bytes: u64) -> String {
    // From 1000 on the next unit is used. Not by a logarithm: that takes libm, which each process
    // would load for this.
    let unit = (1..UNITS.len())
        .rev()
        .find(|unit| bytes >= 1000 << ((unit - 1) * 10))
        .unwrap_or(0);
    let value = bytes as f64 / (1_u64 << (unit * 10)) as f64;
    let before = if value >= 100.0 {
        3
    } else if value >= 10.0 {
        2
    } else if value >= 1.0 || value == 0.0 {
        1
    } else {
        0
    };
    let mut text = format!("{value:.*}", 3 - before);
    if text.contains('.') {
        text = text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    format!("{text} {}B", UNITS[unit])
}

/// As qemu-io has it: `1.500 KiB`, `512 bytes`.
pub fn long_size(value: f64) -> String {
    let unit = (1..UNITS.len())
        .rev()
        .find(|unit| value >= (1_u64 << (unit * 10)) as f64);
    let (text, suffix) = match unit {
        Some(unit) => {
            let scaled = value / (1_u64 << (unit * 10)) as f64;
            (format!("{scaled:.3}"), format!(" {}B", UNITS[unit]))
        }
        None => (format!("{value:.6}"), " bytes".to_owned()),
    };
    match text.split_once(".000") {
        Some((whole, _)) => format!("{whole}{suffix}"),
        None => text + &suffix,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        let good = [
            ("0", 0),
            ("512", 512),
            ("1k", 1024),
            ("1K", 1024),
            ("1.5k", 1536),
            ("0.5M", 1 << 19),
            ("3b", 3),
            ("1024.0", 1024),
            ("1024.0b", 1024),
            ("0x200", 512),
            ("7E", 7 << 60),
            ("9223372036854775807", i64::MAX as u64),
        ];
        for (text, value) in good {
            assert_eq!(parse_size(text), Ok(value), "{text}");
        }
        for text in [
            "", "k", "-1", "+1", "1kk", "1 k", "x", "0x", "0x-1", "1.", "1.5", ".5k", "1..5k",
        ] {
            assert_eq!(parse_size(text), Err(NotASize::Malformed), "{text}");
        }
        for text in [
            "8E",
            "16E",
            "9223372036854775808",
            "99999999999999999999",
            "0xffffffffffffffff",
        ] {
            assert_eq!(parse_size(text), Err(NotASize::TooLarge), "{text}");
        }
    }

    #[test]
    fn sizes_are_written_as_qemu_writes_them() {
        let short = [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (12_582_912, "12 MiB"),
            (1_335_296, "1.27 MiB"),
            (331_776, "324 KiB"),
            (1 << 40, "1 TiB"),
            (1_023_999, "1000 KiB"),
            (1_024_000, "0.977 MiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (value, text) in short {
            assert_eq!(short_size(value), text);
        }
        let long = [
            (512.0, "512 bytes"),
            (1536.0, "1.500 KiB"),
            (65536.0, "64 KiB"),
            (11_993_088.0, "11.438 MiB"),
            (0.0, "0 bytes"),
        ];
        for (value, text) in long {
            assert_eq!(long_size(value), text);
        }
    }
}

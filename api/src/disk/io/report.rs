//! What commands print, in qemu-io's words.

use std::fmt::Write;
use std::time::Duration;

use super::super::number::{NotASize, long_size, parse_size};

/// The two lines (or with `machine`, the one) that tell how a request went.
pub fn report(verb: &str, offset: u64, bytes: u64, time: Duration, machine: bool) -> String {
    let seconds = time.as_secs_f64().max(1e-9);
    let (rate, ops) = (bytes as f64 / seconds, 1.0 / seconds);
    if machine {
        let whole = time.as_secs();
        let (hours, minutes) = (whole / 3600, whole / 60 % 60);
        let rest = time.as_secs_f64() % 60.0;
        return format!("{bytes},1,{hours}:{minutes:02}:{rest:05.2},{rate:.3},{ops:.3}\n");
    }
    format!(
        "{verb} {bytes}/{bytes} bytes at offset {offset}\n{}, 1 ops; {:05.2} sec ({}/sec and \
         {ops:.4} ops/sec)\n",
        long_size(bytes as f64),
        time.as_secs_f64(),
        long_size(rate)
    )
}

/// The bytes, sixteen a line, with what of them is a letter or a digit.
pub fn dump(offset: u64, bytes: &[u8]) -> String {
    let mut text = String::new();
    for (number, line) in (0_u64..).zip(bytes.chunks(16)) {
        let _ = write!(text, "{:08x}:  ", offset + number * 16);
        for byte in line {
            let _ = write!(text, "{byte:02x} ");
        }
        text.push(' ');
        for byte in line {
            text.push(if byte.is_ascii_alphanumeric() {
                (*byte).into()
            } else {
                '.'
            });
        }
        text.push('\n');
    }
    text
}

/// A number of bytes, or what is printed where it is none.
pub fn number(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| match error {
        NotASize::Malformed => format!(
            "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}\n"
        ),
        NotASize::TooLarge => format!("Parsing error: argument too large -- {text}\n"),
    })
}

/// A byte, or what is printed where it is none.
pub fn pattern(text: &str) -> Result<u8, String> {
    let value = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u8::from_str_radix(digits, 16).ok(),
        None if text.len() > 1 && text.starts_with('0') => u8::from_str_radix(text, 8).ok(),
        None => text.parse().ok(),
    };
    value.ok_or_else(|| format!("{text} is not a valid pattern byte\n"))
}

/// The words that C has for an error.
pub fn error(error: &std::io::Error) -> String {
    let text = match error.raw_os_error() {
        Some(_) => error.to_string(),
        // QEMU knows numbers only.
        None => std::io::Error::from_raw_os_error(libc::EIO).to_string(),
    };
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_in_the_words_of_qemu_io() {
        let time = Duration::from_millis(250);
        assert_eq!(
            report("read", 512, 1536, time, false),
            "read 1536/1536 bytes at offset 512\n1.500 KiB, 1 ops; 00.25 sec (6 KiB/sec and 4.0000 \
             ops/sec)\n"
        );
        assert_eq!(
            report("read", 0, 65536, time, true),
            "65536,1,0:00:00.25,262144.000,4.000\n"
        );
        assert_eq!(
            dump(0xfffa, b"\x01az09AZ!\xff \0\n123xyz"),
            "0000fffa:  01 61 7a 30 39 41 5a 21 ff 20 00 0a 31 32 33 78  .az09AZ.....123x\n\
             0001000a:  79 7a  yz\n"
        );
        assert_eq!(pattern("0x1f"), Ok(31));
        assert_eq!(pattern("017"), Ok(15));
        assert_eq!(pattern("255"), Ok(255));
        for wrong in ["256", "-1", "x", "", "0x", "1k"] {
            assert!(pattern(wrong).is_err(), "{wrong}");
        }
    }
}

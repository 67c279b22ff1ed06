//! JSON as Cloud Hypervisor's clients can read it: ASCII only.
//!
//! `ch-remote` reads answers in blocks of 256 bytes and panics where a character of several bytes
//! straddles two of them, so whatever lies beyond ASCII is written as `\uXXXX` (RFC 8259 §7).

use std::io;

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};

/// A formatter that writes strings in ASCII and leaves the rest to `F`.
struct Ascii<F>(F);

/// Writes `value` compactly.
pub fn to_vec(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    write(value, CompactFormatter)
}

/// Writes `value` indented, for files and for the event monitor.
pub fn to_vec_pretty(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    write(value, PrettyFormatter::new())
}

fn write<F: Formatter>(value: &impl Serialize, formatter: F) -> serde_json::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(256);
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, Ascii(formatter));
    value.serialize(&mut serializer)?;
    Ok(bytes)
}

/// Passes the calls that shape the document on to the inner formatter.
macro_rules! forward {
    ($($method:ident($($argument:ident: $type:ty),*);)*) => {
        $(fn $method<W: ?Sized + io::Write>(
            &mut self, writer: &mut W $(, $argument: $type)*
        ) -> io::Result<()> {
            self.0.$method(writer $(, $argument)*)
        })*
    };
}

impl<F: Formatter> Formatter for Ascii<F> {
    forward! {
        begin_array();
        end_array();
        begin_array_value(first: bool);
        end_array_value();
        begin_object();
        end_object();
        begin_object_key(first: bool);
        end_object_key();
        begin_object_value();
        end_object_value();
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if fragment.is_ascii() {
            return writer.write_all(fragment.as_bytes());
        }
        for character in fragment.chars() {
            if character.is_ascii() {
                write!(writer, "{character}")?;
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_beyond_ascii_is_escaped_and_reads_back_the_same() {
        let text = "K\u{f6}ln \"\u{65e5}\u{672c}\" \u{1f980}\n";
        for bytes in [to_vec(&[text]).unwrap(), to_vec_pretty(&[text]).unwrap()] {
            assert!(bytes.is_ascii());
            let back: Vec<String> = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(back, [text]);
        }
    }

    #[test]
    fn the_pretty_form_is_indented() {
        let value = serde_json::json!({"a": [1]});
        assert_eq!(
            to_vec_pretty(&value).unwrap(),
            b"{\n  \"a\": [\n    1\n  ]\n}"
        );
    }
}

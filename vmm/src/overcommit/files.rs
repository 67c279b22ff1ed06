//! Reading the kernel's text files: in bounded memory, with an error that says which file and why.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// More than any file that is read here has, but for /proc/self/mountinfo on odd hosts.
const MOST_BYTES: u64 = 1 << 20;

/// The file's text. The error names the file and says why it can't be had.
pub fn read(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MOST_BYTES).read_to_string(&mut text));
    match read {
        Ok(length) if length as u64 == MOST_BYTES => Err(format!(
            "{}: is longer than {MOST_BYTES} bytes",
            path.display()
        )),
        Ok(_) => Ok(text),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// The number in a file of one line.
pub fn number(path: &Path) -> Result<u64, String> {
    let text = read(path)?;
    let word = text.trim();
    word.parse()
        .map_err(|_| format!("{}: `{word:.40}` is not a number", path.display()))
}

/// The bytes of the line `name` in a table such as /proc/self/smaps_rollup: `Rss:   1692 kB`.
pub fn kib_line(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The number of the line `name` in a table such as memory.stat: `anon 4096`. KSM's profit can be
/// negative.
pub fn stat_line<T: std::str::FromStr>(text: &str, name: &str) -> Option<T> {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    value.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_line_is_found_by_its_whole_name() {
        let text = "Rss:                1692 kB\nPss_Anon:            112 kB\nPss: 284 kB\n";
        assert_eq!(kib_line(text, "Rss"), Some(1692 << 10));
        assert_eq!(kib_line(text, "Pss"), Some(284 << 10));
        assert_eq!(kib_line(text, "Pss_"), None);
        let text = "anon 4096\nanon_thp 2097152\nksm_process_profit -64\n";
        assert_eq!(stat_line(text, "anon"), Some(4096_u64));
        assert_eq!(stat_line(text, "anon_thp"), Some(2_097_152_u64));
        assert_eq!(stat_line(text, "ksm_process_profit"), Some(-64_i64));
        assert_eq!(stat_line::<u64>(text, "ksm_process_profit"), None);
        assert_eq!(stat_line::<u64>(text, "file"), None);
    }

    #[test]
    fn a_number_too_large_for_bytes_is_none() {
        assert_eq!(kib_line("Rss: 18446744073709551615 kB", "Rss"), None);
    }

    #[test]
    fn an_error_names_the_file() {
        let error = read(Path::new("/proc/self/no-such-file")).unwrap_err();
        assert!(error.starts_with("/proc/self/no-such-file: "), "{error}");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("long");
        std::fs::write(&path, vec![b'1'; 2 << 20]).unwrap();
        assert!(read(&path).unwrap_err().contains("longer"));
        std::fs::write(&path, "max\n").unwrap();
        assert!(number(&path).unwrap_err().contains("`max`"));
        std::fs::write(&path, "12\n").unwrap();
        assert_eq!(number(&path), Ok(12));
    }

    proptest! {
        #[test]
        fn no_text_is_too_odd(text in any::<String>(), name in "[A-Za-z_]{0,8}") {
            let _ = kib_line(&text, &name);
            let _ = stat_line::<u64>(&text, &name);
            let _ = stat_line::<i64>(&text, &name);
        }
    }
}

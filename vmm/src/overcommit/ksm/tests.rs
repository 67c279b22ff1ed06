use std::fs;

use proptest::prelude::*;

use super::*;

#[test]
fn each_kernel_tells_what_it_knows() {
    // Linux 6.18.
    let text = "ksm_rmap_items 1000\nksm_zero_pages 10\nksm_merging_pages 500\n\
                ksm_process_profit 2024960\nksm_merge_any: no\nksm_mergeable: yes\n";
    assert_eq!(
        parse_gain(text, || None),
        KsmGain {
            merged_pages: Some(500),
            zero_pages: Some(10),
            rmap_items: Some(1000),
            net_profit: Some(2_024_960),
            ..KsmGain::default()
        }
    );
    // Linux 6.1: the merged pages are in a file of their own, and there is no profit.
    let gain = parse_gain("ksm_rmap_items 1000\n", || Some(500));
    assert_eq!(gain.net_profit, Some(500 * 4096 - 1000 * 64));
    assert_eq!(gain.zero_pages, None);
    let reason = gain.unavailable.unwrap();
    assert_eq!(reason, "this kernel does not tell ksm_zero_pages");
    // Knowing pages that have no equal costs.
    let gain = parse_gain("ksm_rmap_items 1000\n", || Some(0));
    assert_eq!(gain.net_profit, Some(-64000));
    // Nothing is made out of nothing.
    let gain = parse_gain("", || None);
    assert_eq!(gain.net_profit, None);
    assert!(gain.unavailable.unwrap().contains("ksm_process_profit"));
}

#[test]
fn a_kernel_without_the_file_says_so() {
    let process = tempfile::tempdir().unwrap();
    let gain = KsmGain::read(process.path());
    assert!(gain.unavailable.unwrap().contains("ksm_stat"));
    assert_eq!(gain.merged_pages, None);
    fs::write(process.path().join("ksm_merging_pages"), "7\n").unwrap();
    assert_eq!(KsmGain::read(process.path()).merged_pages, Some(7));
}

/// The kernel's directory in a temporary one.
fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(directory.path().join(name), format!("{text}\n")).unwrap();
    }
    directory
}

const FILES: &[(&str, &str)] = &[
    ("run", "0"),
    ("pages_to_scan", "100"),
    ("sleep_millisecs", "20"),
    ("pages_shared", "1"),
    ("pages_sharing", "2"),
    ("pages_unshared", "3"),
    ("pages_volatile", "4"),
    ("full_scans", "5"),
];

#[test]
fn the_hosts_totals_are_read_with_what_newer_kernels_add() {
    let old = KsmHost::read(host(FILES).path()).unwrap();
    assert_eq!((old.run, old.pages_sharing), (Run::Off, 2));
    assert_eq!(
        (old.zero_pages, old.net_profit, old.advisor),
        (None, None, None)
    );
    let newer = host(FILES);
    for (name, text) in [
        ("run", "2"),
        ("ksm_zero_pages", "6"),
        ("general_profit", "-4096"),
        ("advisor_mode", "none [scan-time]"),
    ] {
        fs::write(newer.path().join(name), text).unwrap();
    }
    let new = KsmHost::read(newer.path()).unwrap();
    assert_eq!(new.run, Run::Unmerged);
    assert_eq!((new.zero_pages, new.net_profit), (Some(6), Some(-4096)));
    assert_eq!(new.advisor.as_deref(), Some("scan-time"));
    let error = KsmHost::read(Path::new("/no/such/host")).unwrap_err();
    assert!(error.contains("no KSM"), "{error}");
}

#[test]
fn a_change_is_made_whole_or_not_at_all() {
    let directory = host(FILES);
    let read = |name| fs::read_to_string(directory.path().join(name)).unwrap();
    let change = KsmChange {
        on: true,
        pages_to_scan: Some(1000),
        sleep_ms: None,
    };
    change.apply(directory.path()).unwrap();
    assert_eq!(
        (read("run"), read("pages_to_scan")),
        ("1".into(), "1000".into())
    );
    assert_eq!(read("sleep_millisecs"), "20\n");
    KsmChange::default().apply(directory.path()).unwrap();
    assert_eq!(read("run"), "0");
    // Where it can't be started, its pace is as before.
    fs::remove_file(directory.path().join("run")).unwrap();
    let change = KsmChange {
        on: true,
        pages_to_scan: Some(5),
        sleep_ms: Some(5),
    };
    assert!(change.apply(directory.path()).unwrap_err().contains("run"));
    assert_eq!(
        (read("pages_to_scan"), read("sleep_millisecs")),
        ("1000".into(), "20".into())
    );
}

proptest! {
    #[test]
    fn no_text_is_too_odd(text in any::<String>()) {
        let _ = parse_gain(&text, || None);
        let _ = chosen(&text);
    }

    #[test]
    fn no_numbers_are_too_large(items in any::<u64>(), merged in any::<u64>(), zero in any::<u64>()) {
        let text = format!("ksm_rmap_items {items}\nksm_zero_pages {zero}\n");
        let _ = parse_gain(&text, || Some(merged));
    }
}

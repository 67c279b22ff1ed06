//! `info`, `map` and `check` answer what qemu-img answers.

use std::os::unix::fs::FileExt;

use serde_json::Value;

use super::tools::{Said, disk, folder, img, io, run, samples};

/// Every field that QEMU has is there and has the same value.
#[track_caller]
fn agree(context: &str, theirs: &Value, ours: &Value) {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => {
            for (name, value) in theirs {
                let mine = ours.get(name);
                let mine = mine.unwrap_or_else(|| panic!("{context}: no {name}"));
                agree(&format!("{context}.{name}"), value, mine);
            }
        }
        (Value::Array(theirs), Value::Array(ours)) => {
            assert_eq!(theirs.len(), ours.len(), "{context}: {theirs:?} {ours:?}");
            for (index, (theirs, ours)) in theirs.iter().zip(ours).enumerate() {
                agree(&format!("{context}[{index}]"), theirs, ours);
            }
        }
        _ => assert_eq!(theirs, ours, "{context}"),
    }
}

#[test]
fn info_has_all_that_qemu_img_has() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for name in samples(folder) {
        let json = format!("info -f qcow2 --output json {name}");
        let (theirs, ours) = (img(folder, &json).json(), disk(folder, &json).json());
        agree(name, &theirs, &ours);
        let human = format!("info -f qcow2 {name}");
        assert_eq!(
            img(folder, &human).good(),
            disk(folder, &human).good(),
            "{name}"
        );
        let chain = format!("info -f qcow2 --backing-chain --output json {name}");
        agree(
            name,
            &img(folder, &chain).json(),
            &disk(folder, &chain).json(),
        );
    }
    let raw = "info -f raw --output json base.raw";
    agree("raw", &img(folder, raw).json(), &disk(folder, raw).json());
}

#[test]
fn a_raw_image_stays_raw_whatever_it_holds() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    samples(folder);
    let info = disk(folder, "info -f raw --output json plain.qcow2").json();
    let size = folder.join("plain.qcow2").metadata().unwrap().len();
    assert_eq!(
        (&info["format"], &info["virtual-size"]),
        (&"raw".into(), &size.into())
    );
    disk(folder, "info plain.qcow2").refused("-f");
    disk(folder, "info -f qcow2 base.raw").refused("not a qcow2 image");
}

#[test]
fn map_shows_what_qemu_img_shows() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for name in samples(folder) {
        let json = format!("map -f qcow2 --output json {name}");
        let ours = disk(folder, &json.replace("map", "map --backing-files")).json();
        agree(name, &img(folder, &json).json(), &ours);
        let part = format!("map -f qcow2 --start-offset 100k --max-length 1M --output json {name}");
        let ours = disk(folder, &part.replace("map", "map --backing-files")).json();
        agree(name, &img(folder, &part).json(), &ours);
        let human = format!("map -f qcow2 {name}");
        let theirs = img(folder, &human);
        let ours = disk(folder, &human.replace("map", "map --backing-files"));
        if name == "packed.qcow2" {
            // QEMU gives up at compressed clusters.
            assert!(theirs.code != Some(0) && ours.good().contains("compressed"));
        } else {
            assert_eq!(theirs.good(), ours.good(), "{name}");
        }
    }
    let raw = "map -f raw --output json base.raw";
    agree("raw", &img(folder, raw).json(), &disk(folder, raw).json());
}

#[test]
fn an_image_with_a_data_file_is_told_of_as_qemu_img_tells_and_written_to() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for (name, options) in [
        ("ext.qcow2", "data_file=ext.data"),
        ("raw.qcow2", "data_file=raw.data,data_file_raw=on"),
        ("sub.qcow2", "data_file=sub.data,extended_l2=on"),
    ] {
        img(
            folder,
            &format!("create -q -f qcow2 -o {options} {name} 4M"),
        )
        .good();
        let commands = ["write -P 1 0 100k", "write -z 200k 300k", "discard 64k 64k"];
        io(folder, false, "qcow2", name, &commands).good();
        for command in ["info", "map"] {
            let json = format!("{command} -f qcow2 --output json {name}");
            let (theirs, ours) = (img(folder, &json), disk(folder, &json));
            agree(name, &theirs.json(), &ours.json());
            let human = format!("{command} -f qcow2 {name}");
            let (theirs, ours) = (img(folder, &human), disk(folder, &human));
            assert_eq!(theirs.good(), ours.good(), "{name}");
        }
        same_check(folder, name);
        let copy = format!("convert -f qcow2 -O raw {name} flat.raw");
        disk(folder, &copy).refused("backing_files: must be true");
        disk(folder, &copy.replace("convert", "convert --backing-files")).good();
        img(folder, &format!("compare -f qcow2 -F raw {name} flat.raw")).good();
        std::fs::remove_file(folder.join("flat.raw")).unwrap();
        let grow = format!("resize -f qcow2 --backing-files {name} +1M");
        disk(folder, &grow.replace(" --backing-files", "")).refused("backing_files: must be true");
        disk(folder, &grow).good();
        same_check(folder, name);
        let top = format!("create -q -f qcow2 -b {name} -F qcow2 top.qcow2");
        img(folder, &top).good();
        io(
            folder,
            false,
            "qcow2",
            "top.qcow2",
            &["write -P 2 5100k 20k", "write -P 3 0 8k"],
        )
        .good();
        img(folder, "convert -f qcow2 -O raw top.qcow2 flat.raw").good();
        disk(folder, "commit -f qcow2 --backing-files top.qcow2").good();
        for now in [name, "top.qcow2"] {
            img(folder, &format!("compare -f qcow2 -F raw {now} flat.raw")).good();
        }
        if name == "raw.qcow2" {
            img(folder, "compare -f raw -F raw raw.data flat.raw").good();
        }
        same_check(folder, name);
        std::fs::remove_file(folder.join("flat.raw")).unwrap();
        let ours = format!("disk io -f qcow2 --backing-files {name} -c");
        let write = ours
            .split(' ')
            .chain(["write -P 7 1M 1M"])
            .collect::<Vec<_>>();
        run(env!("CARGO_BIN_EXE_ballast"), folder, &write).good();
        let reads = ["read -P 7 1M 1M", "read -P 3 0 8k"];
        io(folder, false, "qcow2", name, &reads).good();
        same_check(folder, name);
        img(folder, "create -q -f raw source.raw 5M").good();
        io(folder, false, "raw", "source.raw", &["write -P 8 3M 1M"]).good();
        let into = format!("convert -n --backing-files -f raw -O qcow2 source.raw {name}");
        disk(folder, &into).good();
        let compare = format!("compare -f qcow2 -F raw {name} source.raw");
        img(folder, &compare).good();
        same_check(folder, name);
    }
    img(folder, "create -q -f raw base.raw 4M").good();
    let over = "create -q -f qcow2 -o data_file=over.data -b base.raw -F raw over.qcow2";
    img(folder, over).good();
    disk(folder, "commit -f qcow2 --backing-files over.qcow2").refused("committing over.qcow2");
}

fn same_check(folder: &std::path::Path, name: &str) -> (Said, Said) {
    let json = format!("check -f qcow2 --output json {name}");
    let (theirs, ours) = (img(folder, &json), disk(folder, &json));
    assert_eq!(theirs.code, ours.code, "{name}: {theirs:?} {ours:?}");
    let human = format!("check -f qcow2 {name}");
    let (their_words, our_words) = (img(folder, &human), disk(folder, &human));
    assert_eq!(their_words.out, our_words.out, "{name}");
    agree(name, &theirs.json(), &ours.json());
    (their_words, our_words)
}

#[test]
fn check_finds_what_qemu_img_finds_and_exits_as_it_does() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for name in samples(folder) {
        same_check(folder, name);
    }
    // A cluster that is lost, and one that has too low a refcount.
    let path = folder.join("plain.qcow2");
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let field = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = field(field(48));
    let last = path.metadata().unwrap().len() / 65536 - 1;
    file.write_all_at(&[0, 2], block + last * 2).unwrap();
    let copied = same_check(folder, "plain.qcow2");
    assert!(
        copied
            .1
            .err
            .contains(&format!("Leaked cluster {last} refcount=2 reference=1"))
    );
    file.write_all_at(&[0, 0], block + last * 2).unwrap();
    let (theirs, ours) = same_check(folder, "plain.qcow2");
    assert_eq!(theirs.code, Some(2));
    assert!(
        ours.err
            .contains(&format!("ERROR cluster {last} refcount=0 reference=1")),
        "{ours:?}"
    );
    disk(folder, "repair -f qcow2 plain.qcow2").good();
    let (theirs, _) = same_check(folder, "plain.qcow2");
    assert_eq!(theirs.code, Some(0));
    let quiet = disk(folder, "check -q -p -f qcow2 plain.qcow2");
    assert!(
        quiet.out.is_empty() && quiet.err.contains("(100.00/100%)"),
        "{quiet:?}"
    );
    disk(folder, "check -f raw base.raw").refused("nothing that could be checked");
}

#[test]
fn leaks_are_repaired_and_the_exit_status_says_so() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    samples(folder);
    let path = folder.join("plain.qcow2");
    // Clusters that nobody refers to: behind all others, and known to the refcounts.
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let field = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let clusters = path.metadata().unwrap().len() / 65536;
    file.write_all_at(&[0, 1, 0, 1], field(field(48)) + clusters * 2)
        .unwrap();
    file.set_len((clusters + 2) * 65536).unwrap();
    assert_eq!(disk(folder, "check -f qcow2 plain.qcow2").code, Some(3));
    same_check(folder, "plain.qcow2");
    let repaired = disk(folder, "check -r leaks --output json -f qcow2 plain.qcow2");
    assert_eq!(repaired.code, Some(0));
    assert_eq!(repaired.json()["leaks-fixed"], 2);
    same_check(folder, "plain.qcow2");
    assert_eq!(disk(folder, "check -f qcow2 plain.qcow2").code, Some(0));
}

#[test]
fn leaks_that_were_shared_clusters_leave_no_contradiction_when_they_are_repaired() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for options in ["cluster_size=64k", "extended_l2=on", "cluster_size=512"] {
        let path = folder.join("disk.qcow2");
        let _ = std::fs::remove_file(&path);
        img(
            folder,
            &format!("create -q -f qcow2 -o {options} disk.qcow2 4M"),
        )
        .good();
        io(folder, false, "qcow2", "disk.qcow2", &["write -P 1 0 200k"]).good();
        img(folder, "snapshot -c one disk.qcow2").good();
        io(folder, false, "qcow2", "disk.qcow2", &["write -P 2 0 70k"]).good();
        // Whoever deleted the snapshot got no further than to forget it: what it shared with the
        // disk has a refcount of two, and no COPIED bit.
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[0; 12], 60).unwrap();
        drop(file);
        let (theirs, _) = same_check(folder, "disk.qcow2");
        assert_eq!(theirs.code, Some(3));
        let repaired = disk(folder, "check -r leaks --output json -f qcow2 disk.qcow2");
        assert_eq!(repaired.code, Some(0), "{options}: {repaired:?}");
        let report = repaired.json();
        assert!(
            report["corruptions-fixed"].as_u64().unwrap() > 1,
            "{report}"
        );
        let (theirs, ours) = same_check(folder, "disk.qcow2");
        assert_eq!((theirs.code, ours.code), (Some(0), Some(0)), "{options}");
        let read = ["read -P 2 0 70k", "read -P 1 70k 130k"];
        io(folder, false, "qcow2", "disk.qcow2", &read).good();
    }
}

//! `create`, `convert` and `commit` make what qemu-img can use.

use super::tools::{disk, folder, img, io, names, samples};

#[test]
fn new_images_of_every_kind_are_what_was_asked_for() {
    /// Options, a size, and what the image has then.
    type Case = (
        &'static str,
        &'static str,
        &'static [(&'static str, &'static str)],
    );
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f raw base.raw 300M").good();
    img(folder, "create -q -f qcow2 base.qcow2 200M").good();
    let cases: &[Case] = &[
        (
            "",
            "1G",
            &[
                ("cluster-size", "65536"),
                ("compat", "\"1.1\""),
                ("extended-l2", "false"),
            ],
        ),
        (
            "-o cluster_size=512,refcount_bits=1",
            "100M",
            &[("cluster-size", "512"), ("refcount-bits", "1")],
        ),
        (
            "-o cluster_size=2M,refcount_bits=64",
            "64T",
            &[("refcount-bits", "64")],
        ),
        ("-o cluster_size=1k,preallocation=metadata", "70M", &[]),
        (
            "-o cluster_size=512,preallocation=metadata,refcount_bits=64",
            "20M",
            &[],
        ),
        ("-o preallocation=falloc", "8M", &[]),
        (
            "-o extended_l2=on",
            "1T",
            &[("extended-l2", "true"), ("cluster-size", "131072")],
        ),
        ("-o extended_l2=on,preallocation=metadata", "33M", &[]),
        ("-o compat=0.10", "512", &[("compat", "\"0.10\"")]),
        (
            "-o lazy_refcounts=on -o size=5M",
            "",
            &[("lazy-refcounts", "true"), ("virtual-size", "5242880")],
        ),
        (
            "-b base.raw -F raw",
            "",
            &[("virtual-size", "314572800"), ("extended-l2", "true")],
        ),
        (
            "-b base.qcow2 -F qcow2 -o cluster_size=4k",
            "1G",
            &[("extended-l2", "false")],
        ),
        (
            "-b base.qcow2 -F qcow2 -o compat=v2",
            "",
            &[("virtual-size", "209715200")],
        ),
        (
            "-o backing_file=base.qcow2,backing_fmt=qcow2,preallocation=metadata",
            "",
            &[],
        ),
    ];
    for (number, (options, size, expected)) in cases.iter().enumerate() {
        let name = format!("new{number}.qcow2");
        let said = disk(folder, &format!("create -f qcow2 {options} {name} {size}")).good();
        assert!(said.starts_with("Formatting"), "{said}");
        img(folder, &format!("check -f qcow2 {name}")).good();
        let info = img(folder, &format!("info -f qcow2 --output json {name}")).json();
        for (field, value) in *expected {
            let found = info
                .get(*field)
                .unwrap_or(&info["format-specific"]["data"][*field]);
            assert_eq!(found.to_string(), *value, "{options}: {field}");
        }
        // It can be written to, and stays sound.
        let commands = ["write -P 5 0 512", "read -P 5 0 512"];
        io(folder, false, "qcow2", &name, &commands).good();
        img(folder, &format!("check -f qcow2 {name}")).good();
        disk(folder, &format!("check -f qcow2 {name}")).good();
    }
    // What is below can be seen, preallocated or not.
    io(folder, false, "qcow2", "base.qcow2", &["write -P 8 1M 1M"]).good();
    io(
        folder,
        false,
        "qcow2",
        "new13.qcow2",
        &["read -P 8 1M 1M", "read -P 5 0 512"],
    )
    .good();
    let falloc = folder.join("new5.qcow2").metadata().unwrap();
    assert!(std::os::unix::fs::MetadataExt::blocks(&falloc) * 512 >= 8 << 20);
    disk(folder, "create -q -f raw new.raw 1.5M").good();
    assert_eq!(folder.join("new.raw").metadata().unwrap().len(), 1536 << 10);
}

#[test]
fn what_can_not_be_made_is_refused_by_name_and_nothing_is_left() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    std::fs::write(folder.join("there"), "mine").unwrap();
    img(folder, "create -q -f raw base.raw 1M").good();
    std::os::unix::fs::symlink("loop.qcow2", folder.join("self.qcow2")).unwrap();
    for (line, why) in [
        ("-f qcow2 new 0", "size"),
        ("-f qcow2 new 513", "size"),
        ("-f qcow2 new", "size"),
        ("-f qcow2 new 8E", "too large"),
        ("-f qcow2 new 7E", "size"),
        ("-f qcow2 -o cluster_size=512 new 1T", "size"),
        ("-f qcow2 new x", "not a number"),
        ("-f qcow2 new -- -1", "not a number"),
        ("-f vmdk new 1M", "neither raw nor qcow2"),
        ("new 1M", "-f"),
        ("-f qcow2 -o cluster_size=3k new 1M", "cluster_size"),
        ("-f qcow2 -o cluster_size=4M new 1M", "cluster_size"),
        ("-f qcow2 -o cluster_size=256 new 1M", "cluster_size"),
        (
            "-f qcow2 -o cluster_size=8k,extended_l2=on new 1M",
            "cluster_size",
        ),
        ("-f qcow2 -o extended_l2=maybe new 1M", "extended_l2"),
        ("-f qcow2 -o refcount_bits=3 new 1M", "refcount_bits"),
        ("-f qcow2 -o refcount_bits=128 new 1M", "refcount_bits"),
        ("-f qcow2 -o refcount_bits=-1 new 1M", "refcount_bits"),
        (
            "-f qcow2 -o compat=0.10,lazy_refcounts=on new 1M",
            "lazy_refcounts",
        ),
        (
            "-f qcow2 -o compat=0.10,refcount_bits=8 new 1M",
            "refcount_bits",
        ),
        (
            "-f qcow2 -o compat=0.10,extended_l2=on new 1M",
            "extended_l2",
        ),
        ("-f qcow2 -o compat=4 new 1M", "compat"),
        ("-f qcow2 -o preallocation=some new 1M", "preallocation"),
        ("-f qcow2 -o encryption=on new 1M", "encryption"),
        ("-f qcow2 -o nothing new 1M", "nothing"),
        ("-f qcow2 -b base.raw new 1M", "-F"),
        ("-f qcow2 -F raw new 1M", "-F"),
        ("-f qcow2 -b missing -F raw new 1M", "missing"),
        ("-f qcow2 -b base.raw -F qcow2 new", "not a qcow2 image"),
        (
            "-f qcow2 -b nbd:localhost -F raw new 1M",
            "not that of a file",
        ),
        ("-f qcow2 -b json:{} -F raw new 1M", "not that of a file"),
        ("-f qcow2 -b /dev/zero -F raw new 1M", "character device"),
        ("-f qcow2 -b . -F raw new 1M", "directory"),
        (
            "-f qcow2 -b base.raw -F raw -o extended_l2=off,preallocation=metadata new",
            "preallocation",
        ),
        ("-f raw -o cluster_size=4k new 1M", "cluster_size"),
        ("-f raw -b base.raw -F raw new 1M", "backing_file"),
        ("-f qcow2 there 1M", "exists"),
        ("-f raw there 1M", "exists"),
        ("-f raw self.qcow2 1M", "exists"),
        ("-f raw . 1M", "not the name of a file"),
        ("-f raw no/such/folder 1M", "No such file"),
        ("-f raw /proc/new 1M", "can't be made"),
    ] {
        disk(folder, &format!("create {line}")).refused(why);
    }
    assert_eq!(names(folder), ["base.raw", "self.qcow2", "there"]);
    assert_eq!(std::fs::read(folder.join("there")).unwrap(), b"mine");
}

#[test]
fn a_copy_has_the_same_disk_in_either_format() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    let mut sources: Vec<(&str, &str)> =
        samples(folder).into_iter().map(|n| (n, "qcow2")).collect();
    sources.push(("base.raw", "raw"));
    for (name, format) in sources {
        for (target, options) in [
            ("raw", ""),
            ("qcow2", ""),
            ("qcow2", "-o cluster_size=512"),
            ("qcow2", "-o extended_l2=on,cluster_size=64k"),
            ("qcow2", "-o compat=0.10,cluster_size=2M"),
        ] {
            let line =
                format!("convert -f {format} --backing-files -O {target} {options} {name} copy");
            assert_eq!(disk(folder, &line).good(), "");
            let line = format!("compare -f {format} -F {target} {name} copy");
            img(folder, &line).good();
            if target == "qcow2" {
                img(folder, "check -f qcow2 copy").good();
                disk(folder, "check -f qcow2 copy").good();
            }
            std::fs::remove_file(folder.join("copy")).unwrap();
        }
    }
    // Zeroes that somebody wrote take no space.
    io(
        folder,
        false,
        "raw",
        "base.raw",
        &["write -P 0 0 10M", "write -P 3 7M 4k"],
    )
    .good();
    let said = disk(folder, "convert -p -f raw -O qcow2 base.raw thin.qcow2");
    assert!(said.err.contains("(100.00/100%)"), "{said:?}");
    assert!(folder.join("thin.qcow2").metadata().unwrap().len() <= 7 << 16);
    disk(folder, "convert -f raw -O raw base.raw thin.raw").good();
    let blocks =
        |name: &str| std::os::unix::fs::MetadataExt::blocks(&folder.join(name).metadata().unwrap());
    assert!(blocks("thin.raw") < 64 && blocks("base.raw") > 10_000);
}

#[test]
fn a_large_sparse_disk_is_copied_without_reading_its_holes() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f qcow2 huge.qcow2 16T").good();
    let commands = [
        "write -P 4 0 64k",
        "write -P 5 9T 64k",
        "write -P 6 17592186040320 4k",
    ];
    io(folder, false, "qcow2", "huge.qcow2", &commands).good();
    disk(folder, "convert -f qcow2 -O qcow2 huge.qcow2 copy.qcow2").good();
    let commands = [
        "read -P 4 0 64k",
        "read -P 5 9T 64k",
        "read -P 6 17592186040320 4k",
        "read -P 0 1T 64k",
    ];
    io(folder, false, "qcow2", "copy.qcow2", &commands).good();
    img(folder, "check -f qcow2 copy.qcow2").good();
}

#[test]
fn a_copy_that_fails_leaves_nothing() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    samples(folder);
    std::fs::write(folder.join("there"), "mine").unwrap();
    // An L2 entry with a reserved bit.
    let mut bytes = std::fs::read(folder.join("plain.qcow2")).unwrap();
    let field = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2 = (field(field(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    bytes[l2 + 8..l2 + 16].copy_from_slice(&0xa000_0000_0005_0000_u64.to_be_bytes());
    std::fs::write(folder.join("torn.qcow2"), &bytes).unwrap();
    let before = names(folder);
    for (line, why) in [
        ("convert -f qcow2 -O raw plain.qcow2 there", "exists"),
        ("convert -f qcow2 -O raw plain.qcow2 plain.qcow2", "exists"),
        ("convert -f qcow2 -O raw torn.qcow2 new", "reading"),
        ("convert -f qcow2 -O qcow2 torn.qcow2 new", "reading"),
        ("convert -f qcow2 -O raw overlay.qcow2 new", "backing_files"),
        ("convert -f qcow2 -O raw missing new", "No such file"),
        (
            "convert -f raw -O qcow2 -o cluster_size=3 base.raw new",
            "cluster_size",
        ),
        ("convert -f raw -O qcow2 -o size=1G base.raw new", "size"),
        (
            "convert -f raw -O raw -o preallocation=metadata base.raw new",
            "preallocation",
        ),
        (
            "convert -f raw -O qcow2 base.raw no/such/new",
            "No such file",
        ),
        ("convert -f raw -O qcow2 base.raw", "TARGET"),
    ] {
        disk(folder, line).refused(why);
    }
    assert_eq!(names(folder), before);
    assert_eq!(std::fs::read(folder.join("there")).unwrap(), b"mine");
}

#[test]
fn a_file_system_that_is_full_is_told_and_left_as_it_was() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    samples(folder);
    std::fs::create_dir(folder.join("full")).unwrap();
    let script = format!(
        "mount -t tmpfs -o size=512k none full || exit 77\n\
         {ballast} disk convert -f raw -O qcow2 base.raw full/new; echo $?\n\
         {ballast} disk create -f qcow2 -o preallocation=falloc full/new 1G; echo $?\n\
         {ballast} disk create -f raw -o preallocation=falloc full/new 1G; echo $?\n\
         ls -A full; df --output=used full | tail -1",
        ballast = env!("CARGO_BIN_EXE_ballast")
    );
    let output = std::process::Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .current_dir(folder)
        .output();
    let Ok(output) = output else {
        eprintln!("SKIPPED: there is no unshare");
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    if matches!(output.status.code(), Some(77 | 1)) {
        eprintln!("SKIPPED: mounting a file system is not allowed: {errors}");
        return;
    }
    assert_eq!(
        text.split_whitespace().collect::<Vec<_>>(),
        ["1", "1", "1", "0"],
        "{errors}"
    );
    assert_eq!(errors.matches("No space left").count(), 3, "{errors}");
}

#[test]
fn an_overlay_is_committed_into_a_raw_image_and_emptied() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for (number, options) in [
        "",
        "-o extended_l2=on",
        "-o cluster_size=4k",
        "-o compat=0.10",
    ]
    .iter()
    .enumerate()
    {
        let (base, top) = (format!("b{number}.raw"), format!("t{number}.qcow2"));
        img(folder, &format!("create -q -f raw {base} 12M")).good();
        io(folder, false, "raw", &base, &["write -P 1 0 6M"]).good();
        img(
            folder,
            &format!("create -q -f qcow2 {options} -b {base} -F raw {top}"),
        )
        .good();
        let zero = if options.contains("0.10") {
            "write -P 0 1M 300k"
        } else {
            "write -z 1M 300k"
        };
        let commands = ["write -P 2 100k 50k", zero, "write -P 3 11M 1M"];
        io(folder, false, "qcow2", &top, &commands).good();
        img(
            folder,
            &format!("convert -f qcow2 -O raw {top} expected.raw"),
        )
        .good();
        disk(folder, &format!("commit -f qcow2 {top}")).refused("backing_files");
        let said = disk(folder, &format!("commit -f qcow2 --backing-files {top}")).good();
        assert_eq!(said, "Image committed.\n");
        img(
            folder,
            &format!("compare -f raw -F raw expected.raw {base}"),
        )
        .good();
        img(
            folder,
            &format!("compare -f raw -F qcow2 expected.raw {top}"),
        )
        .good();
        img(folder, &format!("check -f qcow2 {top}")).good();
        let map = img(folder, &format!("map -f qcow2 --output json {top}")).json();
        let map = map.as_array().unwrap();
        assert!(
            map.iter()
                .all(|extent| extent["depth"] != 0 || extent["present"] == false)
        );
    }
}

#[test]
fn an_overlay_is_committed_into_a_qcow2_image() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for options in ["cluster_size=64k", "extended_l2=on", "cluster_size=512"] {
        for name in ["base.qcow2", "top.qcow2"] {
            let _ = std::fs::remove_file(folder.join(name));
        }
        img(
            folder,
            &format!("create -q -f qcow2 -o {options} base.qcow2 8M"),
        )
        .good();
        io(folder, false, "qcow2", "base.qcow2", &["write -P 1 0 3M"]).good();
        disk(
            folder,
            "create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
        )
        .good();
        let commands = ["write -P 2 100k 5k", "write -z 1M 300k", "write -P 3 7M 1M"];
        io(folder, false, "qcow2", "top.qcow2", &commands).good();
        img(folder, "convert -f qcow2 -O raw top.qcow2 expected.raw").good();
        disk(folder, "commit -q -f qcow2 --backing-files top.qcow2").good();
        img(folder, "compare -f raw -F qcow2 expected.raw base.qcow2").good();
        img(folder, "compare -f raw -F qcow2 expected.raw top.qcow2").good();
        for name in ["base.qcow2", "top.qcow2"] {
            assert_eq!(
                disk(folder, &format!("check -f qcow2 {name}")).code,
                Some(0),
                "{options}"
            );
            img(folder, &format!("check -f qcow2 {name}")).good();
        }
    }
}

#[test]
fn a_compressed_overlay_is_committed_and_may_be_kept() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f raw base.raw 4M").good();
    img(folder, "create -q -f qcow2 -b base.raw -F raw top.qcow2").good();
    io(
        folder,
        false,
        "qcow2",
        "top.qcow2",
        &["write -c -P 6 64k 64k", "write -c -P 7 1M 128k"],
    )
    .good();
    let before = std::fs::read(folder.join("top.qcow2")).unwrap();
    disk(folder, "commit -d -q -f qcow2 --backing-files top.qcow2").good();
    let commands = ["read -P 6 64k 64k", "read -P 7 1M 128k", "read -P 0 0 64k"];
    io(folder, false, "raw", "base.raw", &commands).good();
    assert!(before == std::fs::read(folder.join("top.qcow2")).unwrap());
}

#[test]
fn a_commit_that_can_not_be_done_changes_nothing() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    samples(folder);
    // With clusters of this size there are no disks of a TiB.
    img(
        folder,
        "create -q -f qcow2 -o cluster_size=512 tiny.qcow2 1M",
    )
    .good();
    img(
        folder,
        "create -q -f qcow2 -b tiny.qcow2 -F qcow2 longer.qcow2 1T",
    )
    .good();
    io(
        folder,
        false,
        "qcow2",
        "longer.qcow2",
        &["write -P 1 0 64k"],
    )
    .good();
    let before = ["longer.qcow2", "tiny.qcow2", "base.raw", "plain.qcow2"]
        .map(|name| std::fs::read(folder.join(name)).unwrap());
    for (line, why) in [
        ("commit -f qcow2 --backing-files longer.qcow2", "larger"),
        (
            "commit -f qcow2 --backing-files plain.qcow2",
            "no backing file",
        ),
        ("commit -f raw --backing-files base.raw", "no backing file"),
    ] {
        disk(folder, line).refused(why);
    }
    let after = ["longer.qcow2", "tiny.qcow2", "base.raw", "plain.qcow2"]
        .map(|name| std::fs::read(folder.join(name)).unwrap());
    assert!(before == after);
}

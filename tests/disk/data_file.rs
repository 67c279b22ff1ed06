//! Images whose data is in a file of its own, made by us and used by QEMU's tools.

use super::tools::{disk, folder, img, io, names};

const KINDS: [&str; 7] = [
    "data_file=D",
    "data_file=D,cluster_size=512",
    "data_file=D,cluster_size=2M,preallocation=metadata",
    "data_file=D,extended_l2=on,preallocation=falloc",
    "data_file=D,data_file_raw=on",
    "data_file=D,data_file_raw=on,extended_l2=on,cluster_size=32k",
    "data_file_raw=on,preallocation=full,data_file=D,cluster_size=4k",
];

#[test]
fn an_image_with_a_data_file_is_made_as_qemu_img_makes_it() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    for (number, kind) in KINDS.iter().enumerate() {
        let (ours, theirs) = (format!("ours{number}"), format!("theirs{number}"));
        let options = |name: &str| kind.replace("=D", &format!("={name}.data"));
        let size = 5 << 20 | 512;
        disk(
            folder,
            &format!("create -f qcow2 -o {} {ours} {size}", options(&ours)),
        )
        .good();
        img(
            folder,
            &format!("create -f qcow2 -o {} {theirs} {size}", options(&theirs)),
        )
        .good();
        let info = |name: &str| {
            let said = img(folder, &format!("info -f qcow2 --output json {name}")).json();
            let mut specific = said["format-specific"].clone();
            specific["data"]["data-file"] = "its own".into();
            (specific, said["virtual-size"].clone())
        };
        assert_eq!(info(&ours), info(&theirs), "{kind}");
        let data = folder.join(format!("{ours}.data"));
        assert_eq!(std::fs::metadata(&data).unwrap().len(), size, "{kind}");
        if kind.contains("raw=on") || kind.contains("metadata") {
            let map = img(folder, &format!("map -f qcow2 --output json {ours}")).json();
            for extent in map.as_array().unwrap() {
                assert_eq!(extent["data"], true, "{kind}: {extent}");
                assert_eq!(extent["offset"], extent["start"], "{kind}: {extent}");
            }
        }
        img(folder, &format!("check -f qcow2 {ours}")).good();
        let writes = [
            "write -P 1 0 100k",
            "write -P 2 3M 1M",
            "write -z 20k 30k",
            "write -P 3 5M 512",
        ];
        for name in [&ours, &theirs] {
            io(folder, false, "qcow2", name, &writes).good();
        }
        img(
            folder,
            &format!("compare -f qcow2 -F qcow2 {ours} {theirs}"),
        )
        .good();
        img(folder, &format!("check -f qcow2 {ours}")).good();
        if kind.contains("raw=on") {
            img(
                folder,
                &format!("compare -f qcow2 -F raw {ours} {ours}.data"),
            )
            .good();
        }
        // A copy, and a copy of the copy.
        let (copy, back) = (format!("copy{number}"), format!("back{number}"));
        let into = options(&copy);
        let convert = "convert --backing-files -f qcow2 -O qcow2";
        disk(folder, &format!("{convert} -o {into} {theirs} {copy}")).good();
        img(folder, &format!("check -f qcow2 {copy}")).good();
        img(
            folder,
            &format!("compare -f qcow2 -F qcow2 {copy} {theirs}"),
        )
        .good();
        if kind.contains("raw=on") {
            img(
                folder,
                &format!("compare -f qcow2 -F raw {copy} {copy}.data"),
            )
            .good();
        }
        assert_eq!(
            std::fs::metadata(folder.join(format!("{copy}.data")))
                .unwrap()
                .len(),
            size
        );
        disk(folder, &format!("{convert} {copy} {back}")).good();
        img(
            folder,
            &format!("compare -f qcow2 -F qcow2 {back} {theirs}"),
        )
        .good();
    }
}

#[test]
fn what_makes_no_sense_with_a_data_file_is_refused_and_nothing_is_left() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    std::fs::write(folder.join("there"), [1; 4096]).unwrap();
    img(folder, "create -q -f qcow2 base 1M").good();
    std::fs::create_dir(folder.join("folder")).unwrap();
    let before = names(folder);
    let long = "a".repeat(1024);
    for (options, why) in [
        ("data_file=there", "data_file: there exists already"),
        ("data_file=new", "data_file: is the image itself"),
        ("data_file=./new", "exists already"),
        ("data_file=folder", "data_file: folder exists already"),
        ("data_file=no/where", "data_file: no/where can't be made"),
        (
            "data_file=json:{}",
            "data_file: `json:{}` is not the name of a file",
        ),
        ("data_file=nbd://host/disk", "is not the name of a file"),
        ("data_file=", "1 to 1023 bytes"),
        (&format!("data_file={long}"), "1 to 1023 bytes"),
        (
            &format!("data_file={},cluster_size=512", &long[..600]),
            "data_file: its name does not fit",
        ),
        ("data_file_raw=on", "data_file_raw: is of no use"),
        ("data_file=d,compat=0.10", "data_file: needs version 3"),
        (
            "data_file=d,data_file_raw=on,backing_file=base,backing_fmt=qcow2",
            "data_file_raw",
        ),
        ("data_file=d,data_file_raw=yes", "on or off"),
    ] {
        disk(folder, &format!("create -f qcow2 -o {options} new 1M")).refused(why);
        assert_eq!(names(folder), before, "{options}");
    }
    disk(folder, "create -f raw -o data_file=d new 1M").refused("data_file: a raw image");
    disk(
        folder,
        "convert -f qcow2 -O qcow2 -o data_file=there base new",
    )
    .refused("there exists");
    disk(folder, "convert -f qcow2 -O raw -o data_file=d base new").refused("a raw image");
    let onto = "convert -f qcow2 -O qcow2 -B base -F qcow2 -o data_file=d base new";
    disk(folder, onto).refused("not supported yet");
    // The image's name is taken: the data file goes with it.
    disk(folder, "create -f qcow2 -o data_file=d there 1M").refused("there exists already");
    assert_eq!(names(folder), before);
    assert_eq!(std::fs::read(folder.join("there")).unwrap(), [1; 4096]);
}

#[test]
fn a_name_of_a_data_file_begins_at_the_folder_of_the_image() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    std::fs::create_dir(folder.join("images")).unwrap();
    let options = "data_file=of.data,data_file_raw=on";
    disk(
        folder,
        &format!("create -f qcow2 -o {options} images/of 1M"),
    )
    .good();
    assert!(folder.join("images/of.data").exists());
    let write = ["write -P 4 64k 64k"];
    // QEMU begins where the process is.
    io(&folder.join("images"), false, "qcow2", "of", &write).good();
    disk(
        folder,
        "convert --backing-files -f qcow2 -O raw images/of flat",
    )
    .good();
    img(folder, "compare -f raw -F raw images/of.data flat").good();
    let over = "data_file=over.data,backing_file=of,backing_fmt=qcow2";
    disk(folder, &format!("create -f qcow2 -o {over} images/over")).good();
    io(
        &folder.join("images"),
        false,
        "qcow2",
        "over",
        &["read -P 4 64k 64k", "write -P 5 0 4k"],
    )
    .good();
    img(&folder.join("images"), "check -f qcow2 over").good();
}

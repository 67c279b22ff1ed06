//! External data files: read as QEMU reads them, followed only by consent, and to nowhere else than
//! to a file that has no other part in the chain.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::*;
use crate::disk::open::open_file;

const MIB: u64 = 1 << 20;
const COPIED: u64 = 1 << 63;

/// An image, and its data file `NAME.data`.
fn create(folder: &Path, name: &str, options: &str, size: u64) -> (PathBuf, PathBuf) {
    let data = folder.join(format!("{name}.data"));
    // QEMU looks for a relative name where the process is.
    let with = format!("{options},data_file={}", data.display());
    let with = with.trim_start_matches(',');
    (qemu::create(folder, name, with, size), data)
}

fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

fn word(path: &Path, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    let file = File::open(path).unwrap();
    file.read_exact_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

/// An image of 1 MiB whose header names `name` as its data file.
fn names(folder: &Path, name: &[u8]) -> PathBuf {
    let (path, data) = create(folder, "names.qcow2", "", MIB);
    std::fs::remove_file(data).unwrap();
    let mut extensions = 0x4441_5441_u32.to_be_bytes().to_vec();
    extensions.extend((name.len() as u32).to_be_bytes());
    extensions.extend(name);
    extensions.resize(extensions.len().next_multiple_of(8) + 8, 0);
    patch(&path, 112, &extensions);
    path
}

#[test]
fn images_with_a_data_file_read_as_qemu_reads_them() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    std::fs::write(at.join("base.raw"), vec![7; 3 << 20]).unwrap();
    let base = format!("backing_fmt=raw,backing_file={}/base.raw", at.display());
    let kinds = [
        "".to_owned(),
        "data_file_raw=on".into(),
        "extended_l2=on,cluster_size=32k".into(),
        "extended_l2=on,data_file_raw=on".into(),
        "cluster_size=512".into(),
        "cluster_size=2M".into(),
        "preallocation=metadata".into(),
        base.clone(),
        format!("{base},extended_l2=on,cluster_size=128k"),
    ];
    for (number, kind) in (0..).zip(&kinds) {
        let (path, data) = create(at, &format!("{number}.qcow2"), kind, 5 * MIB);
        qemu::scribble(&path, 5 * MIB, 50, number);
        qemu::io(&path, &["write -P 77 0 512".into()]);
        compare_with_qemu(&path);
        if kind.contains("data_file_raw") {
            assert!(qemu::content(&path) == std::fs::read(&data).unwrap());
        }
        // What was never written is not there, and reads as zeroes.
        let short = File::options().write(true).open(&data).unwrap();
        short.set_len(2 * MIB + 512).unwrap();
        compare_with_qemu(&path);
    }
}

#[test]
fn what_lies_on_an_image_with_a_data_file_is_read_and_written() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    let (base, data) = create(at, "base.qcow2", "", 4 * MIB);
    qemu::scribble(&base, 4 * MIB, 60, 1);
    let below = (std::fs::read(&base).unwrap(), std::fs::read(&data).unwrap());
    let options = format!("backing_fmt=qcow2,backing_file={}", base.display());
    let path = qemu::create(at, "top.qcow2", &options, 5 * MIB);
    qemu::scribble(&path, 5 * MIB, 20, 2);
    compare_with_qemu(&path);
    let mut expected = qemu::content(&path);
    let writable = OpenOptions {
        readonly: false,
        ..super::options(&path)
    };
    for sync in [false, true] {
        let mut engine = Engine::open(&OpenOptions {
            disable_io_uring: sync,
            ..writable.clone()
        })
        .unwrap();
        assert_eq!(engine.image.info().unwrap().backing.len(), 1);
        for position in [100 * 512, 2 * MIB + 4096] {
            let place = position as usize..position as usize + 512;
            expected[place].fill(9);
            let fill = [9; 512];
            engine.memory.write_slice(&fill, GuestAddress(0)).unwrap();
            let mut buffers = Buffers::default();
            let memory = &engine.memory;
            buffers.push(memory, GuestAddress(0), 512).unwrap();
            engine.queue.push(Request {
                tag: 0,
                operation: Operation::Write { durable: true },
                offset: position,
                length: 512,
                buffers,
            });
            engine.finish().remove(0).result.unwrap();
        }
        engine.compare(&expected, &mut Random(3));
        drop(engine);
        assert!(qemu::content(&path) == expected);
    }
    assert!(below == (std::fs::read(&base).unwrap(), std::fs::read(&data).unwrap()));
}

#[test]
fn a_data_file_is_followed_only_when_the_configuration_says_so() {
    let Some(folder) = qemu::folder() else { return };
    let (path, _) = create(folder.path(), "a.qcow2", "", MIB);
    let mut options = options(&path);
    options.backing_files = false;
    let refused = refusal(&options);
    assert!(
        refused.starts_with("backing_files: must be true"),
        "{refused}"
    );
    assert!(refused.contains("a.qcow2.data`"), "{refused}");
}

#[test]
fn a_relative_name_begins_at_the_images_folder() {
    let Some(folder) = qemu::folder() else { return };
    let path = names(folder.path(), b"there.raw");
    std::fs::write(folder.path().join("there.raw"), vec![5; 1 << 20]).unwrap();
    let l2 = word(&path, word(&path, 40)) & !COPIED;
    assert_eq!(l2, 0);
    assert_eq!(
        Engine::open(&options(&path)).unwrap().read(0, 512).unwrap(),
        vec![0; 512]
    );
}

#[test]
fn a_name_that_leads_elsewhere_than_to_a_data_file_is_refused() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    for (name, reason) in [
        (&b"json:{\"driver\":\"file\"}"[..], "is not that of a file"),
        (b"nbd://host/disk", "is not that of a file"),
        (b"file:text", "is not that of a file"),
        (b"te\0xt", "is not that of a file"),
        (b"missing", "No such file"),
        (b"/dev/zero", "a character device"),
        (b".", "a directory"),
        (b"names.qcow2", "is in use already"),
        (b"./names.qcow2", "is in use already"),
        (b"", "whose name it does not record"),
        (&[b'a'; 1024], "is too long"),
    ] {
        let path = names(at, name);
        for readonly in [true, false] {
            let mut options = options(&path);
            options.readonly = readonly;
            let refused = refusal(&options);
            let name = name.escape_ascii();
            assert!(refused.contains(reason), "{name}: {refused}");
        }
    }
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at.join("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    for readonly in [true, false] {
        let mut options = options(&names(at, b"fifo"));
        options.readonly = readonly;
        let refused = refusal(&options);
        assert!(refused.contains("data file"), "{refused}");
    }
    // What is no file, however much it looks like one.
    for readonly in [true, false] {
        let mut options = options(&names(at, b"/proc/self/mem"));
        options.readonly = readonly;
        let refused = refusal(&options);
        assert!(refused.contains("the kernel's own"), "{refused}");
    }
    // No extension at all.
    let path = names(at, b"x");
    patch(&path, 112, &[0; 8]);
    assert!(refusal(&options(&path)).contains("whose name it does not record"));
    // A link to the image.
    std::os::unix::fs::symlink("names.qcow2", at.join("link")).unwrap();
    let path = names(at, b"link");
    let mut options = options(&path);
    options.readonly = true;
    assert!(refusal(&options).contains("is in use already"));
}

#[test]
fn a_file_has_one_part_in_a_chain() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    let (base, data) = create(at, "base.qcow2", "", MIB);
    let backing = |of: &Path, format: &str| {
        let options = format!("backing_fmt={format},backing_file={}", of.display());
        create(at, "top.qcow2", &options, MIB).0
    };
    // The data file is also what lies below.
    let top = backing(&base, "qcow2");
    std::fs::remove_file(at.join("top.qcow2.data")).unwrap();
    std::os::unix::fs::symlink(&data, at.join("top.qcow2.data")).unwrap();
    let refused = refusal(&options(&top));
    assert!(refused.contains("is in use already"), "{refused}");
    std::fs::remove_file(at.join("top.qcow2.data")).unwrap();
    let raw = at.join("below.raw");
    std::fs::write(&raw, vec![0; 1 << 20]).unwrap();
    let top = backing(&raw, "raw");
    std::fs::remove_file(at.join("top.qcow2.data")).unwrap();
    std::os::unix::fs::symlink(&raw, at.join("top.qcow2.data")).unwrap();
    let refused = refusal(&options(&top));
    assert!(refused.contains("its own backing file"), "{refused}");
}

#[test]
fn what_can_not_be_beside_a_data_file_is_refused() {
    let Some(folder) = qemu::folder() else { return };
    let at = folder.path();
    std::fs::write(at.join("base.raw"), vec![7; 1 << 20]).unwrap();
    let base = format!("backing_fmt=raw,backing_file={}/base.raw", at.display());
    let (path, _) = create(at, "raw.qcow2", &base, MIB);
    patch(&path, 88, &2_u64.to_be_bytes());
    let refused = refusal(&options(&path));
    assert!(
        refused.contains("and yet it has a backing file"),
        "{refused}"
    );
    let (path, _) = create(at, "snapshots.qcow2", "", MIB);
    patch(&path, 60, &1_u32.to_be_bytes());
    patch(&path, 64, &0x10000_u64.to_be_bytes());
    let refused = refusal(&options(&path));
    assert!(refused.contains("internal snapshots"), "{refused}");
}

#[test]
fn entries_that_lead_elsewhere_are_corrupt_and_only_they() {
    let Some(folder) = qemu::folder() else { return };
    let (path, _) = create(folder.path(), "a.qcow2", "", MIB);
    qemu::io(&path, &["write -P 5 0 1M".into()]);
    let l2 = word(&path, word(&path, 40)) & !COPIED;
    assert_eq!(word(&path, l2), COPIED);
    patch(&path, l2 + 8, &(0x2_0000 | COPIED).to_be_bytes());
    patch(&path, l2 + 24, &(1_u64 << 62 | 512).to_be_bytes());
    let mut engine = Engine::open(&options(&path)).unwrap();
    for (cluster, good) in [(0, true), (1, false), (2, true), (3, false), (4, true)] {
        let read = engine.read(cluster << 16, 65536);
        assert_eq!(read.is_ok(), good, "{cluster}");
        if let Ok(bytes) = read {
            assert!(bytes == [5; 65536]);
        }
    }
    // A piece that begins well ends there too.
    assert!(engine.read(0, 0x2_0000).is_err());
}

#[test]
fn a_data_file_that_is_cut_short_in_use_is_noticed() {
    let Some(folder) = qemu::folder() else { return };
    let (path, data) = create(folder.path(), "a.qcow2", "", MIB);
    qemu::io(&path, &["write -P 5 0 1M".into()]);
    let mut engine = Engine::open(&options(&path)).unwrap();
    let file = File::options().write(true).open(&data).unwrap();
    file.set_len(512).unwrap();
    let error = engine.read(65536, 512).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn data_files_are_locked_against_writers_and_shared_with_readers() {
    let Some(folder) = qemu::folder() else { return };
    let (path, data) = create(folder.path(), "a.qcow2", "", MIB);
    let first = Engine::open(&options(&path)).unwrap();
    let second = Engine::open(&options(&path)).unwrap();
    let mut writer = options(&data);
    writer.readonly = false;
    assert!(matches!(open_file(&writer), Err(BuildError::Locked { .. })));
    drop((first, second));
    let _writer = open_file(&writer).unwrap();
    assert!(matches!(
        Qcow2Image::open(&options(&path)),
        Err(BuildError::Locked { .. })
    ));
}

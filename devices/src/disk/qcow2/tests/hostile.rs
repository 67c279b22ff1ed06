//! Images that nobody's tool made: refused, or read with errors, but never a panic, nor memory or
//! time without a bound.

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

/// Reads all of an image that may be anything.
fn read_all(path: &Path, sync: bool) {
    let mut options = options(path);
    options.disable_io_uring = sync;
    options.backing_files = false;
    let Ok(mut engine) = Engine::open(&options) else {
        return;
    };
    let size = engine.image.size_bytes();
    for round in 0..8 {
        for tag in 0..DEPTH {
            let piece = round * u64::from(DEPTH) + u64::from(tag);
            let offset = piece * 65536;
            if offset < size {
                let length = (size - offset).min(65536) / 512 * 512;
                engine.push(tag, offset, length, 0);
            }
        }
        engine.finish();
    }
}

/// A small image with plain, zero, compressed and absent clusters, and where its tables are.
fn sample(folder: &Path, options: &str) -> Vec<u8> {
    let source = qemu::create(folder, "source.qcow2", "", 2 * MIB);
    qemu::io(&source, &["write -P 3 0 700k".into()]);
    let path = folder.join("sample.qcow2");
    let (source, target) = (source.display(), path.display());
    qemu::img(&format!(
        "convert -c -f qcow2 -O qcow2 -o {options} {source} {target}"
    ));
    let commands = ["write -P 5 1M 300k", "write -z 1400k 100k"];
    qemu::io(&path, &commands.map(Into::into));
    std::fs::read(&path).unwrap()
}

fn field(bytes: &[u8], offset: usize) -> u64 {
    u64::from_be_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

#[test]
fn tables_that_lead_anywhere_give_errors_and_nothing_else() {
    let Some(folder) = qemu::folder() else { return };
    let bytes = sample(folder.path(), "cluster_size=64k");
    let path = folder.path().join("hostile.qcow2");
    let l1 = field(&bytes, 40) as usize;
    let l2 = (field(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let file = bytes.len() as u64;
    let entries = [
        0,
        1,
        l1 as u64,
        l2 as u64,
        1 << 63,
        1 << 63 | l2 as u64,
        (file + 65536) & !0xffff,
        (1 << 56) - 65536,
        1 << 62,
        1 << 62 | l2 as u64,
        1 << 62 | 0xff << 54 | 1,
        1 << 62 | 0xff << 54 | (file - 1),
        1 << 62 | 0x3f_ffff_ffff_ffff,
        u64::MAX,
    ];
    for entry in entries {
        for at in [l1, l2, l2 + 8] {
            let mut bytes = bytes.clone();
            bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
            std::fs::write(&path, bytes).unwrap();
            for sync in [false, true] {
                read_all(&path, sync);
            }
        }
    }
}

#[test]
fn an_error_in_one_place_leaves_the_rest_readable() {
    let Some(folder) = qemu::folder() else { return };
    let mut bytes = sample(folder.path(), "cluster_size=64k");
    let path = folder.path().join("hostile.qcow2");
    let l1 = field(&bytes, 40) as usize;
    let l2 = (field(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    // A reserved bit, and a compressed cluster that is none.
    bytes[l2 + 16..l2 + 24].copy_from_slice(&(1_u64 << 60).to_be_bytes());
    bytes[l2 + 24..l2 + 32].copy_from_slice(&(1_u64 << 62 | 104).to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    let mut engine = Engine::open(&options(&path)).unwrap();
    let corrupt = engine.read(2 << 16, 512).unwrap_err();
    assert_eq!(corrupt.raw_os_error(), Some(libc::EIO));
    let broken = engine.read(3 << 16, 512).unwrap_err();
    assert_eq!(broken.kind(), io::ErrorKind::InvalidData);
    assert_eq!(engine.read(1 << 16, 512).unwrap(), vec![3; 512]);
    assert_eq!(engine.read(MIB, 4096).unwrap(), vec![5; 4096]);
    engine.read(0, 8 << 16).unwrap_err();
    // One bad request does not spoil those beside it.
    for tag in 0..8 {
        engine.push(tag, u64::from(tag) << 16, 512, 0);
    }
    for completion in engine.finish() {
        let bad = [2, 3].contains(&completion.tag);
        assert_eq!(completion.result.is_err(), bad, "{}", completion.tag);
    }
}

#[test]
fn a_truncated_image_is_refused_or_fails() {
    let Some(folder) = qemu::folder() else { return };
    let bytes = sample(folder.path(), "cluster_size=64k");
    let path = folder.path().join("hostile.qcow2");
    for len in [
        0, 1, 71, 72, 103, 104, 511, 512, 65536, 196_608, 196_616, 262_144, 300_000,
    ] {
        std::fs::write(&path, &bytes[..len.min(bytes.len())]).unwrap();
        read_all(&path, false);
    }
    std::fs::write(&path, &bytes[..71]).unwrap();
    assert!(refusal(&options(&path)).contains("ends within its header"));
}

#[test]
fn mutated_images_never_panic() {
    let Some(folder) = qemu::folder() else { return };
    let samples: Vec<Vec<u8>> = [
        "cluster_size=512",
        "cluster_size=64k,compression_type=zstd",
        "extended_l2=on,cluster_size=16k",
    ]
    .map(|options| sample(folder.path(), options))
    .into();
    let path = folder.path().join("hostile.qcow2");
    let place = prop_oneof![
        2 => (Just(0), 0_usize..128),
        1 => (Just(1), 0_usize..64),
        4 => (Just(2), 0_usize..512),
        2 => (Just(3), any::<usize>()),
    ];
    let changes = prop::collection::vec((place, any::<u8>()), 1..8);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(
            &(0_usize..3, changes, any::<bool>()),
            |(sample, changes, sync)| {
                let mut bytes = samples[sample].clone();
                let l1 = field(&bytes, 40) as usize;
                let l2 = (field(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
                for ((area, offset), value) in changes {
                    let base = [0, l1, l2, 0][area];
                    let at = base.wrapping_add(offset) % bytes.len();
                    bytes[at] = value;
                }
                std::fs::write(&path, bytes).unwrap();
                read_all(&path, sync);
                Ok(())
            },
        )
        .unwrap();
}

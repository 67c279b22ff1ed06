//! The same random commands for qemu-io and for `ballast disk io`, on copies of an image of each
//! kind; the copies change hands after each batch, and are snapshotted, resized and opened anew.
//!
//! `scripts/soak` has more of it done, with other seeds.

use std::path::Path;

use super::tools::{disk, folder, img, run};

const KIB: u64 = 1 << 10;

/// A small generator, so that a failure comes again.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)) % limit
    }

    fn chance(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }
}

fn wanted(variable: &str, default: u64) -> u64 {
    let value = std::env::var(variable).ok();
    value.map_or(default, |value| value.parse().unwrap())
}

/// What is asked for at random: mostly nearby, so that one thing meets another.
fn command(random: &mut Random, size: u64, cluster: u64, subclusters: bool) -> String {
    let unit = [1, 512, 4 * KIB, cluster][random.below(4) as usize];
    let length = (1 + random.below(9)) * unit;
    let length = if random.chance(30) {
        40 * cluster
    } else {
        length
    };
    let length = length.min(size / 2).min(256 * KIB + cluster);
    let offset = random.below(size - length) / unit * unit;
    let pattern = random.below(4);
    match random.below(40) {
        0 => "flush".into(),
        1 => "reopen".into(),
        // QEMU does nothing about a few subclusters; we give them back.
        2..=4 if subclusters && !(offset | length).is_multiple_of(cluster) => "flush".into(),
        2..=4 => format!("discard {offset} {length}"),
        5 | 6 => format!("write -z {offset} {length}"),
        7 | 8 => format!("write -z -u {offset} {length}"),
        9 | 10 => format!("write -f -P {pattern} {offset} {length}"),
        11..=14 => format!("aio_write -P {pattern} {offset} {length}"),
        15 | 16 => "aio_flush".into(),
        17 => format!("writev -P {pattern} {offset} {length} 512"),
        18..=27 => format!("read -P {pattern} {offset} {length}"),
        _ => format!("write -P {pattern} {offset} {length}"),
    }
}

/// What they say of reads that hold something else; the rest is times and sizes.
fn complaints(text: &str) -> Vec<&str> {
    let complaint = |line: &&str| !line.contains(" ops; ") && !line.contains(" bytes at offset ");
    text.lines().filter(complaint).collect()
}

/// `aio_write` is not waited for: whatever touches a range comes after `aio_flush`.
fn batch(mut next: impl FnMut() -> String, count: u64) -> Vec<String> {
    let mut commands = Vec::new();
    let mut waiting = false;
    while (commands.len() as u64) < count {
        let next = next();
        let asynchronous = next.starts_with("aio_write");
        if waiting {
            commands.push("aio_flush".into());
        }
        waiting = asynchronous;
        commands.push(next);
    }
    commands.push("aio_flush".into());
    commands
}

/// Requests that are under way together in the same few clusters, and do not overlap: each order in
/// which they are done gives the same.
fn burst(random: &mut Random, size: u64, cluster: u64) -> Vec<String> {
    let unit = (cluster / 16).max(512);
    let room = size.saturating_sub(3 * cluster).max(unit);
    let place = random.below(room / unit) * unit;
    let mut commands = Vec::new();
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for _ in 0..2 + random.below(14) {
        let start = place + random.below(2 * cluster / unit) * unit;
        let end = start + (1 + random.below(4) * random.below(5)) * unit;
        if end > size || taken.iter().any(|other| start < other.1 && other.0 < end) {
            continue;
        }
        taken.push((start, end));
        let what = match random.below(8) {
            0 => "-z".into(),
            1 => "-z -u".into(),
            pattern => format!("-P {pattern}"),
        };
        commands.push(format!("aio_write {what} {start} {}", end - start));
    }
    commands.push("aio_flush".into());
    commands
}

fn exercise(folder: &Path, options: &str, seed: u64, batches: u64) {
    const COUNT: u64 = 100;
    let mut random = Random(seed);
    let cluster = options
        .split(',')
        .find_map(|option| option.strip_prefix("cluster_size="))
        .map_or(64 * KIB, |size| size.parse().unwrap());
    let mut size = (64 * cluster).clamp(512 * KIB, 4096 * KIB);
    for image in ["theirs", "ours"] {
        let _ = std::fs::remove_file(folder.join(image));
        img(
            folder,
            &format!("create -q -f qcow2 -o {options} {image} {size}"),
        )
        .good();
    }
    let mut snapshots = 0;
    for number in 0..batches {
        let subclusters = options.contains("extended_l2=on");
        let mut commands = Vec::new();
        for _ in 0..4 {
            let next = || command(&mut random, size, cluster, subclusters);
            commands.extend(batch(next, COUNT / 4));
            commands.extend(burst(&mut random, size, cluster));
        }
        let mut said = Vec::new();
        for (program, first, image) in [
            ("qemu-io", &["-f", "qcow2"][..], "theirs"),
            (
                env!("CARGO_BIN_EXE_ballast"),
                &["disk", "io", "-f", "qcow2", "--backing-files"][..],
                "ours",
            ),
        ] {
            let mut arguments = first.to_vec();
            for command in &commands {
                arguments.extend(["-c", command]);
            }
            arguments.push(image);
            said.push(run(program, folder, &arguments));
        }
        let [theirs, ours] = &said[..] else { return };
        let what = format!("{options} seed {seed} batch {number}");
        assert_eq!(
            complaints(&theirs.out),
            complaints(&ours.out),
            "{what}: {commands:#?}"
        );
        assert_eq!(theirs.err, ours.err, "{what}: {commands:#?}");
        let compared = img(folder, "compare -f qcow2 -F qcow2 theirs ours");
        assert_eq!(compared.code, Some(0), "{what}: {compared:?} {commands:#?}");
        let checked = img(folder, "check -f qcow2 ours");
        assert_eq!(checked.code, Some(0), "{what}: {checked:?} {commands:#?}");
        if number % 8 == 0 {
            let checked = disk(folder, "check -f qcow2 ours");
            assert_eq!(checked.code, Some(0), "{what}: {checked:?}");
        }
        let both = |line: &str| {
            for image in ["theirs", "ours"] {
                img(folder, &format!("{line} {image}")).good();
            }
        };
        match random.below(8) {
            0 if !options.contains("refcount_bits=1") && snapshots < 4 => {
                snapshots += 1;
                both(&format!("snapshot -c s{snapshots}"));
            }
            1 if snapshots > 0 => {
                both(&format!("snapshot -a s{snapshots}"));
            }
            2 if snapshots > 0 => {
                both(&format!("snapshot -d s{snapshots}"));
                snapshots -= 1;
            }
            // Version 2 has neither sizes of snapshots nor zeroes over a backing file.
            3 if size < 6144 * KIB && snapshots == 0 && !options.contains("compat=0.10") => {
                size += random.below(64) * 4 * KIB;
                for image in ["theirs", "ours"] {
                    img(folder, &format!("resize -q -f qcow2 {image} {size}")).good();
                }
            }
            _ => {}
        }
        for (from, to) in [("theirs", "other"), ("ours", "theirs"), ("other", "ours")] {
            std::fs::rename(folder.join(from), folder.join(to)).unwrap();
        }
    }
    println!("{} commands", batches * COUNT);
}

#[test]
fn random_commands_leave_what_qemu_io_leaves() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    img(folder, "create -q -f raw noise 3M").good();
    for at in (0..3072).step_by(96) {
        let command = format!("write -P {} {at}k 64k", at / 96 % 4);
        run("qemu-io", folder, &["-f", "raw", "-c", &command, "noise"]).good();
    }
    img(folder, "convert -c -f raw -O qcow2 noise base").good();
    let batches = wanted("BALLAST_BATCHES", 2);
    let run = wanted("BALLAST_SEED", 0);
    println!("BALLAST_SEED={run}");
    for (number, options) in (1..).zip([
        "cluster_size=65536",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=4096,refcount_bits=64",
        "compat=0.10,cluster_size=4096",
        "cluster_size=2097152",
        "extended_l2=on,cluster_size=16384",
        "extended_l2=on,cluster_size=131072,lazy_refcounts=off",
        "backing_file=base,backing_fmt=qcow2",
        "backing_file=base,backing_fmt=qcow2,cluster_size=4096",
        "backing_file=noise,backing_fmt=raw,extended_l2=on,cluster_size=131072",
        "backing_file=noise,backing_fmt=raw,compat=0.10,cluster_size=8192",
    ]) {
        exercise(folder, options, run * 1000 + number, batches);
    }
}

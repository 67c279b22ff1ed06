//! What guests boot from (made by `scripts/guest`), and disk images.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;

/// A file `scripts/guest` makes; a missing one is a failure, never a reason to skip.
#[track_caller]
pub fn guest(name: &str) -> PathBuf {
    let folder = ["BALLAST_GUEST", "BALLAST_CACHE"]
        .iter()
        .find_map(std::env::var_os)
        .map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest"),
            PathBuf::from,
        );
    let path = folder.join(name);
    assert!(
        path.exists(),
        "{} is missing: run `scripts/guest all`",
        path.display()
    );
    path
}

/// An image of `size_bytes` zeros that occupies nothing yet.
pub fn empty_image(folder: &Path, name: &str, size_bytes: u64) -> PathBuf {
    let path = folder.join(name);
    let file = File::create(&path).expect("create an image");
    file.set_len(size_bytes).expect("size an image");
    path
}

/// An image of `size_bytes` whose every block is different and none is zero.
pub fn filled_image(folder: &Path, name: &str, size_bytes: u64) -> PathBuf {
    let path = folder.join(name);
    let mut file = File::create(&path).expect("create an image");
    let mut noise = Noise(size_bytes | 1);
    let mut block = vec![0; MIB as usize];
    let mut left = size_bytes as usize;
    while left > 0 {
        noise.fill(&mut block);
        let count = left.min(block.len());
        file.write_all(&block[..count]).expect("fill an image");
        left -= count;
    }
    path
}

/// Bytes without a pattern (xorshift), never zero.
pub struct Noise(pub u64);

impl Noise {
    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            let word = (self.0 | 0x0101_0101_0101_0101).to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

/// Copies an image without what is zero in it.
pub fn sparse_copy(from: &Path, to: &Path) {
    let mut source = File::open(from).expect("open an image");
    let size = source.seek(SeekFrom::End(0)).expect("its size");
    source.rewind().expect("rewind");
    let target = File::create(to).expect("create a copy");
    target.set_len(size).expect("size a copy");
    let mut block = vec![0; MIB as usize];
    let mut offset = 0;
    while offset < size {
        // Where the file system knows its holes, they need not be read.
        if let Ok(data) = rustix::fs::seek(&source, rustix::fs::SeekFrom::Data(offset)) {
            offset = data;
        } else if size > offset && is_hole_to_the_end(&source, offset) {
            break;
        } else {
            source.seek(SeekFrom::Start(offset)).expect("seek");
        }
        let count = source.read(&mut block).expect("read an image");
        if count == 0 {
            break;
        }
        if block[..count].iter().any(|byte| *byte != 0) {
            target
                .write_all_at(&block[..count], offset)
                .expect("write a copy");
        }
        offset += count as u64;
    }
}

fn is_hole_to_the_end(file: &File, offset: u64) -> bool {
    rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) == Err(rustix::io::Errno::NXIO)
}

/// Bytes the file occupies on the host.
pub fn occupied_bytes(path: &Path) -> u64 {
    fs::metadata(path).expect("its metadata").blocks() * 512
}

//! Compressed clusters.
//!
//! The input is as hostile as the image: the output is never more than a cluster, and the decoder's
//! memory is bounded by the cap on a zstd frame's window.

use std::io::{self, Read};

use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::super::buffers::Buffers;
use super::header::Compression;
use super::map::{Compressed, Layout};

/// Four times the longest cluster; no encoder asks for more than the content has.
const MAX_WINDOW: u64 = 8 << 20;

/// The input does not decompress to a whole cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Broken;

/// Keeps its working memory between clusters.
#[derive(Default)]
struct Decompressor {
    inflate: Option<Box<DecompressorOxide>>,
    zstd: Option<Box<FrameDecoder>>,
}

impl Decompressor {
    /// Fills `cluster` from the front of `input`; what follows there is of no interest.
    fn run(&mut self, kind: Compression, input: &[u8], cluster: &mut [u8]) -> Result<(), Broken> {
        match kind {
            Compression::Zlib => self.zlib(input, cluster),
            Compression::Zstd => self.zstd(input, cluster),
        }
    }

    fn zlib(&mut self, input: &[u8], cluster: &mut [u8]) -> Result<(), Broken> {
        let decoder = self.inflate.get_or_insert_default();
        decoder.init();
        let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        // Its status does not matter: as in QEMU, a stream may go on beyond the cluster.
        let (_, _, written) = decompress(decoder, input, cluster, 0, flags);
        match written == cluster.len() {
            true => Ok(()),
            false => Err(Broken),
        }
    }

    fn zstd(&mut self, mut input: &[u8], cluster: &mut [u8]) -> Result<(), Broken> {
        let decoder = self.zstd.get_or_insert_with(|| {
            let mut decoder = FrameDecoder::new();
            decoder.set_max_window_size(MAX_WINDOW);
            Box::new(decoder)
        });
        decoder.reset(&mut input).map_err(|_| Broken)?;
        let mut done = 0;
        while done < cluster.len() {
            // A block has at most 128 KiB, and takes at least three bytes of the input.
            let one = BlockDecodingStrategy::UptoBlocks(1);
            let finished = decoder.decode_blocks(&mut input, one).map_err(|_| Broken)?;
            done += drain(decoder, &mut cluster[done..])?;
            if finished {
                break;
            }
        }
        match done == cluster.len() {
            true => Ok(()),
            false => Err(Broken),
        }
    }
}

/// The cluster that was decompressed last, for requests smaller than it.
#[derive(Default)]
pub struct Inflated {
    name: Option<(u16, Compressed)>,
    bytes: Vec<u8>,
    decompressor: Decompressor,
}

impl Inflated {
    /// Whether it is this cluster of this layer.
    pub fn holds(&self, name: (u16, Compressed)) -> bool {
        self.name == Some(name)
    }

    /// Forgets it: its place in the file may come to hold something else.
    pub fn forget(&mut self) {
        self.name = None;
    }

    /// Decompresses another one.
    pub fn fill(
        &mut self,
        name: (u16, Compressed),
        layout: &Layout,
        input: &[u8],
    ) -> io::Result<()> {
        self.name = None;
        self.bytes.resize(layout.cluster_bytes(), 0);
        self.decompressor
            .run(layout.compression, input, &mut self.bytes)
            .map_err(|Broken| {
                io::Error::new(io::ErrorKind::InvalidData, "a broken compressed cluster")
            })?;
        self.name = Some(name);
        Ok(())
    }

    /// The same, into memory that is nobody else's.
    pub fn copy_to(&self, within: usize, target: &mut [u8]) {
        let bytes = self.bytes.get(within..).unwrap_or(&[]);
        let len = bytes.len().min(target.len());
        target[..len].copy_from_slice(&bytes[..len]);
    }

    /// Copies what is from byte `within` of it on.
    pub fn copy(&self, within: usize, buffers: &Buffers) {
        buffers.copy_from(self.bytes.get(within..).unwrap_or(&[]));
    }
}

fn drain(decoder: &mut FrameDecoder, target: &mut [u8]) -> Result<usize, Broken> {
    let mut done = 0;
    while done < target.len() {
        match decoder.read(&mut target[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(_) => return Err(Broken),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_not_a_whole_cluster_is_refused() {
        let mut decompressor = Decompressor::default();
        let mut cluster = [0; 4096];
        for kind in [Compression::Zlib, Compression::Zstd] {
            for input in [&[][..], &[0; 100], &[0xff; 100]] {
                assert_eq!(decompressor.run(kind, input, &mut cluster), Err(Broken));
            }
        }
        // A stored block of five bytes.
        let short = [1, 5, 0, 0xfa, 0xff, 1, 2, 3, 4, 5];
        let run = decompressor.run(Compression::Zlib, &short, &mut cluster);
        assert_eq!(run, Err(Broken));
        let run = decompressor.run(Compression::Zlib, &short, &mut cluster[..5]);
        assert_eq!(run, Ok(()));
        assert_eq!(cluster[..5], [1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_bomb_goes_off_within_one_cluster() {
        // zstd: magic, single segment of 2^32 - 1 bytes content, RLE blocks of 128 KiB.
        let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0xff, 0xff, 0xff, 0xff];
        bomb.extend([0x02, 0, 0x10, 0xaa].repeat(1000));
        let mut cluster = vec![0; 65536];
        let run = Decompressor::default().run(Compression::Zstd, &bomb, &mut cluster);
        assert_eq!(run, Err(Broken), "its window is too large");
        // The same with a window of 1 MiB.
        bomb.splice(4..9, [0x00, 0x50]);
        let run = Decompressor::default().run(Compression::Zstd, &bomb, &mut cluster);
        assert!(run == Err(Broken) || cluster == vec![0xaa; 65536]);
    }

    proptest! {
        #[test]
        fn no_input_panics(
            frame: bool,
            bytes in prop::collection::vec(any::<u8>(), 0..2000),
            zstd: bool,
        ) {
            let mut input = bytes;
            if frame {
                let header = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x50];
                input.splice(0..0, header);
            }
            let kind = if zstd { Compression::Zstd } else { Compression::Zlib };
            let mut decompressor = Decompressor::default();
            let mut cluster = vec![0; 16384];
            let _ = decompressor.run(kind, &input, &mut cluster);
            let _ = decompressor.run(kind, &input, &mut cluster);
        }
    }
}

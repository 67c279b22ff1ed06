//! A guest that uses its disk at random, and checks what it reads.

use super::driver::Driver;
use super::{DATA, OK};
use crate::disk::qcow2::tests::qemu::Random;

/// A guest that does one request after the other, and knows what is on its disk.
pub struct Guest<'a> {
    pub driver: &'a mut Driver,
    /// What is on its disk.
    pub model: Vec<u8>,
    pub random: Random,
}

impl Guest<'_> {
    /// Sends a request and waits for it.
    pub fn send(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) {
        let (status, _) = self.driver.send(kind, sector, data);
        assert_eq!(status, OK, "{kind} at {sector}");
    }

    fn read(&mut self, sector: u64, len: usize) -> Vec<u8> {
        self.send(0, sector, &[(DATA, len as u32, true)]);
        self.driver.peek(DATA, len)
    }

    fn range(&mut self, kind: u32, sector: u64, sectors: u64, flags: u32) {
        let mut segment = [0; 16];
        segment[..8].copy_from_slice(&sector.to_le_bytes());
        segment[8..12].copy_from_slice(&(sectors as u32).to_le_bytes());
        segment[12..].copy_from_slice(&flags.to_le_bytes());
        self.driver.poke(DATA, &segment);
        self.send(kind, 0, &[(DATA, 16, false)]);
    }

    /// One at random; in units of so many sectors.
    pub fn step(&mut self, unit: u64) {
        let total = self.model.len() as u64 / 512 / unit;
        let longest = [1, 8, 64][self.random.below(3) as usize];
        let sector = self.random.below(total);
        let count = (1 + self.random.below(longest)).min(total - sector) * unit;
        let sector = sector * unit;
        let range = sector as usize * 512..(sector + count) as usize * 512;
        match self.random.below(32) {
            0 => self.send(4, 0, &[]),
            1..=4 => {
                self.range(11, sector, count, 0);
                // What it then holds is not promised, but that it stays so.
                let bytes = self.read(sector, range.len());
                let pairs = bytes.iter().zip(&self.model[range.clone()]);
                let sane = pairs.fold(true, |sane, (is, was)| sane && (*is == 0 || is == was));
                assert!(sane, "a discard at {sector}");
                self.model[range].copy_from_slice(&bytes);
            }
            5..=8 => {
                let flags = self.random.below(2) as u32;
                self.range(13, sector, count, flags);
                self.model[range].fill(0);
            }
            9..=14 => {
                let bytes = self.read(sector, range.len());
                assert!(bytes == self.model[range], "at sector {sector}");
            }
            _ => {
                let word = (self.random.below(u64::MAX >> 1) | 1 << 63).to_le_bytes();
                let bytes: Vec<u8> = word.iter().copied().cycle().take(range.len()).collect();
                self.driver.poke(DATA, &bytes);
                self.send(1, sector, &[(DATA, bytes.len() as u32, false)]);
                self.model[range].copy_from_slice(&bytes);
            }
        }
    }
}

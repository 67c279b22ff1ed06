//! Reading what the driver sends: page numbers, free ranges, statistics (virtio 1.3 §5.5.6).
//!
//! Addresses and lengths are the guest's. Each request is copied once, by a checked copy into a
//! buffer of fixed size; what does not fit or does not lie in memory is counted and left out.

use std::ops::Range;

use vm_memory::Bytes;

use super::pages::{PAGE, Pages};
use crate::guest_memory::GuestRam;
use crate::virtio::queue::Chain;

/// Page numbers of one request that are looked at (64 MiB); Linux sends 256.
const MAX_PAGES: usize = 16384;
/// Descriptors of one request that are looked at.
const MAX_DESCRIPTORS: usize = 256;

/// The buffer that requests are copied to.
pub struct Scratch(Box<[u8]>);

impl Default for Scratch {
    fn default() -> Self {
        Self(vec![0; MAX_PAGES * 4].into_boxed_slice())
    }
}

impl Scratch {
    /// Copies at most `most` bytes of a chain's device-readable parts; says how many bytes were
    /// left out as well.
    fn copy(&mut self, chain: Chain, memory: &GuestRam, most: usize) -> (&[u8], u64) {
        let mut filled = 0;
        let mut left_out = 0;
        let most = most.min(self.0.len());
        for descriptor in chain.take(MAX_DESCRIPTORS) {
            if descriptor.is_write_only() {
                continue;
            }
            let wanted = descriptor.len() as usize;
            let len = wanted.min(most - filled);
            let to = &mut self.0[filled..filled + len];
            if memory.read_slice(to, descriptor.addr()).is_ok() {
                filled += len;
                left_out += (wanted - len) as u64;
            } else {
                left_out += wanted as u64;
            }
        }
        (&self.0[..filled], left_out)
    }

    /// Adds the page numbers of a request to `pages`; says how many bytes of memory those stand
    /// for that were left out.
    pub fn read_pages(&mut self, chain: Chain, memory: &GuestRam, pages: &mut Pages) -> u64 {
        let most = self.0.len();
        let (bytes, left_out) = self.copy(chain, memory, most);
        pages.extend_from_bytes(bytes);
        left_out / 4 * PAGE
    }

    /// The bytes of a buffer of statistics, `most` at most.
    pub fn read_statistics(&mut self, chain: Chain, memory: &GuestRam, most: usize) -> &[u8] {
        self.copy(chain, memory, most).0
    }
}

/// Adds the free ranges of a report to `ranges`: they are the buffers themselves, which the
/// device could write.
pub fn read_report(chain: Chain, ranges: &mut Vec<Range<u64>>) {
    for descriptor in chain.take(MAX_DESCRIPTORS) {
        let start = descriptor.addr().0;
        let end = start.saturating_add(descriptor.len().into());
        // Whole pages only: the rest of a page is not said to be free.
        let start = start.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        let end = end / PAGE * PAGE;
        if descriptor.is_write_only() && start < end {
            ranges.push(start..end);
        }
    }
}

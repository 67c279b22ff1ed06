//! Writing an image while somebody else reads it as the backing file of another, with tables of
//! their own in memory, and only where that one hides it.
//!
//! The reader has the L1 table as it was, and reads the L2 tables that it names, and the clusters
//! that these name, at any time. All of that stays as it is:
//!
//! ```text
//!   L2 tables of the beginning ── never written to: a copy takes the place of one that must change
//!   clusters that lose their last reference ── keep it, and are neither punched nor used again
//!   clusters that are written in place ── only where the reader does not look
//! ```
//!
//! So the reader sees the image as it was wherever it looks, without a lock, and never the half of
//! an entry. What was given up are leaks, which are searched for when the image is next opened to
//! be written to (see [`super::leaks`]).

use super::cluster::COPIED;
use super::engine::Engine;

/// L2 tables that somebody reads, by their index in the L1 table.
pub struct Kept(Vec<u64>);

impl Kept {
    /// All that an L1 table names.
    pub fn of(l1: &[u64]) -> Self {
        let word = |entries: &[u64]| {
            let numbered = (0..).zip(entries);
            numbered.fold(0, |word, (bit, entry)| {
                word | u64::from(entry & COPIED != 0) << bit
            })
        };
        Self(l1.chunks(64).map(word).collect())
    }

    /// Whether the table with this index is one of them.
    pub fn has(&self, index: usize) -> bool {
        let word = self.0.get(index / 64);
        word.is_some_and(|word| word >> (index % 64) & 1 != 0)
    }

    /// There is another in its place.
    pub fn replaced(&mut self, index: usize) {
        if let Some(word) = self.0.get_mut(index / 64) {
            *word &= !(1 << (index % 64));
        }
    }
}

impl Engine {
    /// These clusters have lost a reference, for good; one that has only one left keeps it. With
    /// `allocating` held.
    pub async fn unreference_shared(&self, clusters: Vec<u64>) {
        let widths = self.widths;
        for offset in clusters {
            let Some((page, index)) = self.refcount_page(offset >> self.layout.cluster_bits) else {
                continue;
            };
            let changed = self.change_refcounts(page, |page| {
                let count = widths.get(page, index);
                (count > 1).then(|| widths.set(page, index, count - 1))
            });
            if let Err(error) = changed.await {
                // They leak, which `qemu-img check -r leaks` repairs.
                tracing::warn!(%error, "clusters of a qcow2 image leak");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_that_were_there_are_kept_until_they_are_replaced() {
        let mut l1 = vec![0; 130];
        for index in [0, 63, 64, 129] {
            l1[index] = COPIED | 0x10000;
        }
        // Shared with a snapshot: never written to anyhow.
        l1[1] = 0x20000;
        let mut kept = Kept::of(&l1);
        let all = |kept: &Kept| (0..200).filter(|i| kept.has(*i)).collect::<Vec<_>>();
        assert_eq!(all(&kept), [0, 63, 64, 129]);
        kept.replaced(64);
        kept.replaced(500);
        assert_eq!(all(&kept), [0, 63, 129]);
    }
}

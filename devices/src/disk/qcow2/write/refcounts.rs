//! Refcounts of 1 to 64 bits in the bytes of a refcount block (qcow2.txt, "Host cluster
//! management").

/// How an image stores refcounts.
#[derive(Clone, Copy, Debug)]
pub struct Widths {
    /// A refcount has 2 to the power of this many bits.
    pub order: u32,
    /// A cluster has 2 to the power of this many bytes.
    pub cluster_bits: u32,
}

impl Widths {
    /// How many refcounts a block has.
    pub fn per_block(self) -> u64 {
        1 << (self.cluster_bits + 3 - self.order)
    }

    /// In which block the refcount of a cluster is, and which one of it.
    pub fn place(self, cluster: u64) -> (u64, u64) {
        (cluster / self.per_block(), cluster % self.per_block())
    }

    /// How many refcounts `bytes` bytes hold.
    pub fn in_bytes(self, bytes: usize) -> u64 {
        ((bytes as u64) << 3) >> self.order
    }

    /// Refcount number `index` of these bytes; 0 beyond them.
    pub fn get(self, bytes: &[u8], index: u64) -> u64 {
        let Some(field) = self.field(bytes.len(), index) else {
            return 0;
        };
        if self.order < 3 {
            let shift = (index << self.order) & 7;
            let mask = (1_u64 << (1 << self.order)) - 1;
            return u64::from(bytes[field.start]) >> shift & mask;
        }
        bytes[field]
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// Sets one; the value fits, or is cut.
    pub fn set(self, bytes: &mut [u8], index: u64, value: u64) {
        let Some(field) = self.field(bytes.len(), index) else {
            return;
        };
        if self.order < 3 {
            let shift = (index << self.order) & 7;
            let mask = ((1_u64 << (1 << self.order)) - 1) << shift;
            let byte = &mut bytes[field.start];
            *byte = (u64::from(*byte) & !mask | (value << shift & mask)) as u8;
            return;
        }
        let len = field.len();
        let value = value.to_be_bytes();
        bytes[field].copy_from_slice(&value[8 - len..]);
    }

    fn field(self, len: usize, index: u64) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(index.checked_shl(self.order)? >> 3).ok()?;
        let bytes = (1_usize << self.order).div_ceil(8);
        (start.checked_add(bytes)? <= len).then(|| start..start + bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let widths = Widths {
                order,
                cluster_bits: 9,
            };
            let mut bytes = vec![0; 512];
            let count = widths.per_block();
            assert_eq!(count, widths.in_bytes(512));
            let most = u64::MAX >> (64 - (1 << order));
            let value = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15)) & most;
            for i in 0..count {
                widths.set(&mut bytes, i, value(i));
            }
            for i in 0..count {
                assert_eq!(widths.get(&bytes, i), value(i), "{order} {i}");
            }
            assert_eq!(widths.get(&bytes, count), 0);
            widths.set(&mut bytes, count, 1);
        }
    }

    #[test]
    fn narrow_ones_begin_at_the_lowest_bit_and_wide_ones_are_big_endian() {
        let mut bytes = [0; 8];
        let widths = |order| Widths {
            order,
            cluster_bits: 9,
        };
        widths(0).set(&mut bytes, 1, 1);
        assert_eq!(bytes[0], 2);
        widths(4).set(&mut bytes, 1, 0x102);
        assert_eq!(bytes[2..4], [1, 2]);
    }
}

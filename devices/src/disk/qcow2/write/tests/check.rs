//! A checker of its own: what `qemu-img check` looks for, in memory, and what the disk then holds.

use super::super::super::decompress::Inflated;
use super::super::super::header::Header;
use super::super::super::map::{Layout, OFFSET};
use super::super::cluster::{Cluster, Host};
use super::super::refcounts::Widths;
use super::sim::Files;

/// An image in memory.
pub struct Image<'a> {
    bytes: &'a [u8],
    /// The external data file, as far as it is known.
    data: &'a [u8],
    header: Header,
    layout: Layout,
}

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = at as usize;
    match bytes.get(at..at + 8) {
        Some(word) => u64::from_be_bytes(word.try_into().unwrap()),
        None => 0,
    }
}

/// What an image is made from: its bytes, and maybe its data file.
pub trait Source<'a> {
    fn parts(self) -> (&'a [u8], &'a [u8]);
}

impl<'a> Source<'a> for &'a Vec<u8> {
    fn parts(self) -> (&'a [u8], &'a [u8]) {
        (self, &[])
    }
}

impl<'a> Source<'a> for &'a [u8] {
    fn parts(self) -> (&'a [u8], &'a [u8]) {
        (self, &[])
    }
}

impl<'a> Source<'a> for &'a Files {
    fn parts(self) -> (&'a [u8], &'a [u8]) {
        (&self.image, &self.data)
    }
}

impl<'a> Image<'a> {
    pub fn new(source: impl Source<'a>) -> Self {
        let (bytes, data) = source.parts();
        let header = Header::parse(bytes).unwrap();
        assert!(!header.corrupt && !header.writing.dirty);
        let layout = Layout::new(&header);
        Self {
            bytes,
            data,
            header,
            layout,
        }
    }

    fn entries(&self, table: u64) -> impl Iterator<Item = Cluster> {
        let cluster = self.layout.cluster_bytes();
        let mut slice = vec![0; cluster];
        let start = (table as usize).min(self.bytes.len());
        let end = (start + cluster).min(self.bytes.len());
        slice[..end - start].copy_from_slice(&self.bytes[start..end]);
        let layout = self.layout;
        (0..cluster >> layout.entry_bits).map(move |index| {
            Cluster::read(&layout, &slice, index)
                .unwrap_or_else(|_| panic!("entry {index} of the L2 table at {table:#x}"))
        })
    }

    /// Size of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.header.size_bytes
    }

    /// Panics unless all is well or leaks; returns how many clusters leak.
    pub fn check(&self) -> u64 {
        let bits = self.layout.cluster_bits;
        let writing = &self.header.writing;
        let clusters = self.bytes.len().div_ceil(1 << bits) as u64;
        let mut counted = vec![0_u64; clusters as usize + 1];
        let mut count = |what: &str, offset: u64, len: u64| {
            assert!(
                offset >> bits < clusters,
                "{what} at {offset:#x} is beyond the end"
            );
            let last = (offset + len.max(1) - 1) >> bits;
            for cluster in offset >> bits..=last {
                counted[cluster as usize] += 1;
            }
        };
        let cluster = 1_u64 << bits;
        count("the header", 0, cluster);
        let table_bytes = u64::from(writing.refcount_table_clusters) * cluster;
        let table = writing.refcount_table_offset;
        count("the refcount table", table, table_bytes);
        let blocks: Vec<u64> = (0..table_bytes / 8)
            .map(|index| word(self.bytes, table + index * 8))
            .collect();
        for block in blocks.iter().filter(|block| **block != 0) {
            count("a refcount block", *block, cluster);
        }
        let mut l1_tables = vec![(self.header.l1_offset, writing.l1_table_entries as u64, true)];
        let snapshots = u32::from_be_bytes(self.bytes[60..64].try_into().unwrap());
        let mut at = writing.snapshots_offset;
        for _ in 0..snapshots {
            let l1_entries = word(self.bytes, at + 8) >> 32;
            l1_tables.push((word(self.bytes, at), l1_entries, false));
            let half = |o: u64| {
                let o = (at + o) as usize;
                u64::from(u16::from_be_bytes(self.bytes[o..o + 2].try_into().unwrap()))
            };
            let extra = word(self.bytes, at + 32) & 0xffff_ffff;
            at = (at + 40 + extra + half(12) + half(14)).next_multiple_of(8);
        }
        if snapshots > 0 {
            let len = at - writing.snapshots_offset;
            count("the snapshot table", writing.snapshots_offset, len);
        }
        let mut owned = Vec::new();
        for (l1, entries, active) in l1_tables {
            count("an L1 table", l1, entries * 8);
            for index in 0..entries {
                let entry = word(self.bytes, l1 + index * 8);
                let table = entry & OFFSET;
                if table == 0 {
                    continue;
                }
                count("an L2 table", table, cluster);
                if active && entry >> 63 != 0 {
                    owned.push(table);
                }
                for (number, cluster) in (0..).zip(self.entries(table)) {
                    match cluster.host {
                        Host::None => {}
                        Host::Owned(host) if self.layout.external => {
                            let entries = 1 << (bits - self.layout.entry_bits);
                            assert_eq!(host, (index * entries + number) << bits);
                        }
                        Host::Owned(host) => {
                            count("data", host, 1 << bits);
                            if active {
                                owned.push(host);
                            }
                        }
                        Host::Shared(host) => count("shared data", host, 1 << bits),
                        Host::Compressed(c) => count("compressed", c.offset, c.len as u64),
                    }
                }
            }
        }
        let widths = Widths {
            order: writing.refcount_order,
            cluster_bits: bits,
        };
        let mut leaks = 0;
        for (cluster, counted) in counted.iter().enumerate() {
            let (block, index) = widths.place(cluster as u64);
            let start = blocks.get(block as usize).copied().unwrap_or(0) as usize;
            let stored = match start {
                0 => 0,
                _ => {
                    let end = (start + (1 << bits)).min(self.bytes.len());
                    widths.get(&self.bytes[start.min(end)..end], index)
                }
            };
            assert!(
                stored >= *counted,
                "cluster {cluster}: {stored} < {counted}"
            );
            leaks += u64::from(stored > *counted);
        }
        for host in owned {
            assert_eq!(
                counted[(host >> bits) as usize],
                1,
                "{host:#x} is not owned"
            );
        }
        if self.header.data.as_ref().is_some_and(|data| data.raw) && !self.data.is_empty() {
            self.check_raw();
        }
        leaks
    }

    /// The data file alone is the disk.
    fn check_raw(&self) {
        assert!(
            self.data.len() as u64 >= self.header.size_bytes,
            "it is cut short"
        );
        for (number, sector) in self.content(&[]).iter().enumerate() {
            let raw = &self.data[number * 512..][..512];
            assert!(raw == sector.unwrap(), "sector {number} is not the same");
        }
    }

    /// Whether a bitmap, say, is still taken to tell the truth.
    pub fn has_autoclear(&self) -> bool {
        let raw = self.header.data.as_ref().is_some_and(|data| data.raw);
        self.header.writing.autoclear & !(u64::from(raw) << 1) != 0
    }

    /// What the disk holds, over `backing`; `None` where a compressed cluster is broken.
    pub fn content(&self, backing: &[u8]) -> Vec<Option<[u8; 512]>> {
        let layout = &self.layout;
        let unit = layout.unit_bytes();
        let table_span =
            (1_u64 << layout.cluster_bits) << (layout.cluster_bits - layout.entry_bits);
        let sector = |file: &[u8], at: u64| {
            let mut bytes = [0; 512];
            let start = (at as usize).min(file.len());
            let end = (start + 512).min(file.len());
            bytes[..end - start].copy_from_slice(&file[start..end]);
            Some(bytes)
        };
        let mut inflated = Inflated::default();
        let mut content = Vec::new();
        let mut position = 0;
        while position < self.header.size_bytes {
            let l1 = self.header.l1_offset + position / table_span * 8;
            let table = word(self.bytes, l1) & OFFSET;
            let clusters: Vec<Cluster> = match table {
                0 => vec![Cluster::ABSENT; (table_span >> layout.cluster_bits) as usize],
                _ => self.entries(table).collect(),
            };
            let end = (position + table_span).min(self.header.size_bytes);
            while position < end {
                let within = position & ((1 << layout.cluster_bits) - 1);
                let index = (position % table_span) >> layout.cluster_bits;
                let cluster = &clusters[index as usize];
                let bit = 1_u32 << (within / unit);
                content.push(match cluster.host {
                    Host::Compressed(data) => {
                        let name = (0, data);
                        let end = (data.offset as usize + data.len).min(self.bytes.len());
                        let input = self.bytes.get(data.offset as usize..end).unwrap_or(&[]);
                        let whole =
                            inflated.holds(name) || inflated.fill(name, layout, input).is_ok();
                        let mut bytes = [0; 512];
                        inflated.copy_to(within as usize, &mut bytes);
                        whole.then_some(bytes)
                    }
                    Host::Owned(host) | Host::Shared(host) if cluster.data & bit != 0 => {
                        let file = match self.layout.external {
                            true => self.data,
                            false => self.bytes,
                        };
                        sector(file, host + within)
                    }
                    _ if cluster.zero & bit != 0 => Some([0; 512]),
                    _ => sector(backing, position),
                });
                position += 512;
            }
        }
        content
    }
}

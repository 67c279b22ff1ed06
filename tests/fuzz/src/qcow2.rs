//! Sound qcow2 images of all kinds, made by hand, and what may be changed in them.

use arbitrary::{Arbitrary, Unstructured};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// What an image shall be.
#[derive(Arbitrary, Debug)]
pub struct Shape {
    cluster: u8,
    extended: bool,
    version_2: bool,
    refcount_order: u8,
    sectors: u16,
    lazy: bool,
    zstd: bool,
    bitmap: bool,
    snapshot: bool,
    backing: bool,
    entries: Vec<(u8, Kind)>,
}

/// What is said of a cluster of the disk.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Data(u64),
    Zero,
    ZeroAllocated,
    Compressed(Fill),
}

/// How its compressed bytes are made.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Fill {
    /// One that holds these bytes.
    Sound(u8),
    /// Whatever the bytes decompress to.
    Bytes([u8; 8]),
}

/// Where in the image something is changed.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Area {
    Header,
    RefcountTable,
    RefcountBlock,
    L1,
    L2,
    SecondL2,
    Snapshots,
    SnapshotL1,
    Bitmaps,
    BitmapTable,
    Data,
    Anywhere,
}

/// What is put there.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Value {
    Byte(u8),
    Half(u16),
    Word(u32),
    Long(u64),
    /// A cluster of the file, and the flags of an entry.
    Cluster(u8, u8),
    Bit(u8),
}

/// A change to an image.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Change {
    area: Area,
    at: u16,
    value: Value,
}

/// A few changes at most: an image in which everything is wrong is refused at once.
#[derive(Debug)]
pub struct Changes(pub Vec<Change>);

impl<'a> Arbitrary<'a> for Changes {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let count = u.int_in_range(0..=6_u8)?;
        let changes = (0..count).map(|_| u.arbitrary());
        Ok(Self(changes.collect::<Result<_, _>>()?))
    }
}

/// An image, and where its parts begin.
pub struct Built {
    /// The file.
    pub bytes: Vec<u8>,
    /// Bytes of a cluster.
    pub cluster: usize,
    /// The L1 table of its snapshot, and how many entries that has.
    pub snapshot: Option<(u64, u32)>,
    /// Whether there is a persistent bitmap.
    pub has_bitmap: bool,
    /// Whether a change was made to what holds its refcounts.
    pub refcounts_changed: bool,
    areas: [usize; 12],
}

/// A file in the making.
struct Builder {
    bytes: Vec<u8>,
    cluster: usize,
    refcounts: Vec<u64>,
}

impl Builder {
    fn allocate(&mut self, bytes: usize, references: u64) -> usize {
        let at = self.bytes.len();
        let clusters = bytes.div_ceil(self.cluster).max(1);
        self.bytes.resize(at + clusters * self.cluster, 0);
        for _ in 0..clusters {
            self.refcounts.push(references);
        }
        at
    }

    fn put(&mut self, at: usize, value: &[u8]) {
        put(&mut self.bytes, at, value);
    }

    fn word(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_be_bytes());
    }
}

/// Writes what there is room for.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(value) {
        *to = *from;
    }
}

impl Shape {
    /// Bytes of the disk.
    pub fn disk(&self) -> usize {
        (usize::from(self.sectors) % 1024 + 1) * 512
    }

    fn extended(&self) -> bool {
        self.extended && !self.version_2
    }

    fn order(&self) -> u32 {
        match self.version_2 {
            true => 4,
            false => u32::from(self.refcount_order) % 7,
        }
    }

    fn cluster(&self) -> usize {
        match self.extended() {
            true => 1 << (14 + self.cluster % 3),
            false => 1 << (9 + self.cluster % 8),
        }
    }

    /// The image; `backing` is the name of a raw file, if it shall have one.
    pub fn build(&self, backing: &str) -> Built {
        let cluster = self.cluster();
        let entry = if self.extended() { 16 } else { 8 };
        let per_table = cluster / entry;
        let snapshot = self.snapshot && self.order() > 0;
        let references = if snapshot { 2 } else { 1 };
        let flag = if snapshot { 0 } else { COPIED };
        let mut image = Builder {
            bytes: Vec::new(),
            cluster,
            refcounts: Vec::new(),
        };
        image.allocate(cluster, 1);
        // Enough for any of these.
        let table = image.allocate(cluster, 1);
        let per_block = cluster * 8 >> self.order();
        let clusters = self.disk().div_ceil(cluster);
        let l1_entries = clusters.div_ceil(per_table);
        let block_count = 512_usize.div_ceil(per_block).min(cluster / 8);
        let blocks = image.allocate(block_count * cluster, 1);
        let l1 = image.allocate(l1_entries * 8, 1);
        let mut tables = [0; 3];
        for (index, at) in tables.iter_mut().enumerate().take(l1_entries) {
            *at = image.allocate(cluster, references);
            image.word(l1 + index * 8, *at as u64 | flag);
        }
        let mut data = image.bytes.len();
        for (index, kind) in self.entries.iter().take(24) {
            // Spread over the first of each table.
            let index = usize::from(*index);
            let (which, place) = (index % 3, index / 3 % per_table);
            if tables[which] == 0 || which * per_table + place >= clusters {
                continue;
            }
            let at = tables[which] + place * entry;
            if image.bytes[at..at + entry].iter().any(|byte| *byte != 0) {
                continue;
            }
            let (first, second) = self.entry(&mut image, *kind, references, flag, index);
            image.word(at, first);
            if self.extended() {
                image.word(at + 8, second);
            }
            data = data.max(at);
        }
        let mut built_snapshot = None;
        let (mut snapshots, mut snapshot_l1) = (0, 0);
        if snapshot {
            snapshot_l1 = image.allocate(l1_entries * 8, 1);
            let copy = image.bytes[l1..l1 + l1_entries * 8].to_vec();
            image.put(snapshot_l1, &copy);
            snapshots = image.allocate(64, 1);
            image.word(snapshots, snapshot_l1 as u64);
            image.put(snapshots + 8, &(l1_entries as u32).to_be_bytes());
            image.put(snapshots + 12, &[0, 1, 0, 2]);
            image.put(snapshots + 36, &16_u32.to_be_bytes());
            image.word(snapshots + 48, self.disk() as u64);
            image.put(snapshots + 56, b"1ab");
            built_snapshot = Some((snapshot_l1 as u64, l1_entries as u32));
        }
        let (mut bitmaps, mut bitmap_table) = (0, 0);
        if self.bitmap && !self.version_2 {
            bitmap_table = image.allocate(8, 1);
            image.word(bitmap_table, 1);
            bitmaps = image.allocate(32, 1);
            image.word(bitmaps, bitmap_table as u64);
            image.put(bitmaps + 8, &1_u32.to_be_bytes());
            image.put(bitmaps + 12, &2_u32.to_be_bytes());
            image.put(bitmaps + 16, &[1, 16, 0, 1]);
            image.put(bitmaps + 24, b"b");
        }
        for index in 0..block_count {
            image.word(table + index * 8, (blocks + index * cluster) as u64);
        }
        for (index, count) in image.refcounts.clone().into_iter().enumerate() {
            self.set_refcount(&mut image, blocks, index, count);
        }
        self.header(&mut image, backing, [l1, l1_entries, table]);
        if snapshot {
            image.put(60, &1_u32.to_be_bytes());
            image.word(64, snapshots as u64);
        }
        if bitmaps != 0 {
            image.put(136, &0x2385_2875_u32.to_be_bytes());
            image.put(140, &24_u32.to_be_bytes());
            image.put(144, &1_u32.to_be_bytes());
            image.word(152, 32);
            image.word(160, bitmaps as u64);
            image.word(88, 1);
        }
        Built {
            bytes: image.bytes,
            cluster,
            snapshot: built_snapshot,
            has_bitmap: bitmaps != 0,
            refcounts_changed: false,
            areas: [
                0,
                table,
                blocks,
                l1,
                tables[0],
                tables[1],
                snapshots,
                snapshot_l1,
                bitmaps,
                bitmap_table,
                data,
                0,
            ],
        }
    }

    fn entry(
        &self,
        image: &mut Builder,
        kind: Kind,
        references: u64,
        flag: u64,
        index: usize,
    ) -> (u64, u64) {
        let cluster = image.cluster;
        let plain = if self.version_2 {
            Kind::Data(u64::MAX)
        } else {
            kind
        };
        match (kind, plain) {
            (Kind::Compressed(fill), _) => {
                let packed = self.compressed(fill, cluster);
                let sectors = packed.len().div_ceil(512);
                let at = image.allocate(sectors * 512, references);
                image.put(at, &packed);
                let shift = 62 - (cluster.trailing_zeros() - 8);
                (COMPRESSED | (sectors as u64 - 1) << shift | at as u64, 0)
            }
            (_, Kind::Zero) => match self.extended() {
                true => (0, u64::MAX << 32),
                false => (1, 0),
            },
            (_, Kind::ZeroAllocated) => {
                let at = image.allocate(cluster, references) as u64;
                match self.extended() {
                    true => (at | flag, u64::MAX << 32),
                    false => (at | flag | 1, 0),
                }
            }
            (_, Kind::Data(bitmap)) => {
                let at = image.allocate(cluster, references);
                let bytes: Vec<u8> = (0..cluster).map(|n| (n / 512 + index) as u8 | 1).collect();
                image.put(at, &bytes);
                let bitmap = bitmap & !(bitmap << 32);
                (at as u64 | flag, if self.extended() { bitmap } else { 0 })
            }
            (_, Kind::Compressed(_)) => (0, 0),
        }
    }

    /// A stream that becomes a cluster of one byte, or of nobody knows what.
    fn compressed(&self, fill: Fill, cluster: usize) -> Vec<u8> {
        let mut packed = Vec::new();
        match (fill, self.zstd && !self.version_2) {
            (Fill::Bytes(bytes), _) => packed.extend(bytes),
            (Fill::Sound(byte), true) => {
                // A frame of one segment, whose one block is a run.
                packed.extend([0x28, 0xb5, 0x2f, 0xfd, 0xa0]);
                packed.extend((cluster as u32).to_le_bytes());
                let header = (cluster as u32) << 3 | 1 << 1 | 1;
                packed.extend(&header.to_le_bytes()[..3]);
                packed.push(byte);
            }
            (Fill::Sound(byte), false) => {
                // Stored; the last may be of no bytes.
                let mut left = cluster - 512.min(cluster / 2);
                for last in [0, 1] {
                    let len = left.min(0xffff) as u16;
                    packed.push(last);
                    packed.extend(len.to_le_bytes());
                    packed.extend((!len).to_le_bytes());
                    packed.extend(std::iter::repeat_n(byte, len.into()));
                    left = cluster - usize::from(len);
                }
            }
        }
        packed
    }

    fn set_refcount(&self, image: &mut Builder, blocks: usize, index: usize, count: u64) {
        match self.order() {
            order @ 0..=2 => {
                let bits = 1 << order;
                let at = blocks + index * bits / 8;
                if let Some(byte) = image.bytes.get_mut(at) {
                    *byte |= (count << (index * bits % 8)) as u8;
                }
            }
            order => {
                let bytes = 1_usize << (order - 3);
                let value = count.to_be_bytes();
                image.put(blocks + index * bytes, &value[8 - bytes..]);
            }
        }
    }

    fn header(&self, image: &mut Builder, backing: &str, [l1, l1_entries, table]: [usize; 3]) {
        let version: u32 = if self.version_2 { 2 } else { 3 };
        image.put(0, b"QFI\xfb");
        image.put(4, &version.to_be_bytes());
        image.put(20, &image.cluster.trailing_zeros().to_be_bytes());
        image.word(24, self.disk() as u64);
        image.put(36, &(l1_entries as u32).to_be_bytes());
        image.word(40, l1 as u64);
        image.word(48, table as u64);
        image.put(56, &1_u32.to_be_bytes());
        if version == 3 {
            let zstd = self.zstd;
            let features = u64::from(zstd) << 3 | u64::from(self.extended()) << 4;
            image.word(72, features);
            image.word(80, self.lazy.into());
            image.put(96, &self.order().to_be_bytes());
            image.put(100, &112_u32.to_be_bytes());
            image.put(104, &[zstd.into()]);
        }
        if self.backing {
            let extensions = if version == 3 { 112 } else { 72 };
            image.put(extensions, &0xe279_2aca_u32.to_be_bytes());
            image.put(extensions + 4, &3_u32.to_be_bytes());
            image.put(extensions + 8, b"raw");
            image.word(8, 256);
            image.put(16, &(backing.len() as u32).to_be_bytes());
            image.put(256, backing.as_bytes());
        } else if version == 3 {
            // Unknown, and of 16 bytes, so that what follows is where it is with a backing file.
            image.put(112, &0x1234_5678_u32.to_be_bytes());
            image.put(116, &8_u32.to_be_bytes());
        }
        if version == 3 {
            // As long, and to be ignored.
            image.put(128, &0x1234_5679_u32.to_be_bytes());
        }
    }
}

impl Built {
    /// Makes a change.
    pub fn change(&mut self, change: Change) {
        let at = usize::from(change.at);
        let base = self.areas[change.area as usize];
        let at = match change.area {
            Area::Anywhere => at * 8 % self.bytes.len(),
            // There are fields there, and then zeroes.
            Area::Header => at % 512,
            _ if at % 2 == 0 => base + at / 2 * 8 % 128,
            _ => base + at * 8 % self.cluster,
        };
        let refcounts = self.areas[Area::RefcountTable as usize]..self.areas[Area::L1 as usize];
        self.refcounts_changed |= refcounts.start < at + 8 && at < refcounts.end || at < 60;
        let cluster = self.cluster as u64;
        match change.value {
            Value::Byte(value) => put(&mut self.bytes, at, &[value]),
            Value::Half(value) => put(&mut self.bytes, at, &value.to_be_bytes()),
            Value::Word(value) => put(&mut self.bytes, at, &value.to_be_bytes()),
            Value::Long(value) => put(&mut self.bytes, at, &value.to_be_bytes()),
            Value::Cluster(number, flags) => {
                let top = u64::from(flags >> 6) << 62;
                let value = u64::from(number) * cluster | top | u64::from(flags & 1);
                put(&mut self.bytes, at, &value.to_be_bytes());
            }
            Value::Bit(bit) => {
                if let Some(byte) = self.bytes.get_mut(at) {
                    *byte ^= 1 << (bit % 8);
                }
            }
        }
    }
}

//! Pieces of L2 tables and refcount blocks in memory: a bounded number of clean ones, and all that
//! have been changed and not yet written.
//!
//! ```text
//!   clean ── change ──► changed ── copied for writing, written, synced ──► clean
//!     │                    └── changed again meanwhile ──► still changed
//!     └── evicted by the CLOCK rule
//! ```

use std::collections::{BTreeSet, HashMap, VecDeque};

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// L2 entries.
    L2,
    /// Refcounts.
    Refcount,
}

struct Page {
    kind: Kind,
    bytes: Box<[u8]>,
    /// Counts the changes.
    version: u64,
    /// The version that is on the disk, for good.
    written: u64,
    used: bool,
}

impl Page {
    fn is_changed(&self) -> bool {
        self.version != self.written
    }
}

/// A changed page as it was at one moment.
pub struct Copy {
    /// Where it belongs in the file.
    pub offset: u64,
    pub version: u64,
    pub bytes: Box<[u8]>,
}

/// See the module.
pub struct Pages {
    pages: HashMap<u64, Page>,
    /// All of them, for the hand of the clock.
    order: VecDeque<u64>,
    capacity: usize,
    changed: BTreeSet<u64>,
}

impl Pages {
    /// Remembers up to `capacity` clean pages.
    pub fn new(capacity: usize) -> Self {
        Self {
            pages: HashMap::new(),
            order: VecDeque::new(),
            capacity: capacity.max(64),
            changed: BTreeSet::new(),
        }
    }

    /// The page at an offset, if it is here.
    pub fn get(&mut self, offset: u64) -> Option<&[u8]> {
        let page = self.pages.get_mut(&offset)?;
        page.used = true;
        Some(&page.bytes)
    }

    /// The same, to be changed.
    pub fn change(&mut self, offset: u64) -> Option<&mut [u8]> {
        let page = self.pages.get_mut(&offset)?;
        page.used = true;
        if !page.is_changed() {
            self.changed.insert(offset);
        }
        page.version += 1;
        Some(&mut page.bytes)
    }

    /// Takes in a page as it is in the file, unless it is here.
    pub fn insert(&mut self, offset: u64, kind: Kind, bytes: Box<[u8]>) {
        if self.pages.contains_key(&offset) {
            return;
        }
        self.evict();
        let page = Page {
            kind,
            bytes,
            version: 0,
            written: 0,
            used: true,
        };
        self.pages.insert(offset, page);
        self.order.push_back(offset);
    }

    fn evict(&mut self) {
        // Twice around at most: all may be changed.
        for _ in 0..2 * self.order.len() {
            if self.pages.len() < self.capacity {
                return;
            }
            let Some(offset) = self.order.pop_front() else {
                return;
            };
            match self.pages.get_mut(&offset) {
                None => {}
                Some(page) => {
                    if std::mem::take(&mut page.used) || page.is_changed() {
                        self.order.push_back(offset);
                    } else {
                        self.pages.remove(&offset);
                    }
                }
            }
        }
    }

    /// Forgets what a cluster held that has been freed.
    pub fn forget(&mut self, offset: u64, len: u64, page_bytes: u64) {
        for offset in (offset..offset + len).step_by(page_bytes as usize) {
            if self.pages.remove(&offset).is_some() {
                self.changed.remove(&offset);
                self.order.retain(|other| *other != offset);
            }
        }
    }

    /// Whether so many are changed that they should be written.
    pub fn is_crowded(&self) -> bool {
        self.changed.len() > self.capacity / 2
    }

    /// Copies of all changed pages of a kind, in the order of the file.
    pub fn changed(&self, kind: Kind) -> Vec<Copy> {
        let copy = |offset: &u64| {
            let page = self.pages.get(offset)?;
            (page.kind == kind).then(|| Copy {
                offset: *offset,
                version: page.version,
                bytes: page.bytes.clone(),
            })
        };
        self.changed.iter().filter_map(copy).collect()
    }

    /// These are on the disk now.
    pub fn written(&mut self, copies: &[Copy]) {
        for copy in copies {
            if let Some(page) = self.pages.get_mut(&copy.offset)
                && page.is_changed()
            {
                page.written = copy.version;
                if !page.is_changed() {
                    self.changed.remove(&copy.offset);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_pages_stay_and_clean_ones_make_room() {
        let mut pages = Pages::new(64);
        for offset in 0..32 {
            pages.insert(offset, Kind::L2, Box::new([0]));
            pages.change(offset).unwrap()[0] = offset as u8;
        }
        for offset in 100..1000 {
            pages.insert(offset, Kind::L2, Box::new([0]));
            assert!(pages.get(offset).is_some());
            assert!(pages.pages.len() <= 65 && pages.order.len() == pages.pages.len());
        }
        for offset in 0..32 {
            assert_eq!(pages.get(offset), Some(&[offset as u8][..]));
        }
    }

    #[test]
    fn a_page_that_changes_while_it_is_written_stays_changed() {
        let mut pages = Pages::new(64);
        pages.insert(0, Kind::L2, Box::new([0]));
        pages.change(0).unwrap()[0] = 1;
        let copies = pages.changed(Kind::L2);
        pages.change(0).unwrap()[0] = 2;
        pages.written(&copies);
        let copies = pages.changed(Kind::L2);
        assert_eq!(copies.len(), 1);
        assert_eq!(*copies[0].bytes, [2]);
        pages.written(&copies);
        assert!(pages.changed(Kind::L2).is_empty());
        assert!(pages.changed.is_empty());
    }
}

//! Writing an image whose data is in a file of its own (`../data_file`).
//!
//! A cluster of the disk has its place in that file, whether it is used or not: at the offset that
//! it has on the disk. So nothing is allocated for data, and nothing freed; there are no refcounts
//! of it. An entry only tells whether the place counts:
//!
//! ```text
//!   write ─► data at its place ─► entry ─► [flush: both files synced] ─► entry on the disk
//!   zero ──► entry ─► hole at its place: at once, for nobody else ever gets it
//! ```
//!
//! Whether an entry that is on the disk says that the place counts or not, what is written there
//! meanwhile belongs to requests that were not flushed; that it may come to light is no worse than
//! that it may be lost.
//!
//! **Raw** (`data_file_raw`): the file alone is the disk too, at every moment. What the image says
//! is zeroes is so in the file, before and after. So zeroes are made in the file, and entries are
//! left as they are; and before data goes to a place that does not count yet, it is made to, with
//! the zeroes that it has, and that is flushed.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::super::super::buffers::Buffers;
use super::super::chain::{Alignment, Chain, Found, Layer};
use super::super::header::{AUTOCLEAR_RAW, Header};
use super::super::map::Mapping;
use super::cluster::{Cluster, Host};
use super::control::GrowError;
use super::engine::{Engine, TOP, own};
use super::extents::Run;
use super::io::Kind as Do;
use super::lock::locked;
use super::zero::Zeroing;

/// Bytes that are made to count at a time.
const LINKED: u64 = 16 << 20;

/// The data file of an image that is written to.
pub struct External {
    /// Its number among the files of the chain.
    pub file: u16,
    pub direct: Option<Alignment>,
    /// It is, as a raw image, the disk.
    pub raw: bool,
    /// There may be entries that have not been flushed since their places were made to count.
    unflushed: AtomicBool,
}

impl External {
    /// That of the topmost image.
    pub fn of(chain: &Chain, header: &Header) -> Option<Self> {
        let (file, layer) = chain.data_of(0)?;
        Some(Self {
            file,
            direct: layer.direct,
            raw: header.data.as_ref().is_some_and(|data| data.raw),
            unflushed: AtomicBool::new(false),
        })
    }

    /// Autoclear features that are kept up.
    pub fn kept_features(of: Option<&Self>) -> u64 {
        match of.is_some_and(|data| data.raw) {
            true => AUTOCLEAR_RAW,
            false => 0,
        }
    }
}

impl Engine {
    /// The file that data is written to, and what it asks for.
    pub fn data_file(&self) -> (u16, Option<Alignment>) {
        match &self.external {
            Some(data) => (data.file, data.direct),
            None => (TOP, self.direct),
        }
    }

    /// The layer of a data file.
    fn data_layer(&self) -> Option<&Layer> {
        let data = self.external.as_ref()?;
        self.chain.layers.get(usize::from(data.file))
    }

    /// Whether a file is one of the topmost image's.
    pub fn is_own(&self, file: u16) -> bool {
        file == TOP || self.external.as_ref().is_some_and(|data| data.file == file)
    }

    /// Where data is that an entry for `position` says is at `offset`; `None` where it can't be.
    pub fn found(&self, position: u64, offset: u64) -> Option<Found> {
        match &self.external {
            None => Some(Found::Data(TOP, offset)),
            Some(data) if offset == position => Some(Found::Data(data.file, offset)),
            // Nowhere else than on the disk (as QEMU has it).
            Some(_) => None,
        }
    }

    /// Whether an entry leads elsewhere than to the place of its cluster, which begins at `start`.
    pub fn is_misplaced(&self, cluster: &Cluster, start: u64) -> bool {
        self.external.is_some()
            && match cluster.host {
                Host::None => false,
                Host::Owned(host) | Host::Shared(host) => host != start,
                Host::Compressed(_) => true,
            }
    }

    /// Up to `want` clusters for the data from `position` on.
    pub async fn allocate_data(&self, position: u64, want: u64) -> io::Result<Run> {
        match &self.external {
            None => self.allocate(want).await,
            Some(_) => Ok(Run {
                first: position >> self.layout.cluster_bits,
                count: want,
                zero: false,
            }),
        }
    }

    /// They were not linked.
    pub async fn release_data(&self, run: Run) {
        if self.external.is_none() {
            self.release(run).await;
        }
    }

    /// Whether a cluster that is about to be linked reads as zeroes, or could be made to, where that
    /// saves writing them.
    pub async fn is_clear(&self, run: Run) -> bool {
        if self.external.is_none() || self.has_backing {
            return run.zero;
        }
        let bits = self.layout.cluster_bits;
        self.punch(run.first << bits, run.count << bits)
            .await
            .is_ok()
    }

    /// Where data ends that keeps its place up to `to` of the cluster that begins at `start`: what
    /// is beyond the end of the disk does not get into the data file.
    pub fn kept_end(&self, start: u64, to: u64) -> u64 {
        match &self.external {
            None => to,
            Some(_) => to.min(locked(&self.tables).size_bytes.saturating_sub(start)),
        }
    }

    async fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let (file, _) = self.data_file();
        self.begin_on(file, Do::Punch, offset, len, Buffers::default())
            .wait()
            .await
            .0
    }

    /// Gives back the places of ranges that read as zeroes by now; whose clusters are locked for
    /// this request alone.
    pub async fn punch_places(&self, ranges: &[(u64, u64)]) {
        for (position, len) in ranges {
            // Where the host can't, the space waits to be used again.
            let _ = self.punch(*position, *len).await;
        }
    }

    /// Has a range of the data file hold zeroes.
    pub async fn clear(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        match self.punch(offset, len).await {
            Err(error) if is_unsupported(&error) => {}
            other => return other,
        }
        while len > 0 {
            let step = len.min(super::BOUNCE);
            let (_, zeroes) = own(step as usize)?;
            self.write_host(offset, zeroes).await?;
            offset += step;
            len -= step;
        }
        Ok(())
    }

    /// As [`Engine::zero`], where the data file is to be zeroes as well; and is enough.
    pub async fn zero_raw(&self, position: u64, length: u64, how: Zeroing) -> io::Result<()> {
        self.prepare().await?;
        match how {
            Zeroing::Discard => {
                // It need not come about.
                let _ = self.punch(position, length).await;
                Ok(())
            }
            Zeroing::Unmap => self.clear(position, length).await,
            Zeroing::Keep => {
                self.clear(position, length).await?;
                let (file, _) = self.data_file();
                let kept = self.begin_on(file, Do::Allocate, position, length, Buffers::default());
                match kept.wait().await.0 {
                    Err(error) if is_unsupported(&error) => Ok(()),
                    other => other,
                }
            }
        }
    }

    /// Before a range is written to where the data file is the disk: has all places in it count.
    /// Nothing of it is locked.
    pub async fn own_raw(&self, offset: u64, len: u64) -> io::Result<()> {
        let Some(data) = self.external.as_ref().filter(|data| data.raw) else {
            return Ok(());
        };
        if data.unflushed.swap(false, Ordering::Relaxed)
            && let Err(error) = self.flush().await
        {
            data.unflushed.store(true, Ordering::Relaxed);
            return Err(error);
        }
        let (mut position, end) = (offset, offset + len);
        while position < end {
            let (mapping, span) = self.look_up_top(position, end - position).await?;
            position = match mapping {
                Mapping::Data(_) => position + span,
                _ => self.link_raw(position).await?,
            };
        }
        Ok(())
    }

    /// Has places count from that of the cluster at `position` on, and of some behind, as they are
    /// likely to be next; where those end that do.
    async fn link_raw(&self, position: u64) -> io::Result<u64> {
        let bits = self.layout.cluster_bits;
        let cluster = self.cluster_bytes();
        let start = position & !(cluster - 1);
        let most = self.layout.place(start).span.min(LINKED.max(cluster));
        let end = locked(&self.tables).size_bytes;
        let stop = end.next_multiple_of(cluster).min(start + most);
        let _alone = self
            .clusters
            .lock(start >> bits, (stop - 1) >> bits, true)
            .await;
        self.own_table(start, true).await?;
        let mut at = start;
        while at < stop {
            let (mapping, span) = self.look_up_top(at, stop - at).await?;
            match mapping {
                Mapping::Data(host) if host == at => {}
                // It should be zeroes; from now on it matters.
                Mapping::Zero | Mapping::Unallocated => {
                    let inside = self.kept_end(at, span);
                    if inside > 0 {
                        self.clear(at, inside).await?;
                    }
                }
                Mapping::Data(_) | Mapping::Compressed(..) => {
                    return Err(self.corrupt("a bad L2 entry", at).await);
                }
            }
            at += span;
        }
        let all = Cluster::all(&self.layout);
        let linked = self.link(start, (stop - start) >> bits, |number, _| Cluster {
            host: Host::Owned(start + (number << bits)),
            data: all,
            zero: 0,
        });
        let flushed = match linked.await {
            Ok(()) => self.flush().await,
            failed => failed,
        };
        if flushed.is_err()
            && let Some(data) = &self.external
        {
            data.unflushed.store(true, Ordering::Relaxed);
        }
        flushed.map(|()| stop)
    }

    /// Before the disk becomes larger.
    pub async fn grow_data(&self, old: u64, size_bytes: u64) -> Result<(), GrowError> {
        let (Some(data), Some(layer)) = (&self.external, self.data_layer()) else {
            return Ok(());
        };
        let len = rustix::fs::seek(&layer.file, SeekFrom::End(0)).map_err(io::Error::from)?;
        let there = len.min(size_bytes);
        if data.raw && there > old {
            self.clear(old, there - old).await?;
        }
        if len < size_bytes {
            // Makes it longer.
            let grown = self.begin_on(data.file, Do::Truncate, size_bytes, 0, Buffers::default());
            grown.wait().await.0?;
        }
        Ok(self.sync().await?)
    }

    /// The image is empty, and nobody will read what was in it.
    pub async fn punch_data(&self) {
        if self.external.is_some() {
            let size_bytes = locked(&self.tables).size_bytes;
            self.punch_places(&[(0, size_bytes)]).await;
        }
    }
}

/// Whether the host can't do that with the file.
pub fn is_unsupported(error: &io::Error) -> bool {
    let unsupported = [Errno::OPNOTSUPP, Errno::NOSYS, Errno::NODEV];
    Errno::from_io_error(error).is_some_and(|errno| unsupported.contains(&errno))
}

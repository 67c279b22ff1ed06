//! What a request does, from its beginning to its end.
//!
//! ```text
//!   write ─► clusters shared ─► all of it owned? ─ yes ─► written in place
//!                                     └─ no ─► clusters alone ─► for each piece:
//!              owned ──────────────────────────────────────────► written in place
//!              whole clusters ─► allocate ─► write ─► link
//!              part of one ───► [allocate] ─► read what is kept ─► one write ─► link
//! ```

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::super::super::Operation;
use super::super::super::buffers::{AlignedBuffer, Buffers};
use super::super::chain::Found;
use super::super::map::{Corrupt, Layout, Place};
use super::cluster::{Cluster, Host};
use super::engine::{Engine, Tables, Tickets, clusters_of, own};
use super::io::Kind as Do;
use super::lock::locked;
use super::transfer::is_straight;
use super::zero::Zeroing;

/// What becomes of the next piece of a write.
enum Plan {
    /// It goes to this place in the file, so many bytes of it.
    InPlace(u64, u64),
    /// So many whole clusters that have no place yet.
    Fresh(u64),
    /// A part of a cluster, or one that needs a closer look; so many bytes.
    Single(Cluster, u64),
}

impl Engine {
    /// Does a request, whose range lies within the disk.
    pub async fn execute(
        &self,
        operation: Operation,
        offset: u64,
        length: u64,
        buffers: &mut Buffers,
    ) -> io::Result<()> {
        if operation == Operation::Flush {
            return self.flush().await;
        }
        if length == 0 {
            return Ok(());
        }
        let bits = self.layout.cluster_bits;
        let (first, last) = (offset >> bits, (offset + length - 1) >> bits);
        let durable = match operation {
            Operation::Flush | Operation::Read => {
                let _shared = self.clusters.lock(first, last, false).await;
                return self.read(offset, buffers).await;
            }
            Operation::Write { durable } => {
                self.write(offset, buffers, first, last).await?;
                durable
            }
            Operation::Discard => {
                let _alone = self.clusters.lock(first, last, true).await;
                self.zero(offset, length, Zeroing::Discard).await?;
                false
            }
            Operation::WriteZeroes { unmap, durable } => {
                let _alone = self.clusters.lock(first, last, true).await;
                let how = if unmap { Zeroing::Unmap } else { Zeroing::Keep };
                self.zero(offset, length, how).await?;
                durable
            }
        };
        if durable { self.flush().await } else { Ok(()) }
    }

    async fn write(
        &self,
        offset: u64,
        buffers: &mut Buffers,
        first: u64,
        last: u64,
    ) -> io::Result<()> {
        self.prepare().await?;
        self.own_raw(offset, buffers.len_bytes()).await?;
        {
            let (file, direct) = self.data_file();
            let _shared = self.clusters.lock(first, last, false).await;
            if let Some(pieces) = self.in_place(offset, buffers.len_bytes()).await? {
                let mut tickets = Tickets::default();
                for (host, span) in pieces {
                    let mut piece = Buffers::default();
                    buffers.split_to(span, &mut piece);
                    if is_straight(direct, host, &piece) {
                        let write = self.begin_on(file, Do::Write, host, 0, piece);
                        tickets.add(write).await;
                    } else {
                        tickets.note(self.write_host(host, piece).await);
                    }
                }
                return tickets.wait().await;
            }
        }
        let _alone = self.clusters.lock(first, last, true).await;
        self.write_alone(offset, buffers).await
    }

    /// The places of a range, if all of it may be written where it is.
    async fn in_place(&self, mut offset: u64, mut len: u64) -> io::Result<Option<Vec<(u64, u64)>>> {
        let mut pieces = Vec::new();
        while len > 0 {
            let found = self.with_page(offset, |page, place| match page {
                None => Ok(None),
                Some(page) => owned_run(&self.layout, page, place, len),
            });
            match found.await? {
                Ok(Some((host, span))) => {
                    self.check_place(host, span, offset).await?;
                    pieces.push((host, span));
                    offset += span;
                    len -= span;
                }
                Ok(None) => return Ok(None),
                Err(Corrupt) => return Err(self.corrupt("a bad L2 entry", offset).await),
            }
        }
        Ok(Some(pieces))
    }

    /// Data is never written over metadata, wherever an entry leads.
    async fn check_place(&self, host: u64, span: u64, position: u64) -> io::Result<()> {
        let wrong = {
            let tables = locked(&self.tables);
            match self.external {
                Some(_) => host != position,
                None => {
                    host.saturating_add(span) > tables.end || self.is_reserved(&tables, host, span)
                }
            }
        };
        if wrong {
            let what = "an L2 entry leads to metadata, beyond the end of the file, or astray";
            return Err(self.corrupt(what, position).await);
        }
        Ok(())
    }

    /// Writes with the clusters locked for this request alone.
    pub async fn write_alone(&self, mut position: u64, buffers: &mut Buffers) -> io::Result<()> {
        while buffers.len_bytes() > 0 {
            self.own_table(position, true).await?;
            let len = buffers.len_bytes();
            let planned = self.with_page(position, |page, place| {
                plan(&self.layout, page.unwrap_or(&[]), place, len)
            });
            let plan = match planned.await? {
                Ok(plan) => plan,
                Err(Corrupt) => return Err(self.corrupt("a bad L2 entry", position).await),
            };
            position += match plan {
                Plan::InPlace(host, span) => {
                    self.check_place(host, span, position).await?;
                    let mut piece = Buffers::default();
                    buffers.split_to(span, &mut piece);
                    self.write_host(host, piece).await?;
                    span
                }
                Plan::Fresh(count) => self.write_fresh(position, count, buffers).await?,
                Plan::Single(cluster, span) => {
                    let mut piece = Buffers::default();
                    buffers.split_to(span, &mut piece);
                    self.write_single(position, cluster, piece).await?;
                    span
                }
            };
        }
        Ok(())
    }

    /// Writes up to `count` whole clusters to a new place; returns how many bytes.
    async fn write_fresh(
        &self,
        position: u64,
        count: u64,
        buffers: &mut Buffers,
    ) -> io::Result<u64> {
        let bits = self.layout.cluster_bits;
        let run = self.allocate_data(position, count).await?;
        let bytes = run.count << bits;
        let mut piece = Buffers::default();
        buffers.split_to(bytes, &mut piece);
        let written = self.write_host(run.first << bits, piece).await;
        let linked = match written {
            Ok(()) => {
                let all = Cluster::all(&self.layout);
                self.link(position, run.count, |number, _| Cluster {
                    host: Host::Owned((run.first + number) << bits),
                    data: all,
                    zero: 0,
                })
                .await
            }
            failed => failed,
        };
        if let Err(error) = linked {
            self.release_data(run).await;
            return Err(error);
        }
        Ok(bytes)
    }

    /// Writes to one cluster whose entry must change.
    async fn write_single(&self, position: u64, old: Cluster, piece: Buffers) -> io::Result<()> {
        let bits = self.layout.cluster_bits;
        let within = position & (self.cluster_bytes() - 1);
        let end = within + piece.len_bytes();
        // So many copies at a time as there are places.
        let place = (position >> bits) % self.copy_places();
        let _copying = self.copies.lock(place, place, true).await;

        let (host, run) = match old.host {
            Host::Owned(host) => {
                self.check_place(host, self.cluster_bytes(), position - within)
                    .await?;
                (host, None)
            }
            _ => {
                let run = self.allocate_data(position, 1).await?;
                (run.first << bits, Some(run))
            }
        };
        let touched = Cluster::units(&self.layout, within, end);
        let new = Cluster {
            host: Host::Owned(host),
            data: touched | old.data,
            zero: old.zero & !touched,
        };
        // Units whose bytes are not there yet.
        let fill = match run {
            Some(_) => new.data,
            None => touched & !old.data,
        };
        let zero = match run {
            Some(run) => self.is_clear(run).await,
            None => false,
        };
        let target = Target {
            start: position - within,
            host,
            zero,
        };
        let written = self.write_filled(target, fill, within, piece).await;
        let linked = match written {
            Ok(()) => self.link(position, 1, |_, _| new).await,
            failed => failed,
        };
        if let (Err(_), Some(run)) = (&linked, run) {
            self.release_data(run).await;
        }
        linked
    }

    fn copy_places(&self) -> u64 {
        (super::COPY_BYTES >> self.layout.cluster_bits).clamp(4, 256)
    }

    /// Writes `piece` from byte `within` of a cluster on, and all other bytes of the units in
    /// `fill` as they read now.
    async fn write_filled(
        &self,
        target: Target,
        fill: u32,
        within: u64,
        mut piece: Buffers,
    ) -> io::Result<()> {
        let end = within + piece.len_bytes();
        let mut start = within;
        let mut all = Buffers::default();
        let mut tail = None;
        for (from, to) in kept_ranges(&self.layout, fill, within, end) {
            let kept = self.kept_end(target.start, to);
            if kept < to {
                // Nothing that was there is to come to light where the disk becomes larger.
                let beyond = from.max(kept);
                self.clear(target.start + beyond, to - beyond).await?;
            }
            let to = kept;
            if from >= to {
                continue;
            }
            if target.zero && self.is_zero(target.start + from, to - from).await? {
                continue;
            }
            let (memory, mut buffers) = own((to - from) as usize)?;
            self.read(target.start + from, &mut buffers).await?;
            let len = (to - from) as usize;
            if to == within {
                all.push_own(&memory, 0, len).map_err(io::Error::other)?;
                start = from;
            } else if from == end {
                tail = Some((memory, len));
            } else {
                let (whole, offset) = (whole(&memory)?, target.host + from);
                self.write_host(offset, whole).await?;
            }
        }
        piece.split_to(piece.len_bytes(), &mut all);
        if let Some((memory, len)) = tail {
            all.push_own(&memory, 0, len).map_err(io::Error::other)?;
        }
        self.write_host(target.host + start, all).await
    }

    /// Whether a range reads as zeroes without a look at any data.
    pub async fn is_zero(&self, mut position: u64, mut len: u64) -> io::Result<bool> {
        while len > 0 {
            let (found, span) = self.look_up(position, len).await?;
            if found != Found::Zero {
                return Ok(false);
            }
            position += span;
            len -= span;
        }
        Ok(true)
    }

    /// Has the entries of `count` clusters from `position` on, all in one page, say something new.
    /// What they refer to has been written.
    pub async fn link(
        &self,
        position: u64,
        count: u64,
        entry: impl Fn(u64, &Cluster) -> Cluster,
    ) -> io::Result<()> {
        let linked = self
            .change_page(position, |tables, offset, place| {
                // Also where one of them turns out to be corrupt after others have changed.
                tables.barrier = true;
                for number in 0..count {
                    let index = place.entry + number as usize;
                    self.set_entry(tables, offset, index, |old| entry(number, old))?;
                }
                Ok(())
            })
            .await?;
        match linked {
            Ok(()) => Ok(()),
            Err(Corrupt) => Err(self.corrupt("a bad L2 entry", position).await),
        }
    }

    /// Changes an entry of a page that is in memory. What it does not refer to any more is noted.
    pub fn set_entry(
        &self,
        tables: &mut Tables,
        offset: u64,
        index: usize,
        change: impl FnOnce(&Cluster) -> Cluster,
    ) -> Result<(), Corrupt> {
        let page = tables.pages.get(offset).ok_or(Corrupt)?;
        let old = Cluster::read(&self.layout, page, index)?;
        let new = change(&old);
        if new == old {
            return Ok(());
        }
        let left = match old.host {
            Host::None => None,
            _ if self.external.is_some() => None,
            Host::Owned(host) | Host::Shared(host) => Some((host, self.cluster_bytes())),
            Host::Compressed(compressed) => Some((compressed.offset, compressed.len as u64)),
        };
        if left.is_some_and(|(offset, len)| self.is_reserved(tables, offset, len)) {
            // It would be given away. At once, so that no flush writes the half of it.
            tables.lost.get_or_insert(Errno::IO);
            return Err(Corrupt);
        }
        let page = tables.pages.change(offset).ok_or(Corrupt)?;
        new.write(&self.layout, page, index);
        match old.host {
            Host::None => {}
            // Nothing of it is counted.
            _ if self.external.is_some() => {}
            Host::Owned(host) | Host::Shared(host) => {
                if new.host != Host::Owned(host) && new.host != Host::Shared(host) {
                    if let Some(marks) = &mut tables.marks {
                        marks.set(host >> self.layout.cluster_bits, 1);
                    }
                    tables.unlinked.push(host);
                }
            }
            Host::Compressed(compressed) => {
                let (offset, len) = (compressed.offset, compressed.len as u64);
                let clusters = clusters_of(offset, len, self.cluster_bytes());
                if let Some(marks) = &mut tables.marks {
                    let bits = self.layout.cluster_bits;
                    clusters.iter().for_each(|at| marks.set(at >> bits, 1));
                }
                tables.unlinked.extend(clusters);
                locked(&self.inflated).forget();
            }
        }
        Ok(())
    }
}

/// The host cluster that is being filled.
#[derive(Clone, Copy)]
struct Target {
    /// Where the cluster begins on the disk.
    start: u64,
    /// Where it begins in the file.
    host: u64,
    /// It is known to read as zeroes.
    zero: bool,
}

fn whole(memory: &Arc<AlignedBuffer>) -> io::Result<Buffers> {
    let mut buffers = Buffers::default();
    buffers
        .push_own(memory, 0, memory.len_bytes())
        .map_err(io::Error::other)?;
    Ok(buffers)
}

/// How many of the first `len` bytes from `place` on lie in a row in clusters that are the image's
/// own, and where.
fn owned_run(
    layout: &Layout,
    page: &[u8],
    place: &Place,
    len: u64,
) -> Result<Option<(u64, u64)>, Corrupt> {
    let bytes = layout.cluster_bytes() as u64;
    let mut found = None;
    let mut span = 0;
    while span < len {
        let at = place.within + span;
        let index = place.entry + (at >> layout.cluster_bits) as usize;
        if (index + 1) << layout.entry_bits > page.len() {
            break;
        }
        let from = at & (bytes - 1);
        let to = bytes.min(from + len - span);
        let cluster = Cluster::read(layout, page, index)?;
        let units = Cluster::units(layout, from, to);
        let Host::Owned(host) = cluster.host else {
            break;
        };
        let start = *found.get_or_insert(host + from);
        if cluster.data & units != units || start + span != host + from {
            if span == 0 {
                found = None;
            }
            break;
        }
        span += to - from;
    }
    Ok(found.filter(|_| span > 0).map(|host| (host, span)))
}

fn plan(layout: &Layout, page: &[u8], place: &Place, len: u64) -> Result<Plan, Corrupt> {
    if let Some((host, span)) = owned_run(layout, page, place, len)? {
        return Ok(Plan::InPlace(host, span));
    }
    let bytes = layout.cluster_bytes() as u64;
    let mut fresh = 0;
    while place.within == 0 && (fresh + 1) * bytes <= len {
        let index = place.entry + fresh as usize;
        if (index + 1) << layout.entry_bits > page.len()
            || matches!(Cluster::read(layout, page, index)?.host, Host::Owned(_))
        {
            break;
        }
        fresh += 1;
    }
    if fresh > 0 {
        return Ok(Plan::Fresh(fresh));
    }
    let cluster = Cluster::read(layout, page, place.entry)?;
    Ok(Plan::Single(cluster, len.min(bytes - place.within)))
}

/// The bytes of these units that are not among `from` to `to`, in runs; none crosses the range.
fn kept_ranges(layout: &Layout, units: u32, from: u64, to: u64) -> Vec<(u64, u64)> {
    let unit = layout.unit_bytes();
    let count = layout.cluster_bytes() as u64 / unit;
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for number in 0..count {
        if units & 1_u32.wrapping_shl(number as u32) == 0 {
            continue;
        }
        let (start, end) = (number * unit, (number + 1) * unit);
        for (a, b) in [(start, end.min(from)), (start.max(to), end)] {
            if a >= b {
                continue;
            }
            match ranges.last_mut() {
                Some(last) if last.1 == a => last.1 = b,
                _ => ranges.push((a, b)),
            }
        }
    }
    ranges
}

//! What the image itself has is given out, while the disk is in use, for whoever writes it into the
//! image below; in the end the image is emptied.
//!
//! ```text
//!   look at this image's tables only ─► absent: on
//!                                  ├──► zeroes: where, and how many
//!                                  └──► data: clusters together with others ─► read
//! ```
//!
//! Nothing is locked against the writes of the guest but while data is read, and those in place not
//! even then: what is written meanwhile is noted ([`crate::disk::dirty`]) and given out again.
//!
//! **Emptying** takes the entries of the L1 table away. Wherever that is interrupted, by a power cut
//! too, the image over the one below shows the same disk: each entry is there or is not, and the
//! image below has all that it leads to. Then the host gets the space back; that it is free is
//! known to the image when it is next opened to be written to, and searched for leaks.

use std::io;

use super::super::super::buffers::Buffers;
use super::super::super::steps::{Outcome, PIECE, Reached, Taken};
use super::super::map::Mapping;
use super::engine::{Engine, Tickets, own};
use super::io::Kind as Do;
use super::lock::locked;

/// Bytes that are told to be zeroes at a time: whoever hears of it has work to do.
const ZEROES: u64 = 64 << 20;
/// Places that are looked at in a row: somebody may want the job to end.
const LOOKS: usize = 256;
/// Pieces in which space goes back to the host: a guest waits.
const PUNCHES: usize = 4096;

fn is_data(mapping: &Mapping) -> bool {
    matches!(mapping, Mapping::Data(_) | Mapping::Compressed(..))
}

impl Engine {
    /// See [`crate::disk::steps::Step::Take`].
    pub async fn take(&self, from: u64, end: u64) -> Outcome {
        self.alive()?;
        let end = end.min(locked(&self.tables).size_bytes);
        let mut position = from.min(end);
        for _ in 0..LOOKS {
            if position == end {
                break;
            }
            let (mapping, span) = self.look_up_top(position, end - position).await?;
            match mapping {
                Mapping::Unallocated => position += span,
                Mapping::Zero => {
                    return Ok(Reached {
                        position: position + span.min(ZEROES),
                        taken: Taken::Zeroes(position),
                        ..Reached::default()
                    });
                }
                Mapping::Data(_) | Mapping::Compressed(..) => {
                    if let Some(reached) = self.take_data(position, end).await? {
                        return Ok(reached);
                    }
                    // It has become zeroes meanwhile.
                }
            }
        }
        Ok(Reached {
            position,
            ..Reached::default()
        })
    }

    /// Reads what is at `start` and, in a row with it, behind.
    async fn take_data(&self, start: u64, end: u64) -> io::Result<Option<Reached>> {
        let most = (start + PIECE).min(end);
        let bits = self.layout.cluster_bits;
        let _shared = self
            .clusters
            .lock(start >> bits, (most - 1) >> bits, false)
            .await;
        let mut stop = start;
        while stop < most {
            let (mapping, span) = self.look_up_top(stop, most - stop).await?;
            if !is_data(&mapping) {
                break;
            }
            stop += span;
        }
        if stop == start {
            return Ok(None);
        }
        let len = (stop - start) as usize;
        let (memory, mut buffers) = own(len)?;
        self.read(start, &mut buffers).await?;
        Ok(Some(Reached {
            position: stop,
            read: len as u64,
            copied: 0,
            taken: Taken::Data(start, memory, len),
        }))
    }

    /// See [`crate::disk::steps::Step::Empty`].
    pub async fn empty(&self) -> io::Result<()> {
        // Features that depend on being kept up go.
        self.prepare().await?;
        self.flush().await?;
        let _baton = self.allocating.only().await;
        let _flushing = self.flushing.only().await;
        self.alive()?;
        self.control.hand_over();
        let (offset, entries) = {
            let tables = locked(&self.tables);
            (tables.l1_offset, tables.l1.len() as u64)
        };
        let len = (entries * 8).next_multiple_of(self.block_bytes);
        let mut done = 0;
        while done < len {
            let step = (len - done).min(super::BOUNCE);
            self.write_own(offset + done, &[], step).await?;
            done += step;
        }
        self.sync().await?;
        self.punch_all().await;
        self.punch_data().await;
        Ok(())
    }

    /// Gives back all the space that an image without an L2 table has no use for.
    async fn punch_all(&self) {
        let cluster = self.cluster_bytes();
        let (mut kept, end) = {
            let tables = locked(&self.tables);
            let area = |start: u64, entries: usize| (start, (entries as u64 * 8).max(1));
            let mut kept = vec![
                (0, cluster),
                area(tables.l1_offset, tables.l1.len()),
                area(tables.refcounts_offset, tables.refcounts.len()),
            ];
            let blocks = tables.refcounts.iter().filter(|block| **block != 0);
            kept.extend(blocks.map(|block| (*block, cluster)));
            (kept, tables.end)
        };
        kept.sort_unstable();
        kept.push((end, 0));
        let mut tickets = Tickets::default();
        let mut from = 0;
        for (start, len) in kept.into_iter().take(PUNCHES) {
            if start > from {
                let ticket = self.begin(Do::Punch, from, start - from, Buffers::default());
                tickets.add(ticket).await;
            }
            from = from.max((start + len).next_multiple_of(cluster));
        }
        // Where the host can't, it is lost until the image is searched for leaks.
        let _ = tickets.wait().await;
    }
}

//! Ranges that become zeroes: discards and WRITE_ZEROES.
//!
//! What is discarded reads as zeroes too, in whole clusters (or subclusters), as with QEMU: over a
//! backing file the entries say so, and what lies below does not come to light again. A discard
//! leaves what is less than a unit as it is, and so does one in an image of version 2 over a backing
//! file, which has no entry for it, and one for whose tables the host has no room.

use std::io;

use super::super::chain::Found;
use super::super::map::{Corrupt, Layout};
use super::allocate::is_full;
use super::cluster::{Cluster, Host};
use super::engine::{Engine, own};
use super::lock::locked;

/// Looks at what lies below before it is taken to be something.
const LOOKS: usize = 64;

/// What to do with a range that is to become zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// It need not even become zeroes.
    Discard,
    /// Its space is given back.
    Unmap,
    /// Its space is kept.
    Keep,
}

impl Engine {
    /// Has a range read as zeroes; its clusters are locked for this request alone.
    pub async fn zero(&self, mut position: u64, mut length: u64, how: Zeroing) -> io::Result<()> {
        if self.external.as_ref().is_some_and(|data| data.raw) {
            return self.zero_raw(position, length, how).await;
        }
        while length > 0 {
            self.prepare().await?;
            let span = self.layout.place(position).span.min(length);
            let span = self.zero_page(position, span, length, how).await?;
            position += span;
            length -= span.min(length);
        }
        Ok(())
    }

    /// The same for what one page describes; returns how many bytes are done.
    async fn zero_page(
        &self,
        position: u64,
        span: u64,
        length: u64,
        how: Zeroing,
    ) -> io::Result<u64> {
        let flagged = self.layout.version > 2;
        if self.has_backing && !flagged {
            // Version 2 has no way to say that a cluster hides what is below it.
            if how != Zeroing::Discard {
                self.write_zeroes(position, span).await?;
            }
            return Ok(span);
        }
        let absent = self.table_span(position).min(length);
        match self.own_table_to_zero(position, absent, how).await {
            Ok(true) => {}
            // There is nothing here, and what is not here reads as zeroes.
            Ok(false) => return Ok(absent),
            // A host without room must not stop a guest from giving space back. What can't be told
            // to read as zeroes stays as it is, as bytes that are less than a cluster do.
            Err(error) if how == Zeroing::Discard && is_full(&error) => return Ok(absent),
            Err(error) => return Err(error),
        }
        let end = locked(&self.tables).size_bytes;
        let zeroed = self
            .change_page(position, |tables, offset, place| {
                let mut rest = Vec::new();
                let mut places = Places::default();
                let mut done = 0;
                while done < span {
                    let at = place.within + done;
                    let index = place.entry + (at >> self.layout.cluster_bits) as usize;
                    let from = at & (self.cluster_bytes() - 1);
                    let to = self.cluster_bytes().min(from + span - done);
                    // What is beyond the end of the disk belongs to nobody.
                    let to_end = if position + done + (to - from) == end {
                        self.cluster_bytes()
                    } else {
                        to
                    };
                    let units = whole_units(&self.layout, from, to_end);
                    let mut touched = units;
                    let mut misplaced = false;
                    self.set_entry(tables, offset, index, |old| {
                        misplaced = self.is_misplaced(old, position + done - from);
                        if misplaced {
                            return *old;
                        }
                        places.had = units != 0 && matches!(old.host, Host::Owned(_));
                        let (new, mask) = self.zeroed(old, units, how, flagged);
                        touched = mask;
                        new
                    })?;
                    if misplaced {
                        return Err(Corrupt);
                    }
                    if places.had {
                        let (a, b) = inside(&self.layout, touched, from, to);
                        places.add(position + done + (a - from), b - a);
                    }
                    for (a, b) in outside(&self.layout, touched, from, to) {
                        rest.push((position + done + (a - from), b - a));
                    }
                    done += to - from;
                }
                Ok((rest, places))
            })
            .await?;
        let (rest, places) = match zeroed {
            Ok(zeroed) => zeroed,
            Err(Corrupt) => return Err(self.corrupt("a bad L2 entry", position).await),
        };
        if self.external.is_some() && how != Zeroing::Keep {
            self.punch_places(&places.ranges).await;
        }
        if how != Zeroing::Discard {
            for (position, len) in rest {
                self.write_zeroes(position, len).await?;
            }
        }
        Ok(span)
    }

    /// Makes sure that there is a table of our own that can tell that `len` bytes, of one table,
    /// read as zeroes; whether there is. None is needed where they do anyhow.
    async fn own_table_to_zero(&self, position: u64, len: u64, how: Zeroing) -> io::Result<bool> {
        if self.own_table(position, false).await? {
            return Ok(true);
        }
        if !self.has_backing {
            return Ok(false);
        }
        if how == Zeroing::Discard && self.shows_nothing(position, len).await? {
            return Ok(false);
        }
        self.own_table(position, true).await
    }

    /// Whether what lies below reads as zeroes, as far as that is found out soon.
    async fn shows_nothing(&self, mut position: u64, mut len: u64) -> io::Result<bool> {
        for _ in 0..LOOKS {
            let (found, span) = self.look_up(position, len).await?;
            position += span;
            len -= span.min(len);
            match (found, len) {
                (Found::Zero, 0) => return Ok(true),
                (Found::Zero, _) => {}
                _ => return Ok(false),
            }
        }
        Ok(false)
    }

    /// What an entry becomes when these whole units become zeroes, and of which of them that is
    /// true then.
    fn zeroed(&self, old: &Cluster, units: u32, how: Zeroing, flagged: bool) -> (Cluster, u32) {
        let all = Cluster::all(&self.layout);
        if units == all {
            let zero = if self.has_backing { all } else { 0 };
            let new = match old.host {
                Host::Owned(_) if how == Zeroing::Keep && flagged => Cluster {
                    host: old.host,
                    data: 0,
                    zero: all,
                },
                // Nothing to give up.
                Host::None if zero == 0 || old.zero == all => *old,
                _ => Cluster {
                    host: Host::None,
                    data: 0,
                    zero,
                },
            };
            return (new, all);
        }
        if units == 0 || matches!(old.host, Host::Compressed(_)) {
            return (*old, 0);
        }
        // Subclusters.
        let mut new = Cluster {
            host: old.host,
            data: old.data & !units,
            zero: old.zero | units,
        };
        if new.data == 0 && how != Zeroing::Keep {
            new.host = Host::None;
        }
        (new, units)
    }

    /// Writes zeroes as data, where there is anything else.
    async fn write_zeroes(&self, mut position: u64, mut len: u64) -> io::Result<()> {
        while len > 0 {
            let step = len.min(super::BOUNCE);
            if !self.is_zero(position, step).await? {
                let (_, mut buffers) = own(step as usize)?;
                self.write_alone(position, &mut buffers).await?;
            }
            position += step;
            len -= step;
        }
        Ok(())
    }
}

/// Ranges of the disk that had data.
#[derive(Default)]
struct Places {
    ranges: Vec<(u64, u64)>,
    /// What is looked at had.
    had: bool,
}

impl Places {
    /// One behind those that there are.
    fn add(&mut self, position: u64, len: u64) {
        match self.ranges.last_mut() {
            Some((start, before)) if *start + *before == position => *before += len,
            _ if len == 0 => {}
            _ => self.ranges.push((position, len)),
        }
    }
}

/// Units that lie wholly within the bytes `from` to `to` of a cluster.
fn whole_units(layout: &Layout, from: u64, to: u64) -> u32 {
    let unit = layout.unit_bytes();
    let (first, end) = (from.div_ceil(unit), to / unit);
    (first..end).fold(0, |mask, unit| mask | 1_u32.wrapping_shl(unit as u32))
}

/// The bytes of `from` to `to` that are in these units, which lie in a row.
fn inside(layout: &Layout, units: u32, from: u64, to: u64) -> (u64, u64) {
    let unit = layout.unit_bytes();
    let first = u64::from(units.trailing_zeros().min(32 - units.leading_zeros())) * unit;
    let end = u64::from(32 - units.leading_zeros()) * unit;
    (first.clamp(from, to), end.clamp(from, to))
}

/// The bytes of `from` to `to` that are not in these units, which lie in a row.
fn outside(layout: &Layout, units: u32, from: u64, to: u64) -> Vec<(u64, u64)> {
    if units == 0 {
        return vec![(from, to)];
    }
    let unit = layout.unit_bytes();
    let first = u64::from(units.trailing_zeros()) * unit;
    let end = u64::from(32 - units.leading_zeros()) * unit;
    let ranges = [(from, first.min(to)), (end.max(from), to)];
    ranges.into_iter().filter(|(from, to)| from < to).collect()
}

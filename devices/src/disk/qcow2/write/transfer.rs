//! Data: from where the tables say it is into the guest's memory, and from there to a place in the
//! file.
//!
//! What the host can take as it is goes straight; compressed clusters, and what O_DIRECT does not
//! take, go through memory of our own, of which there is so much at a time.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::super::super::buffers::{AlignedBuffer, Buffers};
use super::super::chain::{Alignment, Found, enclosing};
use super::engine::{Engine, Tickets, filled, own};
use super::io::Kind as Do;
use super::lock::{RangeGuard, locked};

/// What goes through memory of our own is hardly ever smaller.
const SMALLEST: u64 = 4096;

impl Engine {
    /// Reads from the disk, as the guest sees it; the clusters are locked.
    pub async fn read(&self, mut position: u64, buffers: &mut Buffers) -> io::Result<()> {
        let mut tickets = Tickets::default();
        while buffers.len_bytes() > 0 {
            let (found, span) = match self.look_up(position, buffers.len_bytes()).await {
                Ok(found) => found,
                Err(error) => {
                    tickets.note(Err(error));
                    break;
                }
            };
            let mut piece = Buffers::default();
            buffers.split_to(span, &mut piece);
            match found {
                Found::Zero => piece.zero(),
                Found::Data(layer, offset) => {
                    let direct = self.chain.layers.get(usize::from(layer));
                    let direct = direct.and_then(|layer| layer.direct);
                    if is_straight(direct, offset, &piece) {
                        let ticket = self.begin_on(layer, Do::Read, offset, 0, piece);
                        tickets.add(ticket).await;
                    } else {
                        tickets.note(self.read_bounced(layer, direct, offset, piece).await);
                    }
                }
                Found::Compressed(layer, cluster, within) => {
                    let name = (layer, cluster);
                    let held = locked(&self.inflated).holds(name);
                    let mut place = None;
                    if !held {
                        let number = position >> self.layout.cluster_bits;
                        place = Some(self.bounce_place(number).await);
                    }
                    // Somebody may have read it meanwhile.
                    if !locked(&self.inflated).holds(name) {
                        let read = self.read_raw(layer, cluster.offset, cluster.len).await;
                        let filled = read.and_then(|(memory, skip)| {
                            let layer = self.chain.layers.get(usize::from(layer));
                            let layout = layer.and_then(|l| l.layout()).ok_or(Errno::IO)?;
                            let bytes = memory.bytes().get(skip..skip + cluster.len);
                            locked(&self.inflated).fill(name, layout, bytes.unwrap_or(&[]))
                        });
                        if let Err(error) = filled {
                            tickets.note(Err(error));
                            break;
                        }
                    }
                    // Nothing was awaited since.
                    locked(&self.inflated).copy(within, &piece);
                    drop(place);
                }
            }
            position += span;
        }
        tickets.wait().await
    }

    /// A place among those who read or write through memory of our own. What is read of one
    /// compressed cluster may be as much as two.
    async fn bounce_place(&self, number: u64) -> RangeGuard {
        let layouts = self.chain.layers.iter().filter_map(|layer| layer.layout());
        let clusters = layouts.map(|layout| 2 * layout.cluster_bytes() as u64);
        let most = clusters.fold(super::BOUNCE, u64::max);
        let place = number % (super::COPY_BYTES / most).clamp(4, 256);
        self.bounces.lock(place, place, true).await
    }

    async fn read_raw(
        &self,
        layer: u16,
        offset: u64,
        len: usize,
    ) -> io::Result<(Arc<AlignedBuffer>, usize)> {
        let direct = self.chain.layers.get(usize::from(layer));
        let direct = direct.and_then(|layer| layer.direct);
        let (start, skip, total) = enclosing(direct, offset, len);
        let (memory, buffers) = own(total)?;
        self.begin_on(layer, Do::Read, start, 0, buffers)
            .wait()
            .await
            .0?;
        Ok((memory, skip))
    }

    async fn read_bounced(
        &self,
        layer: u16,
        direct: Option<Alignment>,
        mut offset: u64,
        mut piece: Buffers,
    ) -> io::Result<()> {
        while piece.len_bytes() > 0 {
            let len = piece.len_bytes().min(super::BOUNCE);
            let _place = self.bounce_place(offset / SMALLEST).await;
            let (start, skip, total) = enclosing(direct, offset, len as usize);
            let (memory, buffers) = own(total)?;
            self.begin_on(layer, Do::Read, start, 0, buffers)
                .wait()
                .await
                .0?;
            let bytes = memory.bytes().get(skip..skip + len as usize);
            piece.copy_from(bytes.unwrap_or(&[]));
            piece.advance(len);
            offset += len;
        }
        Ok(())
    }

    /// Writes data to a place in the file that is ours; offset and length are multiples of the
    /// host's blocks.
    pub async fn write_host(&self, mut offset: u64, mut buffers: Buffers) -> io::Result<()> {
        let (file, direct) = self.data_file();
        if is_straight(direct, offset, &buffers) {
            let write = self.begin_on(file, Do::Write, offset, 0, buffers);
            return write.wait().await.0;
        }
        while buffers.len_bytes() > 0 {
            let len = buffers.len_bytes().min(super::BOUNCE);
            let _place = self.bounce_place(offset / SMALLEST).await;
            let mut memory = AlignedBuffer::zeroed(len as usize, 4096)?;
            buffers.copy_to(memory.bytes_mut());
            let (_, bounce) = filled(memory)?;
            let write = self.begin_on(file, Do::Write, offset, 0, bounce);
            write.wait().await.0?;
            buffers.advance(len);
            offset += len;
        }
        Ok(())
    }
}

/// Whether the host can take the buffers as they are.
pub fn is_straight(direct: Option<Alignment>, offset: u64, buffers: &Buffers) -> bool {
    direct.is_none_or(|direct| {
        (offset | buffers.len_bytes()).is_multiple_of(direct.file.into())
            && buffers.is_aligned(direct.memory, direct.file)
    })
}

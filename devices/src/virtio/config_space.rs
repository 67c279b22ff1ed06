//! Reads of a device's configuration space out of an image of it.

/// Copies `image[offset..]` into `data`; bytes past the end of the image read as zero.
pub fn read(image: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|start| image.get(start..));
    let rest = rest.unwrap_or_default();
    let present = rest.len().min(data.len());
    let (head, tail) = data.split_at_mut(present);
    head.copy_from_slice(&rest[..present]);
    tail.fill(0);
}

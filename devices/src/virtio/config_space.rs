//! Helpers to read and write a device-specific configuration space (virtio 1.3 §2.5) of any width
//! at any offset.
//!
//! A device keeps its configuration as the bytes the driver sees, little-endian; what lies past
//! their end reads as zeroes and can't be written.

/// Copies `image` from `offset` on into `data`; bytes past the end of the image read as zeroes.
pub fn read(image: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| image.get(offset..))
        .unwrap_or_default();
    let covered = rest.len().min(data.len());
    let (head, tail) = data.split_at_mut(covered);
    head.copy_from_slice(&rest[..covered]);
    tail.fill(0);
}

/// Copies `data` into `image` from `offset` on; bytes past the end of the image are dropped.
pub fn write(image: &mut [u8], offset: u64, data: &[u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| image.get_mut(offset..))
        .unwrap_or_default();
    for (byte, value) in rest.iter_mut().zip(data) {
        *byte = *value;
    }
}

/// The byte that a write of `data` at `offset` puts at `field`, if it reaches there: for devices
/// of whose configuration only a byte or two are writable.
pub fn byte_written(field: u64, offset: u64, data: &[u8]) -> Option<u8> {
    let index = field.checked_sub(offset)?;
    data.get(usize::try_from(index).ok()?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_inside_across_and_past_the_end_give_bytes_then_zeroes() {
        let image = [1, 2, 3, 4];
        let mut data = [0xff; 4];
        read(&image, 0, &mut data);
        assert_eq!(data, [1, 2, 3, 4]);
        read(&image, 2, &mut data);
        assert_eq!(data, [3, 4, 0, 0]);
        for offset in [4, 5, u64::from(u32::MAX), u64::MAX] {
            data.fill(0xff);
            read(&image, offset, &mut data);
            assert_eq!(data, [0; 4]);
        }
        read(&image, 0, &mut []);
    }

    #[test]
    fn writes_past_the_end_are_dropped() {
        let mut image = [0; 4];
        write(&mut image, 3, &[1, 2, 3]);
        write(&mut image, 4, &[9]);
        write(&mut image, u64::MAX, &[9, 9]);
        assert_eq!(image, [0, 0, 0, 1]);
    }

    #[test]
    fn the_byte_written_to_a_field_is_found_in_a_write_that_covers_it() {
        assert_eq!(byte_written(32, 32, &[7]), Some(7));
        assert_eq!(byte_written(32, 30, &[1, 2, 3, 4]), Some(3));
        assert_eq!(byte_written(32, 33, &[1]), None);
        assert_eq!(byte_written(32, 28, &[1, 2, 3, 4]), None);
        assert_eq!(byte_written(u64::MAX, 0, &[1]), None);
    }
}

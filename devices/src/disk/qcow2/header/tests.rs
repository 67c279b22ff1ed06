//! Headers as they are, and as no image has them.

use proptest::prelude::*;

use super::*;

/// A version 3 header as qemu-img writes it: 1 GiB, clusters of 64 KiB.
fn sample() -> Vec<u8> {
    let mut bytes = vec![0; 65536];
    let mut put = |offset: usize, field: &[u8]| {
        bytes[offset..offset + field.len()].copy_from_slice(field);
    };
    put(0, MAGIC);
    put(4, &3_u32.to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &(1_u64 << 30).to_be_bytes());
    put(36, &2_u32.to_be_bytes());
    put(40, &0x3_0000_u64.to_be_bytes());
    put(48, &0x1_0000_u64.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &112_u32.to_be_bytes());
    bytes
}

fn with(changes: &[(usize, &[u8])]) -> Result<Header, Unusable> {
    let mut bytes = sample();
    for (offset, field) in changes {
        bytes[*offset..*offset + field.len()].copy_from_slice(field);
    }
    Header::parse(&bytes)
}

#[test]
fn a_plain_header_says_what_it_says() {
    let header = Header::parse(&sample()).unwrap();
    assert_eq!(header.version, 3);
    assert_eq!(header.cluster_bits, 16);
    assert_eq!(header.size_bytes, 1 << 30);
    assert_eq!((header.l1_offset, header.l1_entries), (0x3_0000, 2));
    assert_eq!(header.backing, None);
    assert_eq!(header.compression, Compression::Zlib);
}

#[test]
fn an_unknown_incompatible_feature_is_refused_by_bit_and_name() {
    let bit = 1_u64 << 5;
    let refused = with(&[(72, &bit.to_be_bytes())]).unwrap_err().to_string();
    assert_eq!(refused, "not supported: incompatible feature bit 5");
    let mut names = [0; 56];
    names[..8].copy_from_slice(&[0x68, 3, 0xf8, 0x57, 0, 0, 0, 48]);
    names[8..16].copy_from_slice(b"\0\x05shiny\n");
    let refused = with(&[(72, &bit.to_be_bytes()), (112, &names)]).unwrap_err();
    let refused = refused.to_string();
    assert_eq!(
        refused,
        "not supported: incompatible feature bit 5 `shiny\\n`"
    );
    let external = with(&[(72, &4_u64.to_be_bytes())]).unwrap_err().to_string();
    assert!(external.contains("external data file"), "{external}");
    assert!(with(&[(88, &2_u64.to_be_bytes())]).unwrap().data.is_none());
    let luks = with(&[(32, &2_u32.to_be_bytes())]).unwrap_err().to_string();
    assert!(luks.contains("encryption (LUKS)"), "{luks}");
}

#[test]
fn numbers_that_no_image_has_are_refused() {
    let refused: &[(usize, &[u8])] = &[
        (0, b"QFI\0"),
        (4, &1_u32.to_be_bytes()),
        (4, &4_u32.to_be_bytes()),
        (20, &8_u32.to_be_bytes()),
        (20, &22_u32.to_be_bytes()),
        (24, &u64::MAX.to_be_bytes()),
        (24, &(1_u64 << 63).to_be_bytes()),
        (36, &u32::MAX.to_be_bytes()),
        (36, &1_u32.to_be_bytes()),
        (40, &0_u64.to_be_bytes()),
        (40, &0x3_0200_u64.to_be_bytes()),
        (40, &(1_u64 << 63).to_be_bytes()),
        (48, &0_u64.to_be_bytes()),
        (56, &0_u32.to_be_bytes()),
        (56, &u32::MAX.to_be_bytes()),
        (60, &65537_u32.to_be_bytes()),
        (60, &1_u32.to_be_bytes()),
        (72, &8_u64.to_be_bytes()),
        (96, &7_u32.to_be_bytes()),
        (100, &96_u32.to_be_bytes()),
        (100, &109_u32.to_be_bytes()),
        (100, &u32::MAX.to_be_bytes()),
        (104, &[1]),
    ];
    for (offset, field) in refused {
        assert!(
            with(&[(*offset, field)]).is_err(),
            "{offset} {}",
            field.escape_ascii()
        );
    }
}

#[test]
fn a_backing_name_outside_of_the_first_cluster_is_refused() {
    let backing = |offset: u64, len: u32| {
        with(&[(8, &offset.to_be_bytes()), (16, &len.to_be_bytes())]).map(|h| h.backing)
    };
    assert!(backing(65530, 7).is_err());
    assert!(backing(u64::MAX, 7).is_err());
    assert!(backing(4096, 1024).is_err());
    assert!(backing(16, 10).is_err());
    assert_eq!(backing(0, 10), Ok(None));
    let found = backing(4096, 3).unwrap().unwrap();
    assert_eq!(found.name, [0, 0, 0]);
    assert_eq!(found.format, None);
}

proptest! {
    #[test]
    fn no_header_panics(
        changes in prop::collection::vec((0_usize..256, any::<u8>()), 0..12),
        len in 0_usize..600,
    ) {
        let mut bytes = sample();
        for (offset, byte) in changes {
            bytes[offset] = byte;
        }
        let _ = Header::parse(&bytes);
        bytes.truncate(len);
        let _ = Header::parse(&bytes);
    }
}

use std::path::Path;
use std::sync::Arc;

use linux_loader::start_info::XEN_HVM_MEMMAP_TYPE_RAM;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::boot::test_payload::{CODE, bz_image, elf, file, kernel};
use crate::config::PayloadConfig;

const MIB: u64 = 1 << 20;
const RSDP: GuestAddress = GuestAddress(0xe_0000);

fn ram(bytes: u64) -> GuestRam {
    Arc::new(GuestMemoryMmap::from_ranges(&crate::memory::ranges(bytes)).unwrap())
}

/// The field and reason of a refusal.
fn refused(config: &PayloadConfig) -> (String, String) {
    match Payload::open(config) {
        Err(Error::Invalid(invalid)) => (invalid.field, invalid.reason),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pvh_kernel_finds_its_command_line_module_memory_and_acpi() {
    let image = file(&elf(b"code"));
    let initramfs = file(&[7; 5000]);
    let payload = Payload::open(&PayloadConfig {
        initramfs: Some(initramfs.path().to_owned()),
        cmdline: Some("console=ttyS0 -- single".to_owned()),
        ..kernel(&image)
    })
    .unwrap();
    payload.fits(64 * MIB).unwrap();
    let ram = ram(64 * MIB);
    let entry = load(&payload, &ram, RSDP).unwrap();
    assert_eq!(entry.protocol, Protocol::Pvh);
    assert_eq!(entry.address.0, u64::from(CODE));
    let mut code = [0; 4];
    ram.read_slice(&mut code, entry.address).unwrap();
    assert_eq!(&code, b"code");
    let info: hvm_start_info = ram.read_obj(BOOT_INFO).unwrap();
    assert_eq!(info.magic, XEN_HVM_START_MAGIC_VALUE);
    assert_eq!(info.rsdp_paddr, RSDP.0);
    let mut text = [0; 24];
    ram.read_slice(&mut text, GuestAddress(info.cmdline_paddr))
        .unwrap();
    assert_eq!(&text, b"console=ttyS0 -- single\0");
    assert_eq!(info.nr_modules, 1);
    let module: hvm_modlist_entry = ram.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!(module.size, 5000);
    assert_eq!(module.paddr, 64 * MIB - 8192);
    let mut contents = vec![0; 5000];
    ram.read_slice(&mut contents, GuestAddress(module.paddr))
        .unwrap();
    assert_eq!(contents, [7; 5000]);
    assert!(info.memmap_entries >= 4);
    let first: hvm_memmap_table_entry = ram.read_obj(GuestAddress(info.memmap_paddr)).unwrap();
    assert_eq!(
        (first.addr, first.size, first.type_),
        (0, 0xa_0000, XEN_HVM_MEMMAP_TYPE_RAM)
    );
    // A reboot loads it again.
    assert_eq!(load(&payload, &ram, RSDP).unwrap(), entry);
}

#[test]
fn a_bzimage_finds_the_same_in_its_zero_page() {
    let image = file(&bz_image(b"code"));
    let initramfs = file(&[7; 5000]);
    let payload = Payload::open(&PayloadConfig {
        initramfs: Some(initramfs.path().to_owned()),
        cmdline: Some("quiet".to_owned()),
        ..kernel(&image)
    })
    .unwrap();
    let ram = ram(5 << 30);
    let entry = load(&payload, &ram, RSDP).unwrap();
    assert_eq!(entry.protocol, Protocol::Linux64);
    let mut code = [0; 4];
    ram.read_slice(&mut code, entry.address).unwrap();
    assert_eq!(&code, b"code");
    let zero_page: boot_params = ram.read_obj(BOOT_INFO).unwrap();
    assert_eq!({ zero_page.acpi_rsdp_addr }, RSDP.0);
    assert_eq!({ zero_page.hdr.header }, u32::from_le_bytes(*b"HdrS"));
    assert_eq!({ zero_page.hdr.cmd_line_ptr }, CMDLINE.0 as u32);
    assert_eq!({ zero_page.hdr.ramdisk_size }, 5000);
    // Below the limit that the kernel names, though RAM goes on.
    assert_eq!({ zero_page.hdr.ramdisk_image }, 0x8000_0000 - 8192);
    let last = zero_page.e820_table[usize::from(zero_page.e820_entries) - 1];
    assert_eq!((last.addr, last.size), (4 << 30, 2 << 30));
}

#[test]
fn truncated_and_random_kernels_are_refused_by_name() {
    let mut random = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        random = random.wrapping_mul(6_364_136_223_846_793_005) + 1;
        (random >> 56) as u8
    })
    .take(4096)
    .collect();
    let elf = elf(&[0x90; 64]);
    let bz_image = bz_image(&[0x90; 64]);
    let mut images = vec![noise, vec![0; 4096], b"MZ".to_vec()];
    images.extend((1..elf.len()).step_by(7).map(|len| elf[..len].to_vec()));
    images.extend(
        (1..bz_image.len())
            .step_by(13)
            .map(|l| bz_image[..l].to_vec()),
    );
    for image in images {
        assert_eq!(refused(&kernel(&file(&image))).0, "kernel");
    }
    assert_eq!(
        refused(&PayloadConfig {
            firmware: Some(file(&bz_image).path().to_owned()),
            ..PayloadConfig::default()
        })
        .0,
        "firmware"
    );
}

#[test]
fn no_change_of_a_byte_in_a_header_makes_loading_panic() {
    for (image, header) in [
        (elf(&[0x90; 64]), 64 + 3 * 56 + 40),
        (bz_image(&[0x90]), 0x270),
    ] {
        for at in 0..header {
            for value in [0, 0x7f, 0xff] {
                let mut image = image.clone();
                image[at] = value;
                let image = file(&image);
                if let Ok(payload) = Payload::open(&kernel(&image))
                    && payload.fits(16 * MIB).is_ok()
                {
                    load(&payload, &ram(16 * MIB), RSDP).unwrap();
                }
            }
        }
    }
}

#[test]
fn what_is_no_regular_file_is_refused_without_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let image = file(&elf(b"code"));
    let empty = file(b"");
    for (path, reason) in [
        (folder.path(), "not a regular file"),
        (fifo.as_path(), "not a regular file"),
        (Path::new("/dev/null"), "not a regular file"),
        (Path::new("/no/such/file"), "No such file"),
        (empty.path(), "empty"),
    ] {
        let (field, text) = refused(&PayloadConfig {
            kernel: Some(path.to_owned()),
            ..PayloadConfig::default()
        });
        assert_eq!(field, "kernel");
        assert!(text.contains(reason), "{text}");
        let (field, text) = refused(&PayloadConfig {
            initramfs: Some(path.to_owned()),
            ..kernel(&image)
        });
        assert_eq!(field, "initramfs");
        assert!(text.contains(reason), "{text}");
    }
}

#[test]
fn kernels_and_initramfs_that_do_not_fit_are_refused() {
    let mut big = elf(b"code");
    // The segment's size in memory.
    big[64 + 56 + 40..64 + 56 + 48].copy_from_slice(&(32 * MIB).to_le_bytes());
    let big = file(&big);
    let payload = Payload::open(&kernel(&big)).unwrap();
    payload.fits(64 * MIB).unwrap();
    let error = payload.fits(32 * MIB).unwrap_err();
    assert!(matches!(error, Error::Invalid(i) if i.field == "kernel"));

    let image = file(&elf(b"code"));
    let initramfs = tempfile::NamedTempFile::new().unwrap();
    initramfs.as_file().set_len(20 * MIB).unwrap();
    let payload = Payload::open(&PayloadConfig {
        initramfs: Some(initramfs.path().to_owned()),
        ..kernel(&image)
    })
    .unwrap();
    payload.fits(32 * MIB).unwrap();
    let error = payload.fits(16 * MIB).unwrap_err();
    assert!(matches!(error, Error::Invalid(i) if i.field == "initramfs"));
    assert!(load(&payload, &ram(16 * MIB), RSDP).is_err());
}

#[test]
fn segments_outside_of_ram_are_refused() {
    for paddr in [0u64, 0xe_0000, 0xc000_0000, 1 << 32, u64::MAX - 8] {
        let mut image = elf(b"code");
        image[64 + 56 + 24..64 + 56 + 32].copy_from_slice(&paddr.to_le_bytes());
        let (field, reason) = refused(&kernel(&file(&image)));
        assert_eq!(field, "kernel");
        assert!(reason.contains("no RAM"), "{reason}");
    }
}

#[test]
fn a_command_line_longer_than_the_kernel_takes_is_refused() {
    let image = file(&bz_image(b"code"));
    let (_, reason) = refused(&PayloadConfig {
        cmdline: Some("x".repeat(2048)),
        ..kernel(&image)
    });
    assert!(reason.contains("2047"), "{reason}");
}

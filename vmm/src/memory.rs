//! The guest's RAM as the host provides it: where it lies, how it is mapped, and how KVM learns of
//! it.
//!
//! Mappings are private and anonymous unless the configuration asks for more. They begin at
//! multiples of 2 MiB, so that transparent huge pages can back the same pages of guest and host.
#![expect(
    unsafe_code,
    reason = "madvise on guest RAM and KVM's memory slots take raw addresses"
)]

use std::fs::File;
use std::io;
use std::os::linux::fs::MetadataExt;
use std::sync::Arc;

use devices::allow;
use devices::config::Invalid;
use devices::guest_memory::GuestRam;
use devices::sandbox::{Allow, Test};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use libc::{
    MAP_ANONYMOUS, MAP_HUGE_1GB, MAP_HUGE_2MB, MAP_HUGETLB, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED,
    PROT_READ, PROT_WRITE,
};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use crate::config::MemoryConfig;
use crate::error::Error;
use crate::ioctls::KVM_SET_USER_MEMORY_REGION;
use crate::layout::{HOLE_END, HOLE_START};
use crate::overcommit::cost::SharedRam;

mod host;

/// What [`check`], [`allocate`] and [`attach`] call beyond [`devices::sandbox::COMMON`].
pub const SYSCALLS: &[Allow] = &[
    allow!(fallocate),
    allow!(fcntl, 1 => Test::Is(libc::F_ADD_SEALS as u32)),
    allow!(ftruncate),
    allow!(ioctl, 1 => Test::Is(KVM_SET_USER_MEMORY_REGION)),
    allow!(memfd_create),
    // /proc and /sys, read only.
    allow!(openat, 2 => Test::Without((libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT) as u64)),
    allow!(read),
    allow!(statx),
    allow!(lseek),
];

const HUGE: usize = 2 << 20;

/// Where `size` bytes of RAM lie in the guest's physical address space: below the hole, and from
/// its end on.
pub fn ranges(size: u64) -> Vec<(GuestAddress, usize)> {
    let low = size.min(HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GuestAddress(HOLE_END), (size - low) as usize));
    }
    ranges
}

/// How much of the host's memory the file behind shared RAM has; nothing where RAM is private.
pub fn shared_usage(ram: &GuestRam, hugetlb: bool) -> SharedRam {
    // All regions are parts of one file.
    let file = ram.iter().find_map(|region| region.file_offset());
    let metadata = file.and_then(|offset| offset.file().metadata().ok());
    metadata.map_or_else(SharedRam::default, |metadata| SharedRam {
        bytes: metadata.st_blocks().saturating_mul(512),
        hugetlb,
    })
}

/// Checks the configuration against the host, before anything is allocated. Fields are named as
/// seen from `memory`.
pub fn check(config: &MemoryConfig) -> Result<(), Error> {
    if config.hugepages {
        let page = host::huge_page(config)?;
        if !config.size.is_multiple_of(page) {
            return Err(Invalid::new(
                "size",
                format!("must be a multiple of the huge page size, {page} bytes"),
            )
            .into());
        }
    } else if config.reserve || config.prefault {
        let total = host::total();
        if config.size > total {
            let field = if config.reserve {
                "reserve"
            } else {
                "prefault"
            };
            return Err(Invalid::new(
                "size",
                format!(
                    "{} bytes can't be had with `{field}`: the host has {total}",
                    config.size
                ),
            )
            .into());
        }
    }
    if config.mergeable && !host::has_ksm() {
        return Err(Invalid::new("mergeable", "this host's kernel has no KSM").into());
    }
    Ok(())
}

/// Maps RAM. Called on the VMM thread; with `prefault` (or `shared` and `reserve`) it takes as
/// long as the host needs to clear all of it.
pub fn allocate(config: &MemoryConfig) -> Result<GuestRam, Error> {
    let plan = Plan::new(config)?;
    let mut regions = Vec::new();
    let mut offset = 0;
    for (base, len) in ranges(config.size) {
        let mapping = plan.map(len, offset)?;
        offset += len as u64;
        plan.advise(&mapping)?;
        let region = GuestRegionMmap::new(mapping, base)
            .ok_or_else(|| Error::host("mapping guest memory", "addresses overflow"))?;
        regions.push(region);
    }
    let ram = GuestMemoryMmap::from_regions(regions)
        .map_err(|error| Error::host("mapping guest memory", error))?;
    if config.prefault {
        plan.prefault(&ram)?;
    }
    Ok(Arc::new(ram))
}

/// Gives RAM to the VM, one KVM memory slot for each range.
///
/// Whoever runs the VM's vCPUs keeps `ram` alive as long as they run ([`crate::vcpu`] does):
/// afterwards the addresses may belong to something else.
pub fn attach(vm: &VmFd, ram: &GuestRam) -> Result<(), Error> {
    for (slot, region) in (0..).zip(ram.iter()) {
        let memory = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped, as long as it says, while `ram` lives; the vCPU threads,
        // without which nothing reaches the memory through KVM, hold on to `ram`.
        unsafe { vm.set_user_memory_region(memory) }.map_err(not_attached)?;
    }
    Ok(())
}

/// KVM keeps books about each page of a slot, which for much RAM is much memory.
fn not_attached(error: kvm_ioctls::Error) -> Error {
    if error.errno() == libc::ENOMEM {
        Error::OutOfMemory("KVM has none to manage the guest's with".to_owned())
    } else {
        Error::host("giving memory to the VM", error)
    }
}

/// Reserved addresses with an aligned gap amidst them; dropping it gives them back.
struct Gap {
    pieces: [(usize, usize); 2],
}

impl Gap {
    fn aligned(len: usize) -> Option<Self> {
        let len = len.checked_next_multiple_of(4096)?;
        let all = len.checked_add(HUGE)?;
        // SAFETY: a fresh mapping, wherever the kernel likes.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                all,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .ok()? as usize;
        let gap = start.next_multiple_of(HUGE);
        let end = gap + len;
        unmap(gap, len);
        Some(Self {
            pieces: [(start, gap - start), (end, start + all - end)],
        })
    }
}

impl Drop for Gap {
    fn drop(&mut self) {
        for (start, len) in self.pieces {
            unmap(start, len);
        }
    }
}

/// Unmaps a piece of what [`Gap::aligned`] mapped.
fn unmap(start: usize, len: usize) {
    if len > 0 {
        // SAFETY: only called with pages that `Gap::aligned` has just mapped and nobody else
        // knows of.
        // It can fail only for lack of memory to note the split; then addresses are lost.
        let _ = unsafe { rustix::mm::munmap(start as *mut _, len) };
    }
}

/// How RAM is to be mapped.
struct Plan<'a> {
    config: &'a MemoryConfig,
    flags: i32,
    file: Option<Arc<File>>,
    huge_page: Option<u64>,
}

impl<'a> Plan<'a> {
    fn new(config: &'a MemoryConfig) -> Result<Self, Error> {
        let huge_page = config
            .hugepages
            .then(|| host::huge_page(config))
            .transpose()?;
        let mut plan = Self {
            config,
            flags: 0,
            file: None,
            huge_page,
        };
        plan.flags = match (config.shared, huge_page) {
            (true, _) => MAP_SHARED,
            (false, None) => MAP_PRIVATE | MAP_ANONYMOUS,
            (false, Some(page)) => {
                let size = if page == 1 << 30 {
                    MAP_HUGE_1GB
                } else {
                    MAP_HUGE_2MB
                };
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | size
            }
        };
        // Huge pages that are not reserved end in SIGBUS when the pool runs dry.
        if !config.reserve && huge_page.is_none() {
            plan.flags |= MAP_NORESERVE;
        }
        if config.shared {
            plan.file = Some(Arc::new(plan.memfd()?));
        }
        Ok(plan)
    }

    fn memfd(&self) -> Result<File, Error> {
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        match self.huge_page {
            None => {}
            Some(page) if page == 1 << 30 => flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
            Some(_) => flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        }
        let size = self.config.size;
        let file: File = rustix::fs::memfd_create("guest-ram", flags)
            .map_err(|error| self.failed("making a memfd", error.into()))?
            .into();
        rustix::fs::ftruncate(&file, size)
            .map_err(|error| self.failed("sizing the memfd", error.into()))?;
        // Whoever maps it too must not be able to pull pages out from under the guest.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|error| self.failed("sealing the memfd", error.into()))?;
        if self.config.reserve && self.huge_page.is_none() {
            // Pages of a memfd are accounted for as they come, whatever the mapping asks for, so
            // to reserve them is to have them.
            self.check_room()?;
            loop {
                match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size) {
                    Ok(()) => break,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(self.failed("reserving memory", error.into())),
                }
            }
        }
        Ok(file)
    }

    /// Maps `len` bytes (of the file, from `offset` on).
    fn map(&self, len: usize, offset: u64) -> Result<MmapRegion, Error> {
        let build = || {
            let builder = MmapRegionBuilder::new(len)
                .with_mmap_prot(PROT_READ | PROT_WRITE)
                .with_mmap_flags(self.flags)
                .with_hugetlbfs(self.huge_page.is_some());
            match &self.file {
                Some(file) => builder.with_file_offset(FileOffset::from_arc(file.clone(), offset)),
                None => builder,
            }
            .build()
            .map_err(|error| match error {
                MmapRegionError::Mmap(error) => self.failed("mapping memory", error),
                other => Error::host("mapping guest memory", other),
            })
        };
        // The kernel aligns by itself where it is new enough and the length a multiple of 2 MiB.
        // Elsewhere, leave it just one gap to choose: the one at the right place. Should it (or
        // another thread) choose otherwise, alignment is lost and nothing else.
        for _ in 0..8 {
            let mapping = build()?;
            if (mapping.as_ptr() as usize).is_multiple_of(HUGE) {
                return Ok(mapping);
            }
            drop(mapping);
            let Some(_around) = Gap::aligned(len) else {
                break;
            };
            let mapping = build()?;
            if (mapping.as_ptr() as usize).is_multiple_of(HUGE) {
                return Ok(mapping);
            }
        }
        build()
    }

    fn advise(&self, mapping: &MmapRegion) -> Result<(), Error> {
        self.madvise(mapping, Advice::LinuxDontDump)
            .map_err(|error| self.failed("keeping memory out of core dumps", error))?;
        if self.config.mergeable {
            self.madvise(mapping, Advice::LinuxMergeable)
                .map_err(|error| self.failed("making memory mergeable", error))?;
        }
        if self.huge_page.is_none() {
            let advice = if self.config.thp {
                Advice::LinuxHugepage
            } else {
                Advice::LinuxNoHugepage
            };
            match self.madvise(mapping, advice) {
                // A kernel without transparent huge pages: then there are none, as with many a
                // host that has switched them off.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    tracing::debug!("the host has no transparent huge pages");
                }
                other => other.map_err(|error| self.failed("asking for huge pages", error))?,
            }
        }
        Ok(())
    }

    fn prefault(&self, ram: &GuestMemoryMmap) -> Result<(), Error> {
        self.check_room()?;
        for region in ram.iter() {
            loop {
                match self.madvise(region, Advice::LinuxPopulateWrite) {
                    Ok(()) => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(self.failed("prefaulting memory", error)),
                }
            }
        }
        Ok(())
    }

    fn madvise(&self, mapping: &MmapRegion, advice: Advice) -> io::Result<()> {
        // SAFETY: the range is just the mapping, and none of the advices used here takes away or
        // changes what is in it.
        unsafe { rustix::mm::madvise(mapping.as_ptr().cast(), mapping.size(), advice) }
            .map_err(Into::into)
    }

    /// Refuses to fill more memory than there is, before the host's OOM killer looks for a victim.
    fn check_room(&self) -> Result<(), Error> {
        if self.huge_page.is_some() {
            return Ok(());
        }
        let available = host::available();
        if self.config.size > available {
            return Err(Error::OutOfMemory(format!(
                "{} bytes are asked for, {available} are available",
                self.config.size
            )));
        }
        Ok(())
    }

    fn failed(&self, doing: &str, error: io::Error) -> Error {
        match error.raw_os_error() {
            // EFAULT: populating met what an ordinary access would have met with SIGBUS.
            Some(libc::ENOMEM | libc::ENOSPC | libc::EFAULT) => {
                let available = match self.huge_page {
                    Some(page) => host::huge_pages_free(page).saturating_mul(page),
                    None => host::available(),
                };
                let kind = match self.huge_page {
                    Some(_) => "bytes of huge pages",
                    None => "bytes",
                };
                Error::OutOfMemory(format!(
                    "{doing}: {} {kind} are asked for, {available} are available",
                    self.config.size
                ))
            }
            _ => Error::os(format!("{doing} for the guest"), error),
        }
    }
}

#[cfg(test)]
mod tests;

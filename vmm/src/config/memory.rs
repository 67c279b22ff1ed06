//! RAM.

use devices::config::Invalid;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

const MIB: u64 = 1 << 20;

/// The guest's RAM and how the host provides it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryConfig {
    /// Bytes: a multiple of 4096 (of the huge page size with `hugepages`), at least 16 MiB.
    #[schema(
        minimum = 16777216,
        maximum = 35184372088832_u64,
        multiple_of = 4096,
        example = 536870912
    )]
    pub size: u64,
    /// Let KSM merge equal pages (MADV_MERGEABLE); only private memory can be.
    #[serde(default)]
    pub mergeable: bool,
    /// Map a memfd shared instead of anonymous memory, so that other processes can map it too.
    #[serde(default)]
    pub shared: bool,
    /// Take huge pages from the host's pool (hugetlb).
    #[serde(default)]
    pub hugepages: bool,
    /// Size of those in bytes: 2 MiB or 1 GiB; the host's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = 2097152)]
    pub hugepage_size: Option<u64>,
    /// Touch every page at boot.
    #[serde(default)]
    pub prefault: bool,
    /// Have the host account for all of it (map without MAP_NORESERVE), and refuse more than the
    /// host has.
    #[serde(default)]
    pub reserve: bool,
    /// Ask for transparent huge pages (MADV_HUGEPAGE).
    #[serde(default = "yes")]
    pub thp: bool,
}

fn yes() -> bool {
    true
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 * MIB,
            mergeable: false,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: false,
            reserve: false,
            thp: true,
        }
    }
}

impl MemoryConfig {
    pub(super) fn validate(&self) -> Result<(), Invalid> {
        if self.size < 16 * MIB {
            return Err(Invalid::new(
                "size",
                format!("is {} bytes, must be at least 16 MiB", self.size),
            ));
        }
        // A memory slot of KVM has fewer than 2^31 pages.
        if self.size > 8 << 40 {
            return Err(Invalid::new("size", "must be at most 8 TiB"));
        }
        let page = match (self.hugepages, self.hugepage_size) {
            (false, None) => 4096,
            (false, Some(_)) => {
                return Err(Invalid::new("hugepage_size", "needs `hugepages: true`"));
            }
            (true, None) => 2 * MIB,
            (true, Some(size)) if size == 2 * MIB || size == 1024 * MIB => size,
            (true, Some(_)) => {
                return Err(Invalid::new(
                    "hugepage_size",
                    "must be 2097152 (2 MiB) or 1073741824 (1 GiB)",
                ));
            }
        };
        if !self.size.is_multiple_of(page) {
            return Err(Invalid::new(
                "size",
                format!("must be a multiple of {page} bytes"),
            ));
        }
        if self.mergeable && (self.shared || self.hugepages) {
            return Err(Invalid::new(
                "mergeable",
                "only private memory of ordinary pages can be merged",
            ));
        }
        Ok(())
    }
}

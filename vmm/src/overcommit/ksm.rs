//! KSM, the kernel's merging of equal pages (Documentation/admin-guide/mm/ksm.rst): what it gains
//! for this process, what it does on the host, and the one explicit way to start and stop it.
//!
//! ballast marks memory as mergeable where the configuration says so; it never starts ksmd. That
//! is the host's decision, as merged pages tell guests about one another's contents by their
//! timing: `ballast host ksm on`.

use std::path::{Path, PathBuf};

use serde::Serialize;
use utoipa::ToSchema;

use super::files;

/// Where the kernel has its settings and totals.
pub const HOST: &str = "/sys/kernel/mm/ksm";

const PAGE: i128 = 4096;
/// What the kernel spends to know one page (`struct ksm_rmap_item`).
const RMAP_ITEM: i128 = 64;

/// What KSM gains for this process. Absent is what this kernel does not tell; `unavailable` says
/// why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct KsmGain {
    /// Whether the guest's memory may be merged (`memory.mergeable`).
    pub mergeable: bool,
    /// Pages that are merged with others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub merged_pages: Option<u64>,
    /// Pages of zeroes that were merged with the kernel's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_pages: Option<u64>,
    /// Pages that KSM keeps an eye on, at 64 bytes each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rmap_items: Option<u64>,
    /// Bytes that merging saves, less what it costs to know the pages; negative where it costs
    /// more. The kernel's figure, or one made from those above by its formula.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net_profit: Option<i64>,
    /// What could not be read, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unavailable: Option<String>,
    /// Milliseconds since it was read.
    pub age_ms: u64,
}

impl KsmGain {
    /// Reads it for the process whose directory in /proc is `process`.
    pub fn read(process: &Path) -> Self {
        let stat = files::read(&process.join("ksm_stat"));
        // Before Linux 6.4 this was a file of its own.
        let merging = || files::number(&process.join("ksm_merging_pages")).ok();
        match stat {
            Ok(text) => parse_gain(&text, merging),
            Err(reason) => Self {
                merged_pages: merging(),
                unavailable: Some(reason),
                ..Self::default()
            },
        }
    }
}

fn parse_gain(text: &str, merging: impl FnOnce() -> Option<u64>) -> KsmGain {
    let line = |name| files::stat_line::<u64>(text, name);
    let mut gain = KsmGain {
        merged_pages: line("ksm_merging_pages").or_else(merging),
        zero_pages: line("ksm_zero_pages"),
        rmap_items: line("ksm_rmap_items"),
        net_profit: files::stat_line(text, "ksm_process_profit"),
        ..KsmGain::default()
    };
    if gain.net_profit.is_none()
        && let (Some(merged), Some(items)) = (gain.merged_pages, gain.rmap_items)
    {
        let pages = i128::from(merged) + i128::from(gain.zero_pages.unwrap_or(0));
        let profit = pages * PAGE - i128::from(items) * RMAP_ITEM;
        gain.net_profit = i64::try_from(profit).ok();
    }
    let missing: Vec<_> = [
        ("ksm_merging_pages", gain.merged_pages.is_none()),
        ("ksm_zero_pages", gain.zero_pages.is_none()),
        ("ksm_rmap_items", gain.rmap_items.is_none()),
        ("ksm_process_profit", gain.net_profit.is_none()),
    ]
    .into_iter()
    .filter_map(|(name, missing)| missing.then_some(name))
    .collect();
    if !missing.is_empty() {
        gain.unavailable = Some(format!("this kernel does not tell {}", missing.join(", ")));
    }
    gain
}

/// Whether ksmd works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = KsmRun)]
pub enum Run {
    /// It does nothing; what is merged stays merged.
    Off,
    /// It looks for equal pages.
    On,
    /// It does nothing, and all pages were taken apart.
    Unmerged,
}

/// KSM on the host. Absent is what this kernel does not tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct KsmHost {
    /// Whether ksmd works.
    pub run: Run,
    /// Pages it looks at between two sleeps.
    pub pages_to_scan: u64,
    /// How long it sleeps.
    pub sleep_ms: u64,
    /// Merged pages that are in memory.
    pub pages_shared: u64,
    /// Pages that would be in memory beside those, were they not merged.
    pub pages_sharing: u64,
    /// Pages that were looked at and have no equal.
    pub pages_unshared: u64,
    /// Pages that change too fast.
    pub pages_volatile: u64,
    /// Times that all mergeable memory was looked at.
    pub full_scans: u64,
    /// Pages of zeroes that were merged with the kernel's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_pages: Option<u64>,
    /// Bytes that merging saves on the host, less what it costs to know the pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net_profit: Option<i64>,
    /// Who chooses `pages_to_scan`: `none`, that is the setting, or `scan-time`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advisor: Option<String>,
}

impl KsmHost {
    /// Reads it; `directory` is [`HOST`] but in tests.
    pub fn read(directory: &Path) -> Result<Self, String> {
        if !directory.exists() {
            return Err(format!(
                "{}: this host's kernel has no KSM",
                directory.display()
            ));
        }
        let number = |name| files::number(&directory.join(name));
        Ok(Self {
            run: match number("run")? {
                0 => Run::Off,
                1 => Run::On,
                _ => Run::Unmerged,
            },
            pages_to_scan: number("pages_to_scan")?,
            sleep_ms: number("sleep_millisecs")?,
            pages_shared: number("pages_shared")?,
            pages_sharing: number("pages_sharing")?,
            pages_unshared: number("pages_unshared")?,
            pages_volatile: number("pages_volatile")?,
            full_scans: number("full_scans")?,
            zero_pages: number("ksm_zero_pages").ok(),
            net_profit: files::read(&directory.join("general_profit"))
                .ok()
                .and_then(|text| text.trim().parse().ok()),
            advisor: files::read(&directory.join("advisor_mode"))
                .ok()
                .and_then(|text| chosen(&text)),
        })
    }
}

/// The word in brackets: `none [scan-time]`.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    let (word, _) = rest.split_once(']')?;
    Some(word.to_owned())
}

/// What `ballast host ksm` is to change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KsmChange {
    /// Start or stop ksmd.
    pub on: bool,
    /// Pages to look at between two sleeps.
    pub pages_to_scan: Option<u64>,
    /// How long to sleep.
    pub sleep_ms: Option<u64>,
}

impl KsmChange {
    /// Writes it, the pace before the start. What is merged stays merged when ksmd stops: to take
    /// it all apart at once can exhaust the host's memory.
    pub fn apply(self, directory: &Path) -> Result<(), String> {
        let settings = [
            ("pages_to_scan", self.pages_to_scan),
            ("sleep_millisecs", self.sleep_ms),
            ("run", Some(self.on.into())),
        ];
        let mut done: Vec<(PathBuf, u64)> = Vec::new();
        for (name, value) in settings {
            let Some(value) = value else { continue };
            let path = directory.join(name);
            let result = files::number(&path).and_then(|before| {
                std::fs::write(&path, value.to_string())
                    .map_err(|error| format!("{}: {error}", path.display()))?;
                Ok(before)
            });
            match result {
                Ok(before) => done.push((path, before)),
                Err(error) => {
                    for (path, before) in done {
                        // As it was, as far as that can be had.
                        let _ = std::fs::write(path, before.to_string());
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

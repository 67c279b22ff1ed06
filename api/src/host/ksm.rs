//! `ballast host ksm`: KSM on the host, shown, started and stopped.
//!
//! The only place where ballast does: no VM ever starts ksmd by itself.

use std::path::Path;

use clap::{Args, Subcommand};
use vmm::overcommit::ksm::{KsmChange, KsmHost, Run};

use crate::json;

/// What to do with the host's merging of equal pages.
#[derive(Clone, Debug, Subcommand)]
pub enum KsmCommand {
    /// Show whether ksmd works, and what merging gains on the host
    Status {
        /// Print JSON; profit is in bytes, everything else in pages of 4096 bytes
        #[arg(long)]
        json: bool,
    },
    /// Have ksmd look for equal pages in memory that VMs offer (memory.mergeable). Guests can find
    /// out by timing whether a page of theirs is another's too: only where they trust one another
    On(Pace),
    /// Stop ksmd. What is merged stays merged, as to take it all apart at once can exhaust the
    /// host's memory; it comes apart as guests write to it and end
    Off(Pace),
}

/// How fast ksmd works; what is not given stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Args)]
pub struct Pace {
    /// Pages to look at between two sleeps
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub pages_to_scan: Option<u32>,
    /// Milliseconds to sleep in between
    #[arg(long, value_name = "N")]
    pub sleep_ms: Option<u32>,
}

impl KsmCommand {
    /// Does it, and says what is to be printed; `directory` is the kernel's, but in tests.
    pub fn run(&self, directory: &Path) -> Result<String, String> {
        let as_json = match self {
            Self::Status { json } => *json,
            Self::On(pace) => change(true, *pace, directory)?,
            Self::Off(pace) => change(false, *pace, directory)?,
        };
        let host = KsmHost::read(directory)?;
        if as_json {
            let bytes = json::to_vec(&host).map_err(|error| error.to_string())?;
            return Ok(String::from_utf8_lossy(&bytes).into_owned() + "\n");
        }
        Ok(text(&host))
    }
}

/// Changes it; what is then printed is not JSON.
fn change(on: bool, pace: Pace, directory: &Path) -> Result<bool, String> {
    // Says that there is no KSM, where there is none.
    let before = KsmHost::read(directory)?;
    let sets_pace = pace.pages_to_scan.is_some();
    if let Some(advisor) = before.advisor.filter(|word| sets_pace && word != "none") {
        return Err(format!(
            "--pages-to-scan: the kernel's advisor ({advisor}) chooses the pace; to choose it \
             oneself, write `none` to {}",
            directory.join("advisor_mode").display()
        ));
    }
    let change = KsmChange {
        on,
        pages_to_scan: pace.pages_to_scan.map(u64::from),
        sleep_ms: pace.sleep_ms.map(u64::from),
    };
    change.apply(directory)?;
    Ok(false)
}

fn text(host: &KsmHost) -> String {
    let mib = |pages: u64| pages.saturating_mul(4096) / (1 << 20);
    let state = match host.run {
        Run::Off => "off; what is merged stays merged",
        Run::On => "on",
        Run::Unmerged => "off, and everything was taken apart",
    };
    let pace = match (&host.advisor, host.sleep_ms) {
        (Some(advisor), sleep) if advisor != "none" => {
            format!(
                "{} pages, chosen by {advisor}, every {sleep} ms",
                host.pages_to_scan
            )
        }
        (_, 0) => format!("{} pages, without a pause", host.pages_to_scan),
        // A page must be seen twice before it is merged.
        (_, sleep) => format!(
            "{} pages every {sleep} ms: at most {} MiB/s",
            host.pages_to_scan,
            mib(host.pages_to_scan.saturating_mul(1000) / sleep)
        ),
    };
    let mut text = format!(
        "KSM is {state}\n\
         pace      {pace}\n\
         merged    {} pages stand for {} more: {} MiB saved\n\
         alone     {} pages, {} more change too fast\n\
         rounds    {}\n",
        host.pages_shared,
        host.pages_sharing,
        mib(host.pages_sharing),
        host.pages_unshared,
        host.pages_volatile,
        host.full_scans,
    );
    if let Some(pages) = host.zero_pages {
        text += &format!("zeroes    {pages} pages\n");
    }
    text + &match host.net_profit {
        Some(profit) => format!("profit    {profit} bytes\n"),
        None => "profit    this kernel does not tell\n".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn host(more: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let files = [
            ("run", "0"),
            ("pages_to_scan", "100"),
            ("sleep_millisecs", "20"),
            ("pages_shared", "10"),
            ("pages_sharing", "512"),
            ("pages_unshared", "3"),
            ("pages_volatile", "4"),
            ("full_scans", "5"),
        ];
        for (name, text) in files.iter().chain(more) {
            fs::write(directory.path().join(name), text).unwrap();
        }
        directory
    }

    #[test]
    fn it_is_started_and_stopped_only_when_told_to() {
        let host = host(&[]);
        let read = |name| fs::read_to_string(host.path().join(name)).unwrap();
        let status = KsmCommand::Status { json: false };
        let text = status.run(host.path()).unwrap();
        assert!(text.starts_with("KSM is off"), "{text}");
        assert!(text.contains("at most 19 MiB/s"), "{text}");
        assert!(
            text.contains("10 pages stand for 512 more: 2 MiB saved"),
            "{text}"
        );
        assert_eq!(read("run"), "0");
        let pace = Pace {
            pages_to_scan: Some(5000),
            sleep_ms: Some(0),
        };
        let text = KsmCommand::On(pace).run(host.path()).unwrap();
        assert!(text.starts_with("KSM is on"), "{text}");
        assert!(text.contains("5000 pages, without a pause"), "{text}");
        assert_eq!(
            (read("run"), read("pages_to_scan")),
            ("1".into(), "5000".into())
        );
        KsmCommand::Off(Pace::default()).run(host.path()).unwrap();
        assert_eq!(
            (read("run"), read("pages_to_scan")),
            ("0".into(), "5000".into())
        );
    }

    #[test]
    fn json_has_the_kernels_numbers() {
        let host = host(&[("general_profit", "-64\n")]);
        let text = KsmCommand::Status { json: true }.run(host.path()).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&value["run"], &value["pages_sharing"]),
            (&"off".into(), &512.into())
        );
        assert_eq!(value["net_profit"], -64);
        assert!(value.get("zero_pages").is_none());
    }

    #[test]
    fn a_pace_that_the_advisor_would_overrule_is_refused() {
        let host = host(&[("advisor_mode", "none [scan-time]")]);
        let pace = Pace {
            pages_to_scan: Some(5),
            sleep_ms: None,
        };
        let error = KsmCommand::On(pace).run(host.path()).unwrap_err();
        assert!(error.contains("scan-time"), "{error}");
        assert_eq!(fs::read_to_string(host.path().join("run")).unwrap(), "0");
        KsmCommand::On(Pace::default()).run(host.path()).unwrap();
        assert_eq!(fs::read_to_string(host.path().join("run")).unwrap(), "1");
    }

    #[test]
    fn a_host_without_ksm_says_so() {
        let error = KsmCommand::On(Pace::default())
            .run(Path::new("/no/such"))
            .unwrap_err();
        assert!(error.contains("no KSM"), "{error}");
    }
}

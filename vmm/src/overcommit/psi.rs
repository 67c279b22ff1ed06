//! How the host is: `/proc/meminfo`, its pressure stall information (Documentation/accounting/psi),
//! and that of our own cgroup.
//!
//! The files are opened before the VMM thread installs its filter, and from then on only read. The
//! stall time between two looks is compared, which is there before the kernel's ten-second average
//! has risen. That pressure begins between two looks is told by [`super::triggers`].

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use devices::allow;
use devices::sandbox::Allow;

use super::reading::{HostReading, Pressure};
use super::{cgroup, files, pressure};

/// What reading takes.
pub const SYSCALLS: &[Allow] = &[allow!(pread64)];

/// None of the files is longer than this as far as it is looked at.
const MAX_BYTES: usize = 8192;

/// Where the host tells how it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// `/proc/meminfo`.
    pub meminfo: PathBuf,
    /// `/proc/pressure/memory`.
    pub pressure: PathBuf,
    /// `memory.pressure` of our cgroup, if we have one.
    pub cgroup_pressure: Option<PathBuf>,
}

impl Default for Paths {
    fn default() -> Self {
        let own = cgroup::locate(Path::new("/proc/self"), std::process::id()).ok();
        Self {
            meminfo: "/proc/meminfo".into(),
            pressure: "/proc/pressure/memory".into(),
            cgroup_pressure: own.and_then(|cgroup| pressure_file(&cgroup.directory)),
        }
    }
}

/// The file of a cgroup, if it has one of its own: the root of the hierarchy, in which alone there
/// is no `cgroup.type`, is the host once more.
fn pressure_file(cgroup: &Path) -> Option<PathBuf> {
    let file = cgroup.join("memory.pressure");
    (cgroup.join("cgroup.type").exists() && file.exists()).then_some(file)
}

/// The open files.
#[derive(Debug, Default)]
pub struct Sources {
    meminfo: Option<File>,
    pressure: Option<Stalls>,
    cgroup_pressure: Option<Stalls>,
}

/// A file with pressure stall information, and what it told last.
#[derive(Debug)]
struct Stalls {
    file: File,
    last: Option<(u64, Totals)>,
}

/// The least time between two looks that are compared. A trigger may go off just after a look, and
/// one stall of a millisecond is no part of five that means anything.
const LEAST_WINDOW_MS: u64 = 50;

/// Microseconds of stalls since the host booted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    some: u64,
    full: u64,
}

impl Sources {
    /// Opens what there is. What is missing is logged, and then not known. Called on the main
    /// thread.
    pub fn open(paths: &Paths) -> Self {
        let open = |path: &Path| match File::open(path) {
            Ok(file) => Some(file),
            Err(error) => {
                let path = path.display();
                tracing::warn!(%path, %error, "the overcommit policy goes without this");
                None
            }
        };
        let stalls = |path: &Path| open(path).map(|file| Stalls { file, last: None });
        Self {
            meminfo: open(&paths.meminfo),
            pressure: stalls(&paths.pressure),
            cgroup_pressure: paths.cgroup_pressure.as_deref().and_then(stalls),
        }
    }

    /// Reads all of it; `now_ms` is the time of a steady clock.
    pub fn read(&mut self, now_ms: u64) -> HostReading {
        let meminfo = self.meminfo.as_ref().and_then(text).unwrap_or_default();
        let (total, available) = parse_meminfo(&meminfo).unwrap_or_default();
        let pressure =
            |stalls: &mut Option<Stalls>| stalls.as_mut().and_then(|stalls| stalls.read(now_ms));
        HostReading {
            total,
            available,
            pressure: pressure(&mut self.pressure),
            cgroup_pressure: pressure(&mut self.cgroup_pressure),
        }
    }
}

impl Stalls {
    fn read(&mut self, now_ms: u64) -> Option<Pressure> {
        let (average, totals) = parse_pressure(&text(&self.file)?)?;
        if self.last.is_none() {
            self.last = Some((now_ms, totals));
        }
        let last = (self.last.as_mut())
            .filter(|(then_ms, _)| now_ms.saturating_sub(*then_ms) >= LEAST_WINDOW_MS);
        let Some((then_ms, before)) = last.map(|last| std::mem::replace(last, (now_ms, totals)))
        else {
            return Some(average);
        };
        // Hundredths of a percent: microseconds of stall in microseconds of time, times 10,000.
        let elapsed_us = (now_ms - then_ms).saturating_mul(1000);
        let part = |after: u64, before: u64| {
            let stalled = after.saturating_sub(before).min(elapsed_us);
            u32::try_from(stalled.saturating_mul(10_000) / elapsed_us).unwrap_or(u32::MAX)
        };
        Some(Pressure {
            some: average.some.max(part(totals.some, before.some)),
            full: average.full.max(part(totals.full, before.full)),
        })
    }
}

fn text(file: &File) -> Option<String> {
    let mut buffer = [0; MAX_BYTES];
    let length = file.read_at(&mut buffer, 0).ok()?;
    let bytes = buffer.get(..length)?;
    Some(String::from_utf8_lossy(bytes).into_owned())
}

/// MemTotal and MemAvailable in bytes.
fn parse_meminfo(text: &str) -> Option<(u64, u64)> {
    let total = files::kib_line(text, "MemTotal")?;
    Some((total, files::kib_line(text, "MemAvailable")?))
}

fn parse_pressure(text: &str) -> Option<(Pressure, Totals)> {
    let told = pressure::parse(text)?;
    let full = told.full.unwrap_or_default();
    // From 0 to 100, so that it fits.
    let hundredths = |percent: f64| (percent * 100.0).round() as u32;
    let average = Pressure {
        some: hundredths(told.some.avg10),
        full: hundredths(full.avg10),
    };
    let totals = Totals {
        some: told.some.total_us,
        full: full.total_us,
    };
    Some((average, totals))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_root_of_the_hierarchy_has_no_pressure_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("memory.pressure");
        std::fs::write(&file, "").unwrap();
        assert_eq!(pressure_file(root.path()), None);
        std::fs::write(root.path().join("cgroup.type"), "domain\n").unwrap();
        assert_eq!(pressure_file(root.path()), Some(file));
    }

    #[test]
    fn the_kernels_words_are_understood_and_rubbish_is_not() {
        let meminfo = "MemTotal:        6160384 kB\nMemFree:   1 kB\nMemAvailable:    1048576 kB\n";
        assert_eq!(parse_meminfo(meminfo), Some((6160384 << 10, 1 << 30)));
        for text in [
            "",
            "MemTotal: 1 kB\n",
            "MemTotal: x kB\nMemAvailable: 1 kB\n",
        ] {
            assert_eq!(parse_meminfo(text), None, "{text}");
        }
        let text = "some avg10=12.34 avg60=0.00 avg300=0.03 total=703852\n\
                    full avg10=1.05 avg60=0.00 avg300=0.02 total=636027\n";
        let (average, totals) = parse_pressure(text).unwrap();
        let (some, full) = (1234, 105);
        assert_eq!(average, Pressure { some, full });
        assert_eq!((totals.some, totals.full), (703852, 636027));
        assert!(parse_pressure("some avg10=-1.00 total=2").is_none());
    }

    #[test]
    fn stalls_since_the_last_look_are_seen_before_the_average_has_risen() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut say = |average: &str, total: u64| {
            let text = format!("some avg10={average} avg60=0.00 avg300=0.00 total={total}\n");
            file.as_file_mut().set_len(0).unwrap();
            file.as_file().write_all_at(text.as_bytes(), 0).unwrap();
            file.as_file_mut().flush().unwrap();
            file.path().to_owned()
        };
        let path = say("0.00", 1000);
        let mut sources = Sources::open(&Paths {
            meminfo: "/nowhere".into(),
            pressure: path,
            cgroup_pressure: None,
        });
        let mut some = |now_ms| sources.read(now_ms).pressure.unwrap().some;
        assert_eq!(some(1000), 0);
        say("0.50", 1000 + 300_000);
        assert_eq!(some(2000), 3000, "300 ms of a second");
        assert_eq!(some(3000), 50, "and none since");
        assert_eq!(some(3000), 50, "the same moment twice");
        say("0.50", 1000 + 305_000);
        assert_eq!(some(3005), 50, "5 ms of 5 are too short to tell");
        assert_eq!(some(3100), 500, "and are not forgotten");
        assert_eq!(sources.read(4000).total, 0, "what is missing is not known");
    }

    #[test]
    fn this_machine_tells_how_it_is() {
        let host = Sources::open(&Paths::default()).read(0);
        assert!(host.total > 0 && host.available <= host.total, "{host:?}");
    }
}

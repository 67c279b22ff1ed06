//! The command line.
//!
//! Options have Cloud Hypervisor's names and forms, so that what starts that starts this.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Parser, Subcommand};
use devices::sandbox::SeccompMode;

use crate::disk::arguments::DiskCommand;
use crate::host::HostCommand;

/// The Cloud Hypervisor version whose API and options these are. Clients compare it: libvirt wants
/// at least 40 for all it can do.
pub const CH_VERSION: &str = "53.0.0";
/// That version and ours.
pub const BUILD_VERSION: &str = concat!("v53.0.0-ballast-", env!("CARGO_PKG_VERSION"));
/// What is built in, by Cloud Hypervisor's names.
pub const FEATURES: &[&str] = &["io_uring", "kvm"];

/// A virtual machine monitor that is a microservice: one process, one virtual machine.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ballast",
    disable_version_flag = true,
    args_conflicts_with_subcommands = true
)]
pub struct Arguments {
    /// What to do instead of being a virtual machine
    #[command(subcommand)]
    pub tool: Option<Tool>,
    /// Where to serve the API: a path, `path=PATH`, or `fd=N` for a Unix socket that listens already
    #[arg(long, value_name = "PATH|path=PATH|fd=N")]
    pub api_socket: Option<Target>,
    /// Create and boot the VM of this file, which holds what `vm.create` takes
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where to write events: a file or FIFO (which is waited for to have a reader), or an open
    /// descriptor
    #[arg(long, value_name = "path=PATH|fd=N")]
    pub event_monitor: Option<Target>,
    /// Where to write the log instead of standard error
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Log more: -v info, -vv debug, -vvv trace
    #[arg(short, action = ArgAction::Count)]
    pub verbosity: u8,
    /// What happens at a system call that a thread should not make: it ends the process (true), is
    /// logged by the kernel (log), fails (errno), or nothing (false)
    #[arg(long, value_name = "true|log|errno|false", default_value = "true")]
    pub seccomp: SeccompMode,
    /// Stay when the guest powers itself off
    #[arg(long)]
    pub no_shutdown: bool,
    /// The directory that the VMs of this host share, so that together they promise no more than
    /// there is
    #[arg(long, value_name = "DIR")]
    pub overcommit_ledger: Option<PathBuf>,
    /// Print version
    #[arg(short = 'V', long)]
    pub version: bool,
}

/// What the program does besides being a virtual machine.
#[derive(Clone, Debug, Subcommand)]
pub enum Tool {
    /// Look at the host
    #[command(subcommand)]
    Host(HostCommand),
    /// Make, inspect, check, repair, convert and commit disk images that no VM uses
    #[command(subcommand)]
    Disk(DiskCommand),
}

/// Something named by its path or by a descriptor that the process inherited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `PATH` or `path=PATH`.
    Path(PathBuf),
    /// `fd=N`.
    Descriptor(RawFd),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Descriptor(number) => write!(f, "fd={number}"),
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(number) = text.strip_prefix("fd=") {
            return match number.parse() {
                Ok(number) if number > libc::STDERR_FILENO => Ok(Self::Descriptor(number)),
                _ => Err(format!(
                    "`{number}` is not the number of a descriptor beyond 2"
                )),
            };
        }
        match text.strip_prefix("path=").unwrap_or(text) {
            "" => Err("the path is empty".to_owned()),
            path => Ok(Self::Path(path.into())),
        }
    }
}

impl Arguments {
    /// Reads the command line; prints help or what is wrong with it, and ends the process then.
    pub fn from_command_line() -> Self {
        Self::parse()
    }

    /// What `--version` prints. The first line is in the form that libvirt, Kata Containers and
    /// others parse, and says which Cloud Hypervisor this can stand in for.
    pub fn version_text(&self) -> String {
        let mut text = format!(
            "cloud-hypervisor v{CH_VERSION}\nMigration Protocol Versions: 0\nballast {}\n",
            env!("CARGO_PKG_VERSION")
        );
        if self.verbosity > 0 {
            text += &format!("Enabled features: {FEATURES:?}\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_socket_is_a_path_or_a_descriptor() {
        for line in ["ballast --api-socket /s", "ballast --api-socket path=/s"] {
            assert_eq!(
                parse(line).unwrap().api_socket,
                Some(Target::Path("/s".into()))
            );
        }
        assert_eq!(
            parse("ballast --api-socket fd=7").unwrap().api_socket,
            Some(Target::Descriptor(7))
        );
        for bad in ["fd=", "fd=x", "fd=-1", "fd=1", "path="] {
            assert!(
                parse(&format!("ballast --api-socket {bad}")).is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn what_kata_and_libvirt_start_us_with_is_accepted() {
        let kata = parse("ballast --api-socket /run/clh.sock -vv --seccomp false").unwrap();
        assert_eq!((kata.verbosity, kata.seccomp), (2, SeccompMode::Off));
        let libvirt = parse("ballast --api-socket fd=5 --event-monitor path=/run/events").unwrap();
        assert_eq!(
            libvirt.event_monitor,
            Some(Target::Path("/run/events".into()))
        );
        assert_eq!(libvirt.seccomp, SeccompMode::Enforce);
        assert!(parse("ballast --seccomp maybe").is_err());
        assert!(parse("ballast --no-such-option").is_err());
    }

    #[test]
    fn a_tool_is_a_subcommand_and_mixes_with_no_option_of_a_vm() {
        let line = "ballast host overcommit --ledger /l --json";
        let Some(Tool::Host(HostCommand::Overcommit { ledger, json })) = parse(line).unwrap().tool
        else {
            panic!("another tool");
        };
        assert_eq!((ledger, json), (Some("/l".into()), true));
        assert!(parse("ballast host overcommit").unwrap().tool.is_some());
        assert!(parse("ballast").unwrap().tool.is_none());
        assert!(parse("ballast host").is_err());
        assert!(parse("ballast host nothing").is_err());
        assert!(parse("ballast host ksm status --json").is_ok());
        assert!(parse("ballast host ksm on --pages-to-scan 5000 --sleep-ms 0").is_ok());
        assert!(parse("ballast host ksm off").is_ok());
        for bad in [
            "",
            " on --pages-to-scan 0",
            " on --sleep-ms -1",
            " off --unmerge",
        ] {
            assert!(parse(&format!("ballast host ksm{bad}")).is_err(), "{bad}");
        }
        assert!(parse("ballast --api-socket /s host overcommit").is_err());
        let vm = parse("ballast --api-socket /s --overcommit-ledger /l").unwrap();
        assert_eq!(vm.overcommit_ledger, Some("/l".into()));
    }

    #[test]
    fn a_subcommand_stands_alone_and_is_not_needed() {
        let disk = parse("ballast disk info -f qcow2 a.qcow2").unwrap();
        assert!(matches!(disk.tool, Some(Tool::Disk(DiskCommand::Info(_)))));
        assert!(parse("ballast --api-socket /s").unwrap().tool.is_none());
        assert!(parse("ballast").unwrap().tool.is_none());
        assert!(parse("ballast disk").is_err());
        assert!(parse("ballast disk info a.qcow2").is_err(), "no format");
        assert!(parse("ballast disk info -f vmdk a.qcow2").is_err());
        assert!(parse("ballast --api-socket /s disk info -f raw a").is_err());
    }

    #[test]
    fn the_first_line_of_the_version_is_what_probes_look_for() {
        let text = parse("ballast --version -v").unwrap().version_text();
        let mut lines = text.lines();
        let number = lines
            .next()
            .unwrap()
            .strip_prefix("cloud-hypervisor v")
            .unwrap();
        let major: u32 = number.split('.').next().unwrap().parse().unwrap();
        assert!(major >= 40);
        assert_eq!(lines.next(), Some("Migration Protocol Versions: 0"));
        assert!(text.contains("Enabled features: [\"io_uring\", \"kvm\"]"));
        assert!(BUILD_VERSION.contains(CH_VERSION));
    }

    #[test]
    fn the_definition_of_the_options_is_sound() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }
}

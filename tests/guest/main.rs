//! Real, unmodified guests: a stock kernel and a small initramfs, or all of Debian. They need a KVM
//! that can run a kernel; `scripts/test` runs this on the machine itself where it can, and in the
//! lab host (`scripts/lab`) where it can't. `scripts/guest all` makes what they boot from.
//!
//! A test never skips: where something is missing, it fails and says what. It never judges by the
//! clock either; what was measured is printed, for a person to read.

#[path = "../support/mod.rs"]
mod support;

mod balloon;
mod boot;
mod cpu;
mod crash;
mod disk;
mod disk_limits;
mod hotplug;
mod ksm;
mod lifecycle;
mod memory;
mod pause;
mod power;
mod reset;
mod serial;
mod thin;
mod thin_crash;
mod thin_files;
mod thin_fio;
mod thin_jobs;
mod thin_tools;
mod userland;
mod vm;

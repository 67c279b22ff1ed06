//! Loading a kernel or firmware and preparing vCPUs to run it.

pub mod smbios;

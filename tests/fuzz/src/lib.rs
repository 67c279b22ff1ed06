//! What the fuzz targets share.
//!
//! Devices are real ones with their real threads, kept from input to input: to start threads for
//! each would take longer than what is tried. Their filters are off, because libFuzzer and the
//! sanitizer make system calls of their own on any thread; that each thread keeps to its list is
//! tested elsewhere.

pub mod bench;
pub mod input;
pub mod memory;
pub mod qcow2;
pub mod seeds;

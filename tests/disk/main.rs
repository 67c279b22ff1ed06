//! `ballast disk`: the real process on real images, with qemu-img and qemu-io as the judges.
//!
//! Where those are not installed the tests that need them say so and pass.

mod answers;
mod bad_input;
mod copies;
mod data_file;
mod differential;
mod preallocation;
mod resize;
mod shell;
mod shell_options;
mod tools;
mod whole;

//! One virtual machine as a microservice.

use std::process::ExitCode;
use std::time::Instant;

use devices::sandbox::allocator::share_one_heap;

fn main() -> ExitCode {
    // Events count time from here.
    let start = Instant::now();
    share_one_heap();
    ballast_api::process::run(&ballast_api::cli::Arguments::from_command_line(), start)
}

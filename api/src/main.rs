//! One virtual machine as a microservice.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    // Events count time from here.
    let start = Instant::now();
    ballast_api::process::run(&ballast_api::cli::Arguments::from_command_line(), start)
}

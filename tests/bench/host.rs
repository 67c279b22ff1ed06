//! Figures of the process alone. They need no guest, so they are taken on the machine itself.

use std::path::Path;
use std::time::Instant;

use crate::process::Ballast;
use crate::table::{Row, Samples};
use crate::{Failure, MB, Options, fail};

/// Pings of one sample; the first ones warm caches up.
const PINGS: usize = 5000;
const WARM_UP: usize = 500;

/// Takes them all.
pub fn measure(options: &Options) -> Result<Vec<Row>, Failure> {
    let directory = tempfile::tempdir()?;
    let mut first_ping = Samples::default();
    let mut rss = Samples::default();
    let mut pss = Samples::default();
    let mut ping = Samples::default();
    // Once for the page cache.
    Ballast::start(&options.ballast, directory.path())?.shutdown()?;
    for _ in 0..options.runs {
        let mut ballast = Ballast::start(&options.ballast, directory.path())?;
        first_ping.push_ms(ballast.until_ping);
        let memory = ballast.process.memory()?;
        rss.push(memory.rss as f64 / MB);
        pss.push(memory.pss as f64 / MB);
        ping.push(ping_us(&mut ballast)?);
        ballast.shutdown()?;
    }
    Ok(vec![
        Row::at_most(
            "process start → first `vmm.ping` answered",
            &first_ping,
            5.0,
            "ms",
        )
        .cloud_hypervisor("3–16 ms"),
        Row::at_most("idle resident memory, no VM", &rss, 4.0, "MB").cloud_hypervisor("4.7 MB"),
        Row::report("the same, shared pages divided (PSS)", pss.show("MB")),
        Row::at_most("keep-alive `vmm.ping`, median of 5000", &ping, 60.0, "µs")
            .cloud_hypervisor("51 µs"),
        binary_size(&options.ballast)?,
    ])
}

/// The median time of a ping on one connection.
fn ping_us(ballast: &mut Ballast) -> Result<f64, Failure> {
    let mut times = Samples::default();
    for round in 0..WARM_UP + PINGS {
        let start = Instant::now();
        if ballast.client.exchange("GET", "vmm.ping", "")? != 200 {
            return fail("a ping was refused");
        }
        let time = start.elapsed();
        if round >= WARM_UP {
            times.push(time.as_secs_f64() * 1e6);
        }
    }
    Ok(times.median())
}

fn binary_size(ballast: &Path) -> Result<Row, Failure> {
    let size = std::fs::metadata(ballast)?.len() as f64 / MB;
    Ok(Row {
        aim: "≤ 6 MB".to_owned(),
        met: Some(size <= 6.0),
        ..Row::report("stripped release binary", format!("{size:.2} MB"))
    }
    .cloud_hypervisor("6.2 MB"))
}

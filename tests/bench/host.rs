//! Figures of the process alone. They need no guest, so they are taken on the machine itself.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::ballast::{Ballast, Launch};
use crate::support::http::Client;
use crate::table::{Row, Samples};
use crate::{MB, Options, memory};

/// Pings of one sample; the first ones warm caches up.
const PINGS: usize = 5000;
const WARM_UP: usize = 500;

/// Takes them all.
pub fn measure(options: &Options) -> Vec<Row> {
    let mut first_ping = Samples::default();
    let mut rss = Samples::default();
    let mut pss = Samples::default();
    let mut ping = Samples::default();
    // Once for the page cache.
    drop(start(&options.ballast));
    for _ in 0..options.runs {
        let Started {
            mut ballast,
            mut client,
            until_ping,
            ..
        } = start(&options.ballast);
        first_ping.push_ms(until_ping);
        let memory = memory::of(ballast.pid());
        rss.push(memory.rss as f64 / MB);
        pss.push(memory.pss as f64 / MB);
        ping.push(ping_us(&mut client));
        client.put("vmm.shutdown");
        ballast.wait_for_clean_end();
    }
    vec![
        Row::at_most(
            "process start → first `vmm.ping` answered",
            &first_ping,
            5.0,
            "ms",
        )
        .cloud_hypervisor("3–16 ms"),
        Row::at_most("idle resident memory (RSS), no VM", &rss, 4.0, "MB")
            .cloud_hypervisor("4.7 MB"),
        Row::report("the same, shared pages divided (PSS)", pss.show("MB")),
        Row::at_most("keep-alive `vmm.ping`, median of 5000", &ping, 60.0, "µs")
            .cloud_hypervisor("51 µs"),
        binary_size(&options.ballast),
    ]
}

/// A process that has answered.
pub struct Started {
    /// The process.
    pub ballast: Ballast,
    /// A connection to it.
    pub client: Client,
    /// Before it was started.
    pub at: Instant,
    /// From then until it had answered a first ping.
    pub until_ping: Duration,
}

/// Starts a process and pings it as soon as that is possible.
pub fn start(binary: &Path) -> Started {
    let mut launch = Launch::of(binary);
    let socket = launch.path("api.sock");
    launch.command().arg("--api-socket").arg(&socket);
    let at = Instant::now();
    let ballast = launch.spawn();
    let mut client = loop {
        if let Ok(client) = Client::connect(&socket) {
            break client;
        }
        assert!(
            at.elapsed() < Duration::from_secs(60),
            "the API does not come up: {}",
            ballast.stderr()
        );
        // Short against what is measured, long enough to leave the processor to the child.
        thread::sleep(Duration::from_micros(50));
    };
    client.get("vmm.ping");
    Started {
        until_ping: at.elapsed(),
        ballast,
        client,
        at,
    }
}

/// The median time of a ping on one connection.
fn ping_us(client: &mut Client) -> f64 {
    let mut times = Samples::default();
    for round in 0..WARM_UP + PINGS {
        let start = Instant::now();
        let answer = client.request("GET", "vmm.ping", None);
        let time = start.elapsed();
        answer.expect(200);
        if round >= WARM_UP {
            times.push(time.as_secs_f64() * 1e6);
        }
    }
    times.median()
}

fn binary_size(ballast: &Path) -> Row {
    let size = std::fs::metadata(ballast).expect("the binary").len() as f64 / MB;
    Row {
        aim: "≤ 6 MB".to_owned(),
        met: Some(size <= 6.0),
        ..Row::report("stripped release binary", format!("{size:.2} MB"))
    }
    .cloud_hypervisor("6.2 MB")
}

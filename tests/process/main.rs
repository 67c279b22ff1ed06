//! The real process and what a client can do to it without a guest: bad input of every kind,
//! every request in every state, starting and ending. Runs wherever there is a /dev/kvm; the only
//! guest here is a handful of hand-made instructions.
//!
//! Whatever is refused must leave no trace: the same `vm.info`, the same descriptors, the same
//! threads, and a process that goes on.

#[path = "../support/mod.rs"]
mod support;

mod bad_balloons;
mod bad_configs;
mod bad_files;
mod bad_images;
mod bad_limits;
mod bad_requests;
mod commit_disk;
mod cpu;
mod create_disk;
mod dirty_disk;
mod full_disk;
mod governor;
mod hostile_clients;
mod job_space;
mod ledger;
mod ledger_bad;
mod ledger_chaos;
mod lifecycle;
mod observe;
mod overcommit;
mod snapshot_disk;
mod states;
mod stream_disk;
mod thin;

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::ballast::Ballast;
use support::eventually;
use support::http::{Client, Response};
use support::procfs::{Holdings, assert_holds_again};

/// Runs what `command` makes, which must succeed, on an image that a process that was killed may
/// still have: then again.
#[track_caller]
fn when_free(image: &Path, mut command: impl FnMut() -> Command) {
    eventually("the image is free", || {
        let done = command().output().unwrap();
        let text = String::from_utf8_lossy(&done.stderr).into_owned();
        let in_use = text.contains("in use");
        assert!(done.status.success() || in_use, "{image:?}: {text}");
        (!in_use).then_some(())
    });
}

/// What a refused request must not change.
struct Before {
    info: (u16, String),
    holdings: Holdings,
}

/// Remembers the process as it is, with `client`'s connection.
fn before(ballast: &Ballast, client: &mut Client) -> Before {
    Before {
        info: info(client),
        holdings: ballast.holdings(),
    }
}

impl Before {
    /// Panics unless all is as it was.
    #[track_caller]
    fn assert_unchanged(&self, ballast: &mut Ballast, client: &mut Client, after: &str) {
        assert_eq!(info(client), self.info, "vm.info after {after}");
        assert_holds_again(ballast.pid(), &self.holdings);
        ballast.assert_well();
    }
}

fn info(client: &mut Client) -> (u16, String) {
    let answer = client.request("GET", "vm.info", None);
    (answer.status, answer.text())
}

/// Sends a configuration that is wrong, as `vm.create` and then, if it takes it, as `vm.boot`:
/// one of them must refuse it, again and again, and change nothing.
#[track_caller]
fn assert_never_boots(ballast: &mut Ballast, what: &str, config: &Value) {
    let mut client = ballast.api();
    let before = before(ballast, &mut client);
    let created = client.try_put_json("vm.create", config);
    if created.status == 204 {
        let cold = self::before(ballast, &mut client);
        for _ in 0..2 {
            refusal(client.request("PUT", "vm.boot", None), what);
            cold.assert_unchanged(ballast, &mut client, what);
        }
        client.put("vm.delete");
    } else {
        refusal(created, what);
        refusal(client.try_put_json("vm.create", config), what);
    }
    before.assert_unchanged(ballast, &mut client, what);
}

/// A refusal for which the client, or a host that has not got enough, is to blame.
#[track_caller]
fn refusal(answer: Response, what: &str) {
    if matches!(answer.status, 503 | 507) {
        assert!(!answer.reasons().is_empty(), "{what}");
    } else {
        answer.expect_refusal(what);
    }
}

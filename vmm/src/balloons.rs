//! Asking the guest for its statistics and answering the client, without the VMM thread waiting
//! for either: the balloons' threads carry the answer.

use std::sync::{Arc, Mutex, PoisonError};

use devices::balloon::{Balloon, BalloonInfo, Viewer};

use crate::command::Reply;
use crate::error::Error;
use crate::status::BalloonStats;

/// Answers with what the guest tells of its memory now; an error where it does not in time.
pub fn answer_statistics(balloon: &Balloon, reply: Reply<BalloonStats>) {
    let viewer = balloon.viewer();
    balloon.ask_for_statistics(Box::new(move |fresh| {
        let result = if fresh {
            Ok(BalloonStats {
                balloon_actual: viewer.actual_bytes(),
                stats: viewer.statistics(),
            })
        } else {
            Err(if viewer.info("").driver {
                Error::Timeout("the guest's answer with its statistics")
            } else {
                Error::NoDriver("the guest runs no driver of the balloon, which would tell them")
            })
        };
        // A client that has gone away is not missed.
        let _ = reply.send(result);
    }));
}

/// Answers with the state of all balloons, once each has been asked for statistics (`fresh`) and
/// has answered or has not in time.
pub fn answer_all<'a>(
    balloons: impl Iterator<Item = (&'a str, &'a Balloon)>,
    fresh: bool,
    reply: Reply<Vec<BalloonInfo>>,
) {
    let balloons: Vec<_> = balloons.collect();
    let gathering = Arc::new(Gathering {
        viewers: balloons
            .iter()
            .map(|(id, balloon)| ((*id).to_owned(), balloon.viewer()))
            .collect(),
        reply: Mutex::new(Some(reply)),
    });
    for (_, balloon) in balloons.into_iter().filter(|_| fresh) {
        let gathering = gathering.clone();
        balloon.ask_for_statistics(Box::new(move |_| drop(gathering)));
    }
}

/// The last one to be dropped answers.
struct Gathering {
    viewers: Vec<(String, Viewer)>,
    reply: Mutex<Option<Reply<Vec<BalloonInfo>>>>,
}

impl Drop for Gathering {
    fn drop(&mut self) {
        let infos = self.viewers.iter().map(|(id, viewer)| viewer.info(id));
        let infos = infos.collect();
        let reply = self.reply.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(reply) = reply.take() {
            let _ = reply.send(Ok(infos));
        }
    }
}

//! What clients learn: the published status, answers and events, in this order.

use std::sync::Arc;

use super::Vmm;
use crate::command::Reply;
use crate::device_manager::Removed;
use crate::error::Error;
use crate::jobs::Ended;
use crate::status::VmInfo;

impl Vmm {
    /// Publishes what has become of the VM, then answers. A client that has gone away is not
    /// missed.
    pub(super) fn answer<T>(&self, reply: Reply<T>, result: Result<T, Error>) {
        self.publish();
        let _ = reply.send(result);
    }

    pub(super) fn publish(&self) {
        let status = self.created.as_ref().map(|created| {
            let overcommit_ledger = self.ledger_status();
            Arc::new(VmInfo {
                overcommit_ledger,
                ..created.info()
            })
        });
        self.endpoint.status.send_replace(status);
    }

    /// Publishes what has become of the VM, then tells the event.
    pub(super) fn tell(&self, event: &'static str) {
        self.publish();
        self.emit("vm", event, &[]);
    }

    pub(super) fn tell_removed(&self, removed: Vec<Removed>) {
        self.publish();
        for device in removed {
            self.emit(
                "vm",
                "device-removed",
                &[("id", &device.id), ("bdf", &device.bdf)],
            );
        }
    }

    /// Publishes what has become of the disks, then tells of the jobs that have ended.
    pub(super) fn tell_jobs(&self, ended: Vec<Ended>) {
        self.publish();
        ended.into_iter().for_each(Ended::tell);
    }

    pub(super) fn emit(
        &self,
        source: &'static str,
        event: &'static str,
        properties: &[(&str, &str)],
    ) {
        self.endpoint.events.emit(source, event, properties);
    }
}

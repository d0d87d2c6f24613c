//! Saving the guest to a file while it stands still. The driver goes on meanwhile: epochs, acks, heartbeats and the control socket do not wait
//! for the file.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::{PrimaryEnd, PrimaryNode};
use crate::checkpoint::snapshot::{self, SavedCpu, SnapshotError, SnapshotHead, SnapshotId, Written};
use crate::machine::{MachineError, cpu_maker};
use crate::node::clock;
use crate::node::error::NodeError;
use crate::node::events::{NodeEvent, Reply, SnapshotRequest};
use crate::protocol::cpu::GuestCpu;
use crate::protocol::primary::Input;

/// A snapshot in the making.
pub(super) struct Saving {
    request: SnapshotRequest,
    reply: Option<Reply>,
    began_us: u64,
    cancelled: Arc<AtomicBool>,
    /// The writing thread, once the guest stands still.
    thread: Option<JoinHandle<()>>,
    /// What is being written.
    head: Option<SnapshotHead>,
    /// It is written, and this is to be said of it when the guest has stopped for good.
    written: Option<Value>,
}

impl Saving {
    fn answer(&mut self, result: Result<Value, String>) {
        if let Some(reply) = self.reply.take() {
            // The client may have given up waiting.
            let _ = reply.send(result);
        }
    }

    /// The id, if it is written and the guest stops with it.
    fn stopped_with(&self) -> Option<SnapshotId> {
        self.written.as_ref().and(self.head.as_ref()).map(|head| head.id)
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let path = self.request.path.clone();
        self.answer(Err(SnapshotError::Cancelled { path }.to_string()));
    }
}

impl PrimaryNode {
    /// An operator wants one.
    pub(super) fn snapshot_asked(&mut self, request: SnapshotRequest, reply: Reply) -> Option<Input> {
        let refused = if self.saving.is_some() {
            Some("a snapshot of this guest is being written already")
        } else if self.disks.is_written() && !request.stop {
            Some(
                "this guest writes to disks, which would go on without its snapshot: take it with --stop, which ends the guest \
                 and leaves its images as they are at that moment",
            )
        } else {
            None
        };
        if let Some(why) = refused {
            let _ = reply.send(Err(why.to_owned()));
            return None;
        }
        self.saving = Some(Saving {
            request,
            reply: Some(reply),
            began_us: clock::monotonic_us(),
            cancelled: Arc::new(AtomicBool::new(false)),
            thread: None,
            head: None,
            written: None,
        });
        Some(Input::Snapshot)
    }

    /// The rules do not allow one now.
    pub(super) fn snapshot_refused(&mut self, why: &str) {
        if let Some(mut saving) = self.saving.take() {
            saving.answer(Err(why.to_owned()));
        }
    }

    /// The guest stands still for it.
    pub(super) fn begin_snapshot(&mut self) -> Result<(), NodeError> {
        let Some(mut saving) = self.saving.take() else {
            self.protocol.handle(clock::now(), Input::SnapshotEnded { stop: false });
            return Ok(());
        };
        match self.start_writing(&mut saving) {
            Ok(()) => self.saving = Some(saving),
            Err(error) => {
                saving.answer(Err(error.to_string()));
                self.protocol.handle(clock::now(), Input::SnapshotEnded { stop: false });
            }
        }
        Ok(())
    }

    fn start_writing(&mut self, saving: &mut Saving) -> Result<(), NodeError> {
        let mut state = Vec::new();
        self.machine.save(&mut state).map_err(|error: MachineError| SnapshotError::Machine {
            path: saving.request.path.clone(),
            reason: Box::new(error),
        })?;
        let head = SnapshotHead {
            id: SnapshotId(crate::node::new_instance()?.0),
            guest: self.context.config.guest.clone(),
            at: self.protocol.running_epoch(),
            taken_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            stopped: saving.request.stop,
            shape: self.machine.shape().clone(),
            cpu: SavedCpu {
                model: self.context.config.cpu,
                maker: cpu_maker(),
                guest: GuestCpu { digest: self.context.cpu.digest, tsc_khz: self.machine.tsc_khz() },
            },
            build: env!("CARGO_PKG_VERSION").to_owned(),
        };
        tracing::info!(at = %head.at, path = %saving.request.path.display(), "the guest stands still for its snapshot");
        saving.head = Some(head.clone());
        let (path, memory, cancelled) =
            (saving.request.path.clone(), self.machine.memory().clone(), Arc::clone(&saving.cancelled));
        let events = self.context.events.clone();
        let thread = std::thread::Builder::new().name("mcd-snapshot".into()).spawn(move || {
            let written = snapshot::write(&path, &head, &memory, &state, &cancelled);
            // A node that is ending does not mind.
            let _ = events.send(NodeEvent::SnapshotWritten(written));
        })?;
        saving.thread = Some(thread);
        Ok(())
    }

    /// The file is there, or not.
    pub(super) fn snapshot_written(&mut self, result: Result<Written, SnapshotError>) -> Option<Input> {
        let mut saving = self.saving.take()?;
        if let Some(thread) = saving.thread.take() {
            let _ = thread.join();
        }
        let stop = result.is_ok() && saving.request.stop;
        match (result, &saving.head) {
            (Ok(written), Some(head)) => {
                let value = saved(&saving.request.path, head, written, clock::monotonic_us() - saving.began_us);
                tracing::info!(at = %head.at, bytes = written.bytes, pages = written.pages, "snapshot written");
                if stop {
                    saving.written = Some(value);
                    self.saving = Some(saving);
                } else {
                    saving.answer(Ok(value));
                }
            }
            (Ok(_), None) => {}
            (Err(error), _) => {
                tracing::warn!("{error}");
                saving.answer(Err(error.to_string()));
            }
        }
        Some(Input::SnapshotEnded { stop })
    }

    /// The guest is not ours any more: so is a snapshot in the making.
    pub(super) fn cancel_snapshot(&mut self) {
        self.saving = None;
    }

    /// The node ends: what is said to whoever waits for the snapshot, and its id, if the guest stopped with it.
    pub(super) fn end_snapshot(&mut self, end: &PrimaryEnd) -> Option<SnapshotId> {
        let mut saving = self.saving.take()?;
        let id = saving.stopped_with().filter(|_| *end == PrimaryEnd::Quit)?;
        let written = saving.written.take();
        saving.answer(written.ok_or_else(String::new));
        Some(id)
    }
}

/// What a client is told.
fn saved(path: &PathBuf, head: &SnapshotHead, written: Written, stood_us: u64) -> Value {
    json!({
        "path": path,
        "snapshot": head.id.to_string(),
        "guest": head.guest.as_str(),
        "generation": head.at.generation.0,
        "epoch": head.at.epoch,
        "pages": written.pages,
        "bytes": written.bytes,
        "stood-still-ms": stood_us as f64 / 1000.0,
        "stopped": head.stopped,
    })
}

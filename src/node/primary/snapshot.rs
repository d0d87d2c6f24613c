//! Saving the guest to a file while it is paused: the protocol decides when. The driver
//! goes on meanwhile: epochs, acks, heartbeats and the control socket do not wait for the file.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::PrimaryNode;
use crate::checkpoint::snapshot::{self, SavedCpu, SnapshotError, SnapshotHead, SnapshotId, Written};
use crate::machine::{MachineError, cpu_maker};
use crate::node::clock;
use crate::node::error::NodeError;
use crate::node::events::{NodeEvent, Reply, SnapshotRequest};
use crate::protocol::cpu::GuestCpu;
use crate::protocol::primary::Input;

/// The snapshots of a primary.
#[derive(Default)]
pub(super) struct Snapshots {
    /// One that was asked for, until the protocol has said whether it may be.
    asked: Option<(SnapshotRequest, Reply)>,
    saving: Option<Saving>,
}

/// A snapshot in the making.
struct Saving {
    request: SnapshotRequest,
    reply: Option<Reply>,
    began_us: u64,
    cancelled: Arc<AtomicBool>,
    /// The writing thread, once the guest is paused.
    thread: Option<JoinHandle<()>>,
    /// What is being written.
    head: Option<SnapshotHead>,
    /// It is written, and this is to be said of it when the guest has stopped for good.
    written: Option<Value>,
}

impl Saving {
    fn new(request: SnapshotRequest, reply: Reply) -> Saving {
        Saving {
            request,
            reply: Some(reply),
            began_us: clock::monotonic_us(),
            cancelled: Arc::new(AtomicBool::new(false)),
            thread: None,
            head: None,
            written: None,
        }
    }

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
    /// An operator wants one. The protocol answers at once.
    pub(super) fn snapshot_asked(&mut self, request: SnapshotRequest, reply: Reply) -> Option<Input> {
        let stop = request.stop;
        self.snapshots.asked = Some((request, reply));
        Some(Input::Snapshot { stop })
    }

    /// The rules do not allow one now.
    pub(super) fn snapshot_refused(&mut self, why: &str) {
        if let Some((_, reply)) = self.snapshots.asked.take() {
            // The client may have given up waiting.
            let _ = reply.send(Err(why.to_owned()));
        }
    }

    /// The guest is to be paused for it, and its state to be saved.
    pub(super) fn begin_snapshot(&mut self) {
        match (self.snapshots.asked.take(), &self.machine) {
            (Some((request, reply)), Some(machine)) => {
                self.snapshots.saving = Some(Saving::new(request, reply));
                machine.save();
            }
            _ => self.protocol.handle(clock::now(), Input::SnapshotEnded { written: false }),
        }
    }

    /// The guest is paused, and this is its state; or it could not be had.
    pub(super) fn state_saved(&mut self, state: Result<Vec<u8>, Box<MachineError>>) -> Option<Input> {
        // Cancelled meanwhile.
        let mut saving = self.snapshots.saving.take()?;
        let begun = match state {
            Ok(state) => self.start_writing(&mut saving, state),
            Err(reason) => Err(SnapshotError::Machine { path: saving.request.path.clone(), reason }.into()),
        };
        match begun {
            Ok(()) => self.snapshots.saving = Some(saving),
            Err(error) => {
                saving.answer(Err(error.to_string()));
                return Some(Input::SnapshotEnded { written: false });
            }
        }
        None
    }

    fn start_writing(&mut self, saving: &mut Saving, state: Vec<u8>) -> Result<(), NodeError> {
        let head = SnapshotHead {
            id: crate::node::new_id()?,
            guest: self.context.config.guest.clone(),
            at: self.protocol.running_epoch(),
            taken_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            stopped: saving.request.stop,
            shape: self.protocol.shape().clone(),
            cpu: SavedCpu {
                model: self.context.config.cpu,
                maker: cpu_maker(),
                guest: GuestCpu { digest: self.context.cpu.digest, tsc_khz: self.tsc_khz },
            },
            build: env!("CARGO_PKG_VERSION").to_owned(),
        };
        tracing::info!(at = %head.at, path = %saving.request.path.display(), "the guest is paused for its snapshot");
        saving.head = Some(head.clone());
        let (path, memory, cancelled) =
            (saving.request.path.clone(), self.memory.clone(), Arc::clone(&saving.cancelled));
        let events = self.context.events.clone();
        let thread = std::thread::Builder::new().name("mcd-snapshot".into()).spawn(move || {
            let written = snapshot::write(&path, &head, &memory, &state, &cancelled);
            // A node that is ending does not mind.
            let _ = events.report(NodeEvent::SnapshotWritten(written));
        })?;
        saving.thread = Some(thread);
        Ok(())
    }

    /// The file is there, or not.
    pub(super) fn snapshot_written(&mut self, result: Result<Written, SnapshotError>) -> Option<Input> {
        let mut saving = self.snapshots.saving.take()?;
        if let Some(thread) = saving.thread.take() {
            let _ = thread.join();
        }
        let ended = Input::SnapshotEnded { written: result.is_ok() };
        match (result, &saving.head) {
            (Ok(written), Some(head)) => {
                let value = saved(&saving.request.path, head, written, clock::monotonic_us() - saving.began_us);
                tracing::info!(at = %head.at, bytes = written.bytes, pages = written.pages, "snapshot written");
                if saving.request.stop {
                    saving.written = Some(value);
                    self.snapshots.saving = Some(saving);
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
        Some(ended)
    }

    /// The guest is not ours any more: so is a snapshot in the making. Its file may be on storage
    /// that does not answer, so a thread of its own waits for the writing one.
    pub(super) fn cancel_snapshot(&mut self) {
        let Some(saving) = self.snapshots.saving.take() else { return };
        let waiting = std::thread::Builder::new().name("mcd-snapshot-end".into()).spawn(move || drop(saving));
        if let Err(error) = waiting {
            tracing::warn!(%error, "the cancelled snapshot's thread could not be waited for");
        }
    }

    /// The node ends: what is said to whoever waits for the snapshot, and its id if it `stands`:
    /// the guest stopped for good with it, and its disks are as of that moment.
    pub(super) fn end_snapshot(&mut self, stands: bool) -> Option<SnapshotId> {
        let mut saving = self.snapshots.saving.take()?;
        let id = saving.stopped_with().filter(|_| stands)?;
        let written = saving.written.take();
        saving.answer(written.ok_or_else(String::new));
        Some(id)
    }
}

/// The reply to the client.
fn saved(path: &PathBuf, head: &SnapshotHead, written: Written, paused_us: u64) -> Value {
    json!({
        "path": path,
        "snapshot": head.id.to_string(),
        "guest": head.guest.as_str(),
        "generation": head.at.generation.0,
        "epoch": head.at.epoch,
        "pages": written.pages,
        "bytes": written.bytes,
        "paused-ms": paused_us as f64 / 1000.0,
        "stopped": head.stopped,
    })
}

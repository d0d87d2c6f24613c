//! Building a newcomer's machine, in a thread of its own: with a large memory it takes as long as
//! the host needs to find that memory, and heartbeats say meanwhile how far it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::Image;
use crate::checkpoint::apply::{Applier, ApplyNews};
use crate::checkpoint::stage::StagingBudget;
use crate::checkpoint::stamp::StampState;
use crate::control::console::Console;
use crate::machine::{MachineError, prefault_threads};
use crate::node::config::NodeConfig;
use crate::node::context::{Context, new_machine, open_gate};
use crate::node::disks::{self, NodeDisks};
use crate::node::error::NodeError;
use crate::node::events::NodeEvent;
use crate::node::inbox::InboxSender;
use crate::protocol::messages::Welcome;
use crate::protocol::types::InstanceId;

/// Bytes of memory between two reports: at the slowest host's speed some in a second.
const PROGRESS_BYTES: u64 = 64 << 20;

/// One machine is built at a time: a newcomer that joins again waits until what its last life began
/// is undone, or both would want the memory, the tap and the disks.
static BUILDING: Mutex<()> = Mutex::new(());

/// Where a built image waits for the engine that asked for it. If that is gone, nothing stays here.
#[derive(Default)]
pub(super) struct BuildSlot {
    state: Mutex<SlotState>,
}

#[derive(Default)]
struct SlotState {
    closed: bool,
    image: Option<Box<Image>>,
}

impl BuildSlot {
    /// The image that was built.
    pub(super) fn take(&self) -> Option<Box<Image>> {
        self.state.lock().image.take()
    }

    /// Nobody wants it any more.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        (state.closed, state.image) = (true, None);
    }

    fn put(&self, image: Image) {
        let mut state = self.state.lock();
        if !state.closed {
            state.image = Some(Box::new(image));
        }
    }
}

/// What a build needs of the node.
struct Build {
    config: NodeConfig,
    console: Arc<Console>,
    events: InboxSender,
    instance: InstanceId,
    budget: Arc<StagingBudget>,
}

/// Begins to build the machine that `welcome` describes, for the newcomer `instance`; it reports
/// its progress and its end.
///
/// # Errors
/// If the host gives no thread.
pub(super) fn begin(
    context: &Context,
    instance: InstanceId,
    welcome: Welcome,
    budget: Arc<StagingBudget>,
    slot: Arc<BuildSlot>,
) -> Result<(), NodeError> {
    let (config, console) = (context.config.clone(), Arc::clone(&context.console));
    let build = Build { config, console, events: context.events.clone(), instance, budget };
    std::thread::Builder::new().name("mcd-build".into()).spawn(move || {
        let only = BUILDING.lock();
        let result = build.image(welcome).map(|image| slot.put(image)).map_err(|error| error.to_string());
        drop(only);
        // A node that is ending needs no more events.
        let _ = build.events.report(NodeEvent::Built { instance: build.instance, result });
    })?;
    Ok(())
}

impl Build {
    /// Says how far it is, now and then.
    fn report_progress(&self, reported: &AtomicU64, done_bytes: u64) {
        let last = reported.load(Ordering::Relaxed);
        let due = done_bytes >= last.saturating_add(PROGRESS_BYTES);
        if due && reported.compare_exchange(last, done_bytes, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            let progress = NodeEvent::BuildProgress { instance: self.instance, done_bytes };
            // A node that is ending needs no more events.
            let _ = self.events.report(progress);
        }
    }

    fn image(&self, welcome: Welcome) -> Result<Image, NodeError> {
        let gate = open_gate(&self.config, &self.events)?;
        let (images, made) = disks::open_or_create_images(&self.config, &welcome.shape)?;
        let disks = NodeDisks::new(&self.config, &welcome.shape, images, &self.events)?;
        let mut machine =
            new_machine(&welcome.shape, self.config.cpu, gate.clone(), &disks, &self.console, &self.events)?;
        // A host that cannot restore such a machine must say so before anybody counts on it.
        machine.rehearse(welcome.tsc_khz)?;
        // Ahead of time, so that neither applying nor the guest after a takeover waits for the host
        // to find memory.
        let reported = AtomicU64::new(0);
        let progress = |done_bytes| self.report_progress(&reported, done_bytes);
        machine.memory().prefault(prefault_threads(), progress).map_err(MachineError::from)?;
        disks.begin_filling(welcome.generation)?;
        let image = disks.image(machine.memory().clone());
        let (stamper, instance, events) = (disks.stamper(), self.instance, self.events.clone());
        let tell = move |news| {
            let event = match news {
                ApplyNews::Whole(id) => return stamper.stamp(id, StampState::Applying),
                ApplyNews::BlocksHashed { first, hashes } => NodeEvent::BlocksHashed { instance, first, hashes },
                ApplyNews::Failed(why) => NodeEvent::ImageFailed { instance, why },
            };
            // A node that is ending needs no more events.
            let _ = events.report(event);
        };
        let applier = Applier::start(image, Arc::clone(&self.budget), tell)?;
        Ok(Image { machine, gate, disks, welcome, applier, made })
    }
}

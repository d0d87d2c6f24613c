//! Taking over: the image is brought to the newest committed epoch and restored, in a thread of its
//! own.

use super::{Image, Promoted};
use crate::control::status::TakeoverReport;
use crate::node::context::Context;
use crate::node::error::NodeError;
use crate::node::events::NodeEvent;
use crate::node::{clock, priority};
use crate::protocol::guest_clock::{self, ClockPolicy};
use crate::protocol::record::Record;
use crate::protocol::secondary::TakeoverStages;
use crate::protocol::types::{EpochId, Instant};

/// What was decided.
pub(super) struct Takeover {
    /// The record that won.
    pub record: Record,
    /// The newest committed epoch.
    pub epoch: EpochId,
    /// When that began to arrive.
    pub began: Instant,
    /// What made the primary suspect.
    pub cause: String,
    /// When the stages so far were reached.
    pub stages: TakeoverStages,
}

/// Begins to restore the guest; it reports its end.
///
/// # Errors
/// If the host gives no thread.
pub(super) fn begin(context: &Context, image: Image, takeover: Takeover) -> Result<(), NodeError> {
    let (clocks, events) = (context.config.guest_clock, context.events.clone());
    std::thread::Builder::new().name("mcd-restore".into()).spawn(move || {
        // Clients wait for it.
        priority::raise();
        let restored = restore(image, takeover, clocks).map(Box::new).map_err(Box::new);
        // A node that is ending needs no more events.
        let _ = events.report(NodeEvent::Restored(restored));
    })?;
    Ok(())
}

fn restore(image: Image, takeover: Takeover, clock_policy: ClockPolicy) -> Result<Promoted, NodeError> {
    let Image { mut machine, gate, disks, welcome, applier, made: _ } = image;
    let Takeover { record, epoch, began, cause, stages } = takeover;
    let state = applier.finish(epoch)?;
    let applied = clock::now();
    let clocks = guest_clock::step(clock_policy, began, applied);
    machine.restore_later(&state, clocks.forward)?;
    gate.drain_input();
    let restored = clock::now();
    let ms = |from: Instant, to: Instant| to.since(from).as_secs_f64() * 1000.0;
    let TakeoverStages { heard, suspected, decided } = stages;
    // Other programs of this host compare it with their own clock.
    let since_suspected_us = u64::try_from(clock::now().since(suspected).as_micros()).unwrap_or(u64::MAX);
    let report = TakeoverReport {
        cause,
        detect_ms: ms(heard, suspected),
        arbitrate_ms: ms(suspected, decided),
        apply_ms: ms(decided, applied),
        restore_ms: ms(applied, restored),
        // Known once the guest runs: until then, when that began.
        resume_ms: 0.0,
        first_packet_ms: None,
        started_monotonic_us: clock::monotonic_us().saturating_sub(since_suspected_us),
        first_packet_monotonic_us: None,
        clock_forward_ms: clocks.forward.as_secs_f64() * 1000.0,
        clock_behind_ms: clocks.behind.as_secs_f64() * 1000.0,
    };
    Ok(Promoted { machine, gate, disks, record, welcome, report })
}

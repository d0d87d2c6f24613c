//! A secondary whose primary, arbiter and driver are a test's own.

use std::time::Duration;

use super::{Action, Input, Phase, Secondary, SecondaryConfig};
use crate::protocol::arbitration::{ArbiterAnswer, ArbiterRequest};
use crate::protocol::cpu::HostCpu;
use crate::protocol::machine_shape::{DiskShape, MachineShape};
use crate::protocol::messages::{Message, Welcome, features};
use crate::protocol::record::Record;
use crate::protocol::types::{EpochId, Generation, GuestName, InstanceId, Instant};

pub(in crate::protocol) const CPU: HostCpu = HostCpu { digest: 7, tsc_khz: 1000, tsc_scales: true };
pub(in crate::protocol) const OLD: InstanceId = InstanceId(1);
pub(in crate::protocol) const NEW: InstanceId = InstanceId(2);
pub(in crate::protocol) const DATA: u64 = 1;
pub(in crate::protocol) const BEATS: u64 = 2;

pub(in crate::protocol) fn take(node: &mut Secondary, input: Input) -> Vec<Action> {
    node.handle(Instant::from_us(0), input);
    std::iter::from_fn(|| node.poll_action()).collect()
}

pub(in crate::protocol) fn message(node: &mut Secondary, conn: u64, message: Message) -> Vec<Action> {
    take(node, Input::Message { conn, message })
}

pub(in crate::protocol) fn ask(node: &mut Secondary, first: u64) -> Vec<Action> {
    message(node, DATA, Message::HashBlocks { first, count: 3 })
}

pub(in crate::protocol) fn commit(node: &mut Secondary, generation: u64, completes_resync: bool) {
    let id = EpochId { generation: Generation(generation), epoch: 0 };
    take(node, Input::Staged { conn: DATA, id, completes_resync, began: Instant::from_us(0), staged_bytes: 0 });
}

/// In a resync: four pages of memory, then two disks of three blocks each, of which `made` are
/// made just now.
pub(in crate::protocol) fn syncing(made: [bool; 2]) -> Secondary {
    let disk = DiskShape { bytes: 3 * 4096, read_only: false, shared: false, serial: [0; 20] };
    let shape = MachineShape { disks: vec![disk; 2], ..MachineShape::bare(4 * 4096, 1, [2, 0, 0, 0, 0, 1]) };
    let config = SecondaryConfig {
        guest: GuestName::new("web").expect("a name"),
        cpu: CPU,
        features: features::DISK_HASHES,
        staging_bytes_max: u64::MAX,
        retry: Duration::from_secs(1),
        answer_timeout: Duration::from_secs(1),
        stall_max: Duration::from_secs(2000),
    };
    let welcome = Message::Welcome(Welcome {
        instance: OLD,
        generation: Generation(1),
        shape,
        tsc_khz: 1000,
        features: features::DISK_HASHES,
        interval_us: 1000,
        heartbeat_interval_us: 10_000_000,
        heartbeat_timeout_us: 1_000_000_000,
    });
    let mut node = Secondary::new(config, NEW, 0, Instant::from_us(0));
    take(&mut node, Input::Tick);
    take(&mut node, Input::Connected { conn: DATA });
    message(&mut node, DATA, welcome.clone());
    take(&mut node, Input::Connected { conn: BEATS });
    message(&mut node, BEATS, welcome);
    take(&mut node, Input::MachineReady { made: made.to_vec() });
    assert_eq!(node.phase(), Phase::Syncing);
    node
}

/// On record as the peer, with a whole image.
pub(in crate::protocol) fn paired() -> Secondary {
    let mut node = syncing([true, true]);
    commit(&mut node, 1, true);
    let record = Record::first(OLD).next_paired(OLD, NEW);
    message(&mut node, DATA, Message::Paired { record });
    assert_eq!(node.phase(), Phase::Paired);
    node
}

/// Answers the question among `actions`; the record it asked for, and what follows.
pub(in crate::protocol) fn answer(
    node: &mut Secondary,
    actions: &[Action],
    answer: ArbiterAnswer,
) -> (Option<Record>, Vec<Action>) {
    let call = actions.iter().find_map(|action| match action {
        Action::Ask(call) => Some(*call),
        _ => None,
    });
    let call = call.expect("a question");
    let wanted = match call.request {
        ArbiterRequest::Swap { new, .. } => Some(new),
        ArbiterRequest::Read => None,
    };
    (wanted, take(node, Input::Answer { ticket: call.ticket, answer }))
}

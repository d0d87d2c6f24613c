//! `--restore FILE`: what the snapshot has takes the place of the flags that describe the machine,
//! and none may say otherwise.

use std::path::Path;

use super::args::{CpuFlag, MachineArgs, NodeArgs};
use super::exit::{ExitStatus, Failure};
use super::values::Mac;
use crate::checkpoint::snapshot::{SnapshotError, SnapshotHead, SnapshotReader};
use crate::machine::CpuModel;

/// Reads the head of the file of `--restore`, and checks that no flag contradicts it. Flags
/// that are not given are filled in.
pub(super) fn adopt(path: &Path, node: &mut NodeArgs, machine: &MachineArgs) -> Result<SnapshotHead, Failure> {
    let reader = SnapshotReader::open(path).map_err(|error| failure(&error))?;
    let head = reader.head().clone();
    let mismatch = |flag: String, what: String| {
        Err(Failure::usage(format!("{flag} contradicts snapshot {}, which is of {what}: leave it out", path.display())))
    };
    let (shape, model) = (&head.shape, head.cpu.model);
    let new = [
        (machine.kernel.is_some(), "--kernel"),
        (machine.initrd.is_some(), "--initrd"),
        (machine.append.is_some(), "--append"),
        (machine.guest_gateway.is_some(), "--guest-gateway"),
    ];
    if let Some((_, flag)) = new.into_iter().find(|(given, _)| *given) {
        return Err(Failure::usage(format!(
            "{flag} and --restore contradict each other: \
                a guest that goes on from a snapshot is not started anew; leave one out"
        )));
    }
    if let Some(guest) = node.guest.as_ref().filter(|guest| **guest != head.guest) {
        return mismatch(format!("--guest {guest}"), format!("guest '{}'", head.guest));
    }
    if let Some(memory) = machine.memory.filter(|memory| memory.bytes != shape.memory_bytes) {
        return mismatch(
            format!("--memory {memory}"),
            format!("a machine with {} MiB of memory", shape.memory_bytes >> 20),
        );
    }
    if let Some(cpus) = machine.cpus.filter(|cpus| *cpus != shape.cpus) {
        return mismatch(format!("--cpus {cpus}"), format!("a machine with {} vCPUs", shape.cpus));
    }
    if let Some(rng) = machine.rng.filter(|rng| *rng != shape.rng) {
        let how = if shape.rng { "with" } else { "without" };
        return mismatch(format!("--rng {rng}"), format!("a machine {how} a source of random bytes"));
    }
    if machine.mac.is_some_and(|Mac(mac)| mac != shape.mac) {
        return mismatch("--mac".to_owned(), format!("a machine with the address {}", mac_text(shape.mac)));
    }
    if node.cpu.is_some_and(|flag| flag.model() != model) {
        return mismatch("--cpu".to_owned(), format!("a machine with --cpu {}", model.name()));
    }
    node.guest = Some(head.guest.clone());
    node.cpu = Some(match model {
        CpuModel::Host => CpuFlag::Host,
        CpuModel::Baseline => CpuFlag::Baseline,
    });
    Ok(head)
}

/// An Ethernet address as people write it.
pub(super) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// What a snapshot's error is to a script and to a person.
pub(super) fn failure(error: &SnapshotError) -> Failure {
    Failure { status: ExitStatus::of_snapshot(error), line: error.to_string() }
}

//! Starting a guest from a snapshot: all that can be wrong with it is found before the guest is
//! claimed, so before anything runs.

use std::path::Path;

use super::config::NodeConfig;
use super::error::NodeError;
use crate::checkpoint::output::OutputGate;
use crate::checkpoint::snapshot::{SnapshotError, SnapshotHead, SnapshotReader};
use crate::machine::{Machine, host_cpu};
use crate::protocol::machine_shape::MachineShape;

/// A snapshot that fits this host and this node.
pub(crate) struct Snapshot {
    reader: SnapshotReader,
    /// Its head.
    pub head: SnapshotHead,
}

/// Opens the snapshot of a guest with a machine of `shape` (but for its disks).
///
/// # Errors
/// [`NodeError::Snapshot`].
pub(crate) fn open(path: &Path, config: &NodeConfig, shape: &MachineShape) -> Result<Snapshot, NodeError> {
    let reader = SnapshotReader::open(path)?;
    let head = reader.head().clone();
    let without_disks = |shape: &MachineShape| MachineShape { disks: Vec::new(), ..shape.clone() };
    if head.guest != config.guest || head.cpu.model != config.cpu || without_disks(&head.shape) != without_disks(shape)
    {
        let what = "another one took its place while this node started".to_owned();
        return Err(SnapshotError::Damaged { path: path.to_owned(), what }.into());
    }
    head.check_cpu(path, host_cpu(config.cpu)?)?;
    Ok(Snapshot { reader, head })
}

impl Snapshot {
    /// Puts it into a new machine, which is left paused.
    ///
    /// # Errors
    /// [`NodeError::Snapshot`]; the machine is then of no use.
    pub(crate) fn load(self, path: &Path, machine: &mut Machine, gate: &OutputGate) -> Result<(), NodeError> {
        let state = self.reader.load(machine.memory())?;
        let failed = |error| SnapshotError::Machine { path: path.to_owned(), reason: Box::new(error) };
        machine.restore(&state).map_err(failed)?;
        gate.drain_input();
        Ok(())
    }
}

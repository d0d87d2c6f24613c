//! What an operator asks of a node, and why it is refused.

use std::time::Duration;

use thiserror::Error;

/// What an operator asks of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Stop the vCPUs.
    Stop,
    /// Let them go on.
    Cont,
    /// Cut an epoch now.
    Checkpoint,
    /// Tell the network once more where the guest is.
    AnnounceSelf(AnnounceSeries),
    /// Compare disks with the secondary's, while the guest runs.
    VerifyDisks(DiskChoice),
    /// End this node. A protected guest goes on at the secondary; an unprotected one is shut down.
    Quit,
}

/// How often the network is told where the guest is, as QEMU has it: at once, then after `initial`,
/// and each time `step` later than the time before, up to `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AnnounceSeries {
    /// The first pause.
    pub initial: Duration,
    /// The longest.
    pub max: Duration,
    /// How often in all.
    pub rounds: u32,
    /// By how much each is longer than the one before.
    pub step: Duration,
}

impl AnnounceSeries {
    /// What a node does by itself when a guest begins to run: the first can be lost, or overtaken
    /// by a late frame of the host that died, which turns the switches back.
    pub const DEFAULT: AnnounceSeries = AnnounceSeries {
        initial: Duration::from_millis(50),
        max: Duration::from_millis(2000),
        rounds: 7,
        step: Duration::from_millis(200),
    };

    /// The pause before the announcement with this number, counted from 0; `None` if there is no
    /// more.
    pub fn pause_before(&self, number: u32) -> Option<Duration> {
        let pauses_before = number.checked_sub(1).filter(|_| number < self.rounds)?;
        Some(self.step.saturating_mul(pauses_before).saturating_add(self.initial).min(self.max))
    }
}

/// Which disks are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiskChoice {
    /// Every one that travels.
    All,
    /// The one with this number in the machine's shape.
    Number(u64),
    /// The one with this serial number, filled up with zero bytes.
    Serial([u8; 20]),
}

/// Why a command has no effect.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Error)]
pub enum CommandRefused {
    /// This node does not run the guest.
    #[error("this node is a secondary: it does not run the guest; ask the primary")]
    Secondary,
    /// The guest is being restored.
    #[error("this node is taking the guest over; ask again when it runs")]
    TakingOver,
    /// The guest runs elsewhere.
    #[error("this node is fenced: another node runs the guest; ask that one")]
    Fenced,
    /// The guest is being shut down.
    #[error("the guest is being shut down")]
    Stopping,
    /// There is nobody an epoch could be sent to.
    #[error("there is no secondary, so there are no epochs; start one with mcd secondary")]
    NoSecondary,
    /// The secondary was lost before the epoch was committed.
    #[error("the secondary was lost before the epoch was committed")]
    SecondaryLost,
    /// The vCPUs or a device did not stop.
    #[error("the guest could not be stopped: {0}")]
    NotStopped(String),
    /// The disks cannot be verified now.
    #[error(transparent)]
    Verify(#[from] VerifyRefused),
}

/// Why disks cannot be verified now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
pub enum VerifyRefused {
    /// There is nothing to compare with.
    #[error("the guest is not protected: there is no secondary with a whole image to compare with")]
    NotProtected,
    /// The secondary is an older build.
    #[error("the secondary's mcd is older and cannot hash its disks; run the same mcd on both hosts")]
    Unable,
    /// One at a time.
    #[error("the disks are being verified already; mc-query-disk-verify says how far that is")]
    Busy,
    /// There is no such disk, or none at all.
    #[error("the guest has no such disk that it can write; disks count from 0 in the order of --disk")]
    NoSuchDisk,
}

//! What keeps the state space finite: how often each thing may still happen.

/// What is left of each bounded thing. Part of the state: two worlds with different futures are
/// different.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// Faults of all kinds together.
    pub faults: u8,
    /// Processes that die.
    pub crashes: u8,
    /// Connections that one side sees break.
    pub losses: u8,
    /// Nodes that are frozen for longer than the heartbeat timeout.
    pub stalls: u8,
    /// Inputs whose actions are carried out one by one, with everything else in between.
    pub splits: u8,
    /// Questions to the arbiter that are given up, carried out or not, or carried out late.
    pub silences: u8,
    /// Captures that fail.
    pub failed_captures: u8,
    /// Operators that end a primary.
    pub quits: u8,
    /// Packets the guest sends, each with a write.
    pub packets: u8,
    /// Epochs an operator asks for.
    pub checkpoints: u8,
    /// Connections newcomers open.
    pub connects: u8,
    /// Newcomers that come after the first.
    pub newcomers: u8,
}

impl Bounds {
    /// Nothing may happen but what must.
    pub const NONE: Bounds = Bounds {
        faults: 0,
        crashes: 0,
        losses: 0,
        stalls: 0,
        splits: 0,
        silences: 0,
        failed_captures: 0,
        quits: 0,
        packets: 0,
        checkpoints: 0,
        connects: 0,
        newcomers: 0,
    };

    /// True if a fault of the kind that `left` counts may happen.
    pub fn may(&self, left: u8) -> bool {
        self.faults > 0 && left > 0
    }
}

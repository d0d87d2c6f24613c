//! The fault matrix: every fault, and what must come of it. `docs/operating/failover.md` shows it,
//! the trials assert it.

use std::fmt::Write;

/// What is done to a pair that protects a guest under load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// SIGKILL to the primary.
    KillPrimary,
    /// SIGKILL to the secondary.
    KillSecondary,
    /// SIGSTOP to the primary, and SIGCONT after so many ms.
    FreezePrimary(u64),
    /// SIGSTOP to the primary for about the heartbeat timeout: now a little less, now a little
    /// more.
    FreezePrimaryEdge,
    /// SIGSTOP to the secondary, and SIGCONT after so many ms.
    FreezeSecondary(u64),
    /// Packets between the hosts are dropped in silence.
    Drop(Ports, Way),
    /// The wire between the hosts has no carrier.
    LinkDown,
    /// The wire between the hosts carries 1 MB/s, for some seconds.
    SlowLink,
    /// The arbiter is out of reach for a second.
    ArbiterUnreachable,
    /// The arbiter is stopped and started again.
    ArbiterRestart,
    /// The arbiter is out of reach; then SIGKILL to the primary; a second later the arbiter is
    /// back.
    ArbiterUnreachableThenKillPrimary,
    /// The arbiter is out of reach; then SIGKILL to the secondary; a second later the arbiter is
    /// back.
    ArbiterUnreachableThenKillSecondary,
    /// The arbiter's disk is full; then SIGKILL to the primary; a second later there is room.
    ArbiterFullThenKillPrimary,
    /// The arbiter's disk is full; then both ports are dropped; a second later there is room.
    ArbiterFullThenDrop,
    /// SIGKILL to a newcomer that is being filled.
    KillNewcomerInResync,
    /// SIGKILL to the primary while it fills a newcomer: the only whole copy is gone.
    KillPrimaryInResync,
    /// SIGKILL to the primary, and to the secondary while it takes over.
    KillBothInTakeover,
    /// SIGKILL to both at once.
    KillBoth,
}

/// Which connections between the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ports {
    /// The data port.
    Data,
    /// The heartbeat port.
    Heartbeat,
    /// Both.
    Both,
}

/// Which direction between the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// Both directions.
    Both,
    /// What the secondary sends.
    ToPrimary,
    /// What the primary sends.
    ToSecondary,
}

/// Who runs the guest once all is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runs {
    /// The primary goes on, and the pair was never apart.
    Pair,
    /// The primary goes on, alone at first.
    Primary,
    /// The secondary took over.
    Secondary,
    /// One of the two, whichever asked the arbiter first.
    Either,
    /// The primary, still protected; or one of the two, whichever asked the arbiter first.
    PairOrEither,
    /// Nobody: both copies are gone, until an operator says `mcd cold-start`.
    Nobody,
}

impl Runs {
    /// As the table says it.
    pub fn words(self) -> &'static str {
        match self {
            Runs::Pair => "the primary, still protected",
            Runs::Primary => "the primary",
            Runs::Secondary => "the secondary",
            Runs::Either => "exactly one of them",
            Runs::PairOrEither => "the primary, still protected, or exactly one of them",
            Runs::Nobody => "nobody, until `mcd cold-start`",
        }
    }
}

/// From when on the guest's silence is measured, and how long it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// No longer than this, in ms.
    Ms(u64),
    /// The heartbeat timeout and this, in ms.
    AfterTimeout(u64),
    /// As long as the arbiter is away and this, in ms.
    AfterArbiter(u64),
    /// There is no limit: the guest is gone, or slow.
    Unbounded,
}

impl Silence {
    /// The limit in ms, for a pair with this heartbeat timeout and an arbiter that was away for so
    /// long. A question that was asked while it was away may have to end first, which takes so
    /// long.
    pub fn limit_ms(self, timeout_ms: u64, away_ms: u64, question_ms: u64) -> Option<u64> {
        match self {
            Silence::Ms(ms) => Some(ms),
            Silence::AfterTimeout(ms) => Some(timeout_ms + ms),
            Silence::AfterArbiter(ms) => Some(away_ms + question_ms + ms),
            Silence::Unbounded => None,
        }
    }

    fn words(self) -> String {
        match self {
            Silence::Ms(ms) => format!("{ms} ms"),
            Silence::AfterTimeout(ms) => format!("heartbeat timeout + {ms} ms"),
            Silence::AfterArbiter(ms) => format!("until the arbiter is back + {ms} ms"),
            Silence::Unbounded => "–".to_owned(),
        }
    }
}

/// A fault and what must come of it.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// A short name, for the command line and reports.
    pub name: &'static str,
    /// The fault.
    pub fault: Fault,
    /// In words.
    pub what: &'static str,
    /// Who runs the guest afterwards.
    pub runs: Runs,
    /// What clients see.
    pub clients: &'static str,
    /// The 99th percentile of the guest's silence on the network may not be longer.
    pub silence: Silence,
    /// How protection comes back.
    pub then: &'static str,
    /// How often it comes in a random schedule, relative to the others; 0: only on demand.
    pub weight: u64,
    /// Whether the short form has it.
    pub short: bool,
}

const PAUSE: &str = "a pause";
const NOTHING: &str = "nothing";
const GONE: &str = "their connections end; the guest starts anew";
const BY_ITSELF: &str = "by itself: the loser joins again as a newcomer";
const RESTART: &str = "an operator starts a secondary on the dead host";
const EITHER: &str = "a loser that was primary fences itself and is started again as a secondary; one that was \
    secondary joins again by itself";

const fn row(name: &'static str, fault: Fault, what: &'static str, runs: Runs, silence: Silence) -> Row {
    let clients = match runs {
        Runs::Pair => NOTHING,
        Runs::Nobody => GONE,
        _ => PAUSE,
    };
    let then = match runs {
        Runs::Pair => "it was never gone",
        Runs::Nobody => "an operator says `mcd cold-start` and starts a secondary; plain `mcd primary` is refused",
        Runs::Either => EITHER,
        _ => RESTART,
    };
    Row { name, fault, what, runs, clients, silence, then, weight: 4, short: false }
}

impl Row {
    const fn then(self, then: &'static str) -> Row {
        Row { then, ..self }
    }

    const fn weight(self, weight: u64) -> Row {
        Row { weight, ..self }
    }

    const fn short(self) -> Row {
        Row { short: true, ..self }
    }
}

/// Every fault.
pub const ROWS: &[Row] = &[
    row("kill-primary", Fault::KillPrimary, "SIGKILL to the primary", Runs::Secondary, Silence::Ms(100))
        .weight(24)
        .short(),
    row("kill-secondary", Fault::KillSecondary, "SIGKILL to the secondary", Runs::Primary, Silence::Ms(100))
        .weight(8)
        .short(),
    row(
        "freeze-primary-short",
        Fault::FreezePrimary(30),
        "the primary is frozen for 30 ms",
        Runs::Pair,
        Silence::Ms(130),
    ),
    row(
        "freeze-primary-edge",
        Fault::FreezePrimaryEdge,
        "the primary is frozen for half to one and a half heartbeat timeouts",
        Runs::PairOrEither,
        Silence::AfterTimeout(100),
    )
    .then("it was never gone; or as after a cut")
    .weight(12),
    row(
        "freeze-primary-1s",
        Fault::FreezePrimary(1000),
        "the primary is frozen for 1 s (SIGSTOP, SIGCONT)",
        Runs::Secondary,
        Silence::AfterTimeout(100),
    )
    .then(
        "the old primary finds itself fenced when it wakes and releases nothing; \
        an operator starts it again as a secondary",
    )
    .weight(6)
    .short(),
    row(
        "freeze-primary-10s",
        Fault::FreezePrimary(10_000),
        "the primary is frozen for 10 s",
        Runs::Secondary,
        Silence::AfterTimeout(100),
    )
    .then("as above")
    .weight(2),
    row(
        "freeze-secondary-short",
        Fault::FreezeSecondary(30),
        "the secondary is frozen for 30 ms",
        Runs::Pair,
        Silence::Ms(130),
    ),
    row(
        "freeze-secondary-1s",
        Fault::FreezeSecondary(1000),
        "the secondary is frozen for 1 s",
        Runs::Primary,
        Silence::AfterTimeout(100),
    )
    .then(BY_ITSELF)
    .short(),
    row(
        "freeze-secondary-10s",
        Fault::FreezeSecondary(10_000),
        "the secondary is frozen for 10 s",
        Runs::Primary,
        Silence::AfterTimeout(100),
    )
    .then(BY_ITSELF)
    .weight(1),
    row(
        "drop-data",
        Fault::Drop(Ports::Data, Way::Both),
        "the data port is cut",
        Runs::Either,
        Silence::AfterTimeout(100),
    )
    .weight(6)
    .short(),
    row(
        "drop-heartbeat",
        Fault::Drop(Ports::Heartbeat, Way::Both),
        "the heartbeat port is cut",
        Runs::Either,
        Silence::AfterTimeout(100),
    )
    .weight(6)
    .short(),
    row(
        "drop-both",
        Fault::Drop(Ports::Both, Way::Both),
        "the hosts do not hear each other at all",
        Runs::Either,
        Silence::AfterTimeout(100),
    )
    .weight(10)
    .short(),
    row(
        "drop-to-primary",
        Fault::Drop(Ports::Both, Way::ToPrimary),
        "the primary does not hear the secondary",
        Runs::Either,
        Silence::AfterTimeout(100),
    )
    .short(),
    row(
        "drop-to-secondary",
        Fault::Drop(Ports::Both, Way::ToSecondary),
        "the secondary does not hear the primary",
        Runs::Either,
        Silence::AfterTimeout(100),
    )
    .short(),
    row(
        "drop-data-to-primary",
        Fault::Drop(Ports::Data, Way::ToPrimary),
        "acks are lost, nothing else",
        Runs::Either,
        Silence::AfterTimeout(100),
    ),
    row(
        "drop-data-to-secondary",
        Fault::Drop(Ports::Data, Way::ToSecondary),
        "epochs are lost, nothing else",
        Runs::Either,
        Silence::AfterTimeout(100),
    ),
    row("link-down", Fault::LinkDown, "the link between the hosts is down", Runs::Either, Silence::AfterTimeout(100)),
    row("slow-link", Fault::SlowLink, "the link between the hosts carries 1 MB/s", Runs::Pair, Silence::Unbounded)
        .weight(2),
    row("arbiter-cut", Fault::ArbiterUnreachable, "the arbiter is out of reach", Runs::Pair, Silence::Ms(100))
        .weight(2),
    row("arbiter-restart", Fault::ArbiterRestart, "the arbiter restarts", Runs::Pair, Silence::Ms(100)).weight(2),
    row(
        "arbiter-cut-kill-primary",
        Fault::ArbiterUnreachableThenKillPrimary,
        "SIGKILL to the primary while the arbiter is out of reach",
        Runs::Secondary,
        Silence::AfterArbiter(350),
    )
    .short(),
    row(
        "arbiter-cut-kill-secondary",
        Fault::ArbiterUnreachableThenKillSecondary,
        "SIGKILL to the secondary while the arbiter is out of reach",
        Runs::Primary,
        Silence::AfterArbiter(350),
    ),
    row(
        "arbiter-full-kill-primary",
        Fault::ArbiterFullThenKillPrimary,
        "SIGKILL to the primary while the arbiter's disk is full",
        Runs::Secondary,
        Silence::AfterArbiter(350),
    )
    .short(),
    row(
        "arbiter-full-drop",
        Fault::ArbiterFullThenDrop,
        "the hosts do not hear each other and the arbiter's disk is full",
        Runs::Either,
        Silence::AfterArbiter(450),
    ),
    row(
        "kill-newcomer-in-resync",
        Fault::KillNewcomerInResync,
        "SIGKILL to a newcomer that is being filled",
        Runs::Primary,
        Silence::Ms(100),
    )
    .short(),
    row(
        "kill-primary-in-resync",
        Fault::KillPrimaryInResync,
        "SIGKILL to the primary while its newcomer is being filled",
        Runs::Nobody,
        Silence::Unbounded,
    )
    .weight(2),
    row(
        "kill-both-in-takeover",
        Fault::KillBothInTakeover,
        "SIGKILL to the primary, and to the secondary as it takes over",
        Runs::Nobody,
        Silence::Unbounded,
    )
    .weight(2),
    row("kill-both", Fault::KillBoth, "SIGKILL to both at once", Runs::Nobody, Silence::Unbounded).weight(2).short(),
];

/// The row of that name.
pub fn find(name: &str) -> Option<&'static Row> {
    ROWS.iter().find(|row| row.name == name)
}

/// The table as `docs/operating/failover.md` has it.
pub fn table() -> String {
    let mut text = String::from(
        "| fault | name | who runs the guest | clients see | silence at most (p99) | protection comes back |\n\
            |---|---|---|---|---|---|\n",
    );
    for row in ROWS {
        let Row { name, what, runs, clients, silence, then, .. } = row;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {what} | `{name}` | {} | {clients} | {} | {then} |", runs.words(), silence.words());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_shows_the_fault_matrix() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/operating/failover.md");
        let document = std::fs::read_to_string(path).unwrap();
        assert!(
            document.contains(&table()),
            "docs/operating/failover.md does not show the table of tests/fault_injection/src/fault_matrix.rs; \
                `mcd-harness --table` prints it"
        );
    }

    #[test]
    fn names_are_unique_and_the_short_form_is_short() {
        for row in ROWS {
            assert_eq!(ROWS.iter().filter(|other| other.name == row.name).count(), 1, "{}", row.name);
        }
        assert!((10..=14).contains(&ROWS.iter().filter(|row| row.short).count()));
    }
}

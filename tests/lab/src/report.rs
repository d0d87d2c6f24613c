//! What came of the scenarios, for people and for programs.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;

use mcd::control::metrics::Quantiles;
use mcd::demo::client::Tally;
use serde::Serialize;

use crate::told::{Clocks, DiskSpeed};

/// Something a scenario did.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// What.
    pub what: String,
    /// How long it took, in s.
    pub took_s: f64,
    /// The longest silence a client saw in it, in ms, if that was measured.
    pub silence_ms: Option<u64>,
}

/// What the clients saw in a scenario.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Clients {
    /// Commands sent.
    pub requests: u64,
    /// Replies received.
    pub replies: u64,
    /// Writes that were answered.
    pub acknowledged_writes: u64,
    /// Of those, how many were not there at the end.
    pub lost_writes: u64,
    /// Replies that were not the one right reply.
    pub wrong_replies: u64,
    /// Connections that broke.
    pub resets: u64,
}

impl Clients {
    /// Reads what they counted.
    pub fn of(tally: &Tally) -> Clients {
        Clients {
            requests: tally.requests.load(Relaxed),
            replies: tally.replies.load(Relaxed),
            acknowledged_writes: tally.acknowledged_writes.load(Relaxed),
            lost_writes: tally.lost_writes.load(Relaxed),
            wrong_replies: tally.wrong_replies.load(Relaxed),
            resets: tally.resets.load(Relaxed),
        }
    }
}

/// What came of a scenario.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Its name.
    pub name: String,
    /// Whether all that it must show was so.
    pub ok: bool,
    /// How long it took, in s.
    pub took_s: f64,
    /// What it did.
    pub steps: Vec<Step>,
    /// What its clients saw, if it had any and came to its end.
    pub clients: Option<Clients>,
    /// What was measured in a Linux guest.
    pub figures: Figures,
    /// Why it is not ok.
    pub wrong: Option<String>,
}

/// What was measured in a Linux guest.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// Its clocks, after each step that matters.
    pub clocks: Vec<ClockFigures>,
    /// Its disk.
    pub disk: Vec<DiskFigures>,
    /// What its node said of itself, before each power cut.
    pub nodes: Vec<NodeFigures>,
}

/// The guest's clocks at some time.
#[derive(Clone, Debug, Serialize)]
pub struct ClockFigures {
    /// After which step.
    pub after: String,
    /// The guest's wall clock less the clients', in ms.
    pub wall_off_ms: f64,
    /// It may be off by so much more or less, in ms.
    pub wall_unsure_ms: f64,
    /// What the clocks did since the guest's boot.
    pub clocks: Clocks,
}

/// How fast the guest's disk was.
#[derive(Clone, Debug, Serialize)]
pub struct DiskFigures {
    /// Whether the guest was protected.
    pub protected: bool,
    /// How fast.
    pub speed: DiskSpeed,
}

/// What a node said of itself at some time.
#[derive(Clone, Debug, Serialize)]
pub struct NodeFigures {
    /// When.
    pub when: String,
    /// How long captures stopped the guest, in µs.
    pub pause_us: Quantiles,
    /// From the start of the pause to the ack, in µs.
    pub commit_us: Quantiles,
    /// How long output was held, in µs.
    pub hold_us: Quantiles,
    /// Dirty pages in an epoch.
    pub dirty_pages: Quantiles,
    /// Epochs committed.
    pub committed: u64,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.ok { "ok    " } else { "FAILED" };
        write!(f, "{verdict}  {:<14} {:5.0} s, {} steps", self.name, self.took_s, self.steps.len())?;
        if let Some(silence_ms) = self.steps.iter().filter_map(|step| step.silence_ms).max() {
            write!(f, ", longest silence {silence_ms} ms")?;
        }
        if let Some(Clients { replies, acknowledged_writes, lost_writes, wrong_replies, resets, .. }) = &self.clients {
            write!(
                f,
                "; {replies} replies, {acknowledged_writes} acknowledged writes, {lost_writes} lost, {wrong_replies} wrong, \
                 {resets} resets"
            )?;
        }
        match self.wrong.as_ref().and_then(|wrong| wrong.lines().next()) {
            Some(wrong) => write!(f, ": {wrong}"),
            None => Ok(()),
        }
    }
}

/// What came of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether every scenario is ok.
    pub ok: bool,
    /// How long all of it took, in s.
    pub took_s: f64,
    /// The scenarios.
    pub scenarios: Vec<Outcome>,
}

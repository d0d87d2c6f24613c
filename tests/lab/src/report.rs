//! What came of the scenarios, for people and for programs.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;

use mcd::control::metrics::Quantiles;
use mcd::testbed::client::Tally;
use serde::Serialize;

use crate::guest_report::{Clocks, CpuClocks, DiskSpeed};

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
    /// Whether that is because a host ended by itself.
    #[serde(skip)]
    pub host_gone: bool,
    /// Why it was tried a second time, if it was.
    pub repeated: Option<String>,
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

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(last) = self.clocks.last() {
            let off =
                |pick: fn(f64, f64) -> f64| self.clocks.iter().map(|at| at.wall_off_ms).reduce(pick).unwrap_or(0.0);
            let sum = |of: fn(&CpuClocks) -> u64| last.clocks.cpus.iter().map(of).sum::<u64>();
            let back = |clocks: &CpuClocks| clocks.monotonic.back + clocks.boottime.back + clocks.realtime.back;
            let jump_ns = last.clocks.cpus.iter().map(|cpu| cpu.monotonic.forward_ns_max).max().unwrap_or(0);
            write!(
                f,
                "\n        clocks ({}): {} steps back in {} reads on {} vCPUs; largest jump {} ms; \
                    wall clock {:.0} to {:.0} ms off",
                last.clocks.clocksource,
                sum(back),
                sum(|cpu| cpu.reads),
                last.clocks.cpus.len(),
                jump_ns / 1_000_000,
                off(f64::min),
                off(f64::max)
            )?;
        }
        for DiskFigures { protected, speed } in &self.disk {
            let DiskSpeed { write_mib_s, read_mib_s, sync_write, random_read } = speed;
            write!(
                f,
                "\n        disk, {}: write {write_mib_s:.1} MiB/s, read {read_mib_s:.1} MiB/s; 4 KiB sync write p50 \
                 {:.1} ms, p99 {:.1} ms; 4 KiB read p50 {:.1} ms, p99 {:.1} ms",
                if *protected { "protected" } else { "solo" },
                sync_write.p50_us as f64 / 1e3,
                sync_write.p99_us as f64 / 1e3,
                random_read.p50_us as f64 / 1e3,
                random_read.p99_us as f64 / 1e3
            )?;
        }
        for NodeFigures { when, pause_us, commit_us, hold_us, dirty_pages, committed } in &self.nodes {
            write!(
                f,
                "\n        {when}: {committed} epochs of {} pages, pause {:.1} ms, commit {:.1} ms, \
                    hold {:.1} ms (p50)",
                dirty_pages.p50,
                pause_us.p50 as f64 / 1e3,
                commit_us.p50 as f64 / 1e3,
                hold_us.p50 as f64 / 1e3
            )?;
        }
        Ok(())
    }
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
                "; {replies} replies, {acknowledged_writes} acknowledged writes, {lost_writes} lost, {wrong_replies} \
                 wrong, {resets} resets"
            )?;
        }
        if let Some(wrong) = self.wrong.as_ref().and_then(|wrong| wrong.lines().next()) {
            write!(f, ": {wrong}")?;
        }
        if let Some(why) = &self.repeated {
            write!(f, "\n        tried a second time: {why}")?;
        }
        self.figures.fmt(f)
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

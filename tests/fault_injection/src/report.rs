//! What a run found, for programs and for people.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::fault_matrix::{ROWS, Row};
use crate::trial::{Counts, Stages, Trial};

/// How a number was distributed over the trials of a fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// How many there were.
    pub count: usize,
    /// Half are at most this.
    pub p50: f64,
    /// 99 in 100 are at most this.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of some numbers.
    pub fn of(mut numbers: Vec<f64>) -> Spread {
        numbers.sort_by(f64::total_cmp);
        let count = numbers.len();
        // The smallest number that at least this share of all do not exceed.
        let at =
            |percent: usize| numbers.get((count * percent).div_ceil(100).saturating_sub(1)).copied().unwrap_or(0.0);
        Spread { count, p50: at(50), p99: at(99), max: at(100) }
    }
}

/// All trials of one fault.
#[derive(Clone, Debug, Serialize)]
pub struct FaultReport {
    /// The row's name.
    pub name: &'static str,
    /// The fault, in words.
    pub what: &'static str,
    /// Who should run the guest afterwards.
    pub expected: &'static str,
    /// Who did, and how often.
    pub runs: BTreeMap<String, usize>,
    /// From the fault to the first packet of the new primary, in ms.
    pub takeover_ms: Spread,
    /// Medians of the stages, in ms.
    pub stages_ms: Stages,
    /// The guest's silence on the network, in ms.
    pub silence_ms: Spread,
    /// The most the p99 of that may be, in ms: the longest of the trials' limits.
    pub silence_limit_ms: Option<u64>,
    /// The longest silence of a connection, in ms.
    pub client_gap_ms: Spread,
    /// Whether the silence was within its limit.
    pub in_time: bool,
    /// See [`Trial::late_frames`].
    pub late_frames: u64,
    /// Violations.
    pub violations: u64,
    /// Trials whose row did not come true.
    pub wrong_trials: usize,
}

/// The whole report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The seed of the run.
    pub seed: u64,
    /// `file`, …
    pub arbiter: String,
    /// Heartbeat timeout, in ms.
    pub heartbeat_timeout_ms: u64,
    /// The longest epoch, in ms.
    pub interval_ms: u64,
    /// The guest's memory, in MiB.
    pub memory_mib: u32,
    /// How long the run took, in s.
    pub took_s: f64,
    /// What the clients saw.
    pub client: Counts,
    /// Frames that were checked.
    pub frames: u64,
    /// Payload bytes that were sent more than once, and compared.
    pub bytes_compared: u64,
    /// Takeovers that no fault explains: this machine was frozen.
    pub unplanned_takeovers: u64,
    /// Lost writes, wrong replies, resets, and whatever the traffic checker found.
    pub violations: u64,
    /// Whether nothing was violated and every row came true.
    pub ok: bool,
    /// Whether every silence was within its limit.
    pub in_time: bool,
    /// By fault.
    pub faults: Vec<FaultReport>,
    /// Every trial, in order.
    pub trials: Vec<Trial>,
}

/// The settings a report names.
#[derive(Clone, Debug, Default)]
pub struct Frame {
    /// See the fields of [`Report`].
    pub seed: u64,
    /// As above.
    pub arbiter: String,
    /// As above.
    pub heartbeat_timeout_ms: u64,
    /// As above.
    pub interval_ms: u64,
    /// As above.
    pub memory_mib: u32,
    /// As above.
    pub took_s: f64,
    /// As above.
    pub client: Counts,
    /// Frames, and bytes compared.
    pub checked: (u64, u64),
    /// As above.
    pub unplanned_takeovers: u64,
}

impl Report {
    /// Hashes up.
    pub fn new(frame: Frame, trials: Vec<Trial>) -> Report {
        let faults: Vec<FaultReport> = ROWS.iter().filter_map(|row| fault_report(row, &trials)).collect();
        let violations = trials.iter().map(|trial| trial.violations).sum();
        Report {
            seed: frame.seed,
            arbiter: frame.arbiter,
            heartbeat_timeout_ms: frame.heartbeat_timeout_ms,
            interval_ms: frame.interval_ms,
            memory_mib: frame.memory_mib,
            took_s: frame.took_s,
            client: frame.client,
            frames: frame.checked.0,
            bytes_compared: frame.checked.1,
            unplanned_takeovers: frame.unplanned_takeovers,
            violations,
            ok: violations == 0 && trials.iter().all(|trial| trial.wrongs.is_empty()),
            in_time: faults.iter().all(|fault| fault.in_time),
            faults,
            trials,
        }
    }
}

fn fault_report(row: &Row, trials: &[Trial]) -> Option<FaultReport> {
    let trials: Vec<&Trial> = trials.iter().filter(|trial| trial.fault == row.name).collect();
    if trials.is_empty() {
        return None;
    }
    let spread = |number: &dyn Fn(&Trial) -> Option<f64>| Spread::of(trials.iter().filter_map(|t| number(t)).collect());
    let mut runs = BTreeMap::new();
    trials.iter().for_each(|trial| *runs.entry(trial.runs.clone()).or_insert(0) += 1);
    let stage = |number: fn(&Stages) -> f64| spread(&|t| t.stages.as_ref().map(number)).p50;
    let silence_ms = spread(&|t| Some(t.silence_ms));
    // How far each trial was from its own limit: the arbiter's absence is not the same every time.
    let over_ms = spread(&|t| t.silence_limit_ms.map(|limit| t.silence_ms - limit as f64));
    Some(FaultReport {
        name: row.name,
        what: row.what,
        expected: row.runs.words(),
        runs,
        takeover_ms: spread(&|t| t.takeover_ms),
        stages_ms: Stages {
            detect: stage(|s| s.detect),
            arbitrate: stage(|s| s.arbitrate),
            apply: stage(|s| s.apply),
            restore: stage(|s| s.restore),
            resume: stage(|s| s.resume),
        },
        silence_ms,
        silence_limit_ms: trials.iter().filter_map(|t| t.silence_limit_ms).max(),
        client_gap_ms: spread(&|t| Some(t.client_gap_ms)),
        in_time: over_ms.count == 0 || over_ms.p99 <= 0.0,
        late_frames: trials.iter().map(|t| t.late_frames).sum(),
        violations: trials.iter().map(|t| t.violations).sum(),
        wrong_trials: trials.iter().filter(|t| !t.wrongs.is_empty()).count(),
    })
}

impl fmt::Display for Report {
    /// For a person: the answer last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<28}{:>5}  {:>16}  {:>16}  {:>16}", "fault", "n", "takeover ms", "silence ms", "client gap ms")?;
        writeln!(f, "{:<33}  {:>16}  {:>16}  {:>16}", "", "p50 / p99", "p50 / p99", "p50 / p99")?;
        for fault in &self.faults {
            let pair = |s: &Spread| {
                if s.count == 0 { "-".to_owned() } else { format!("{:.1} / {:.1}", s.p50, s.p99) }
            };
            let mark = match (fault.violations, fault.wrong_trials, fault.in_time) {
                (0, 0, true) => "",
                (0, 0, false) => "  LATE",
                _ => "  WRONG",
            };
            writeln!(
                f,
                "{:<28}{:>5}  {:>16}  {:>16}  {:>16}{mark}",
                fault.name,
                fault.silence_ms.count,
                pair(&fault.takeover_ms),
                pair(&fault.silence_ms),
                pair(&fault.client_gap_ms)
            )?;
        }
        let Counts { requests, acknowledged_writes, lost_writes, wrong_replies, resets, silent, .. } = self.client;
        writeln!(
            f,
            "clients: {requests} requests, {acknowledged_writes} writes acknowledged; {lost_writes} lost, \
                {wrong_replies} wrong replies, {resets} resets, {silent} silent"
        )?;
        writeln!(
            f,
            "traffic checker: {} frames, {} bytes compared with what was sent before; {} late frames; \
                {} unplanned takeovers",
            self.frames,
            self.bytes_compared,
            self.faults.iter().map(|fault| fault.late_frames).sum::<u64>(),
            self.unplanned_takeovers
        )?;
        for trial in self.trials.iter().filter(|trial| !trial.wrongs.is_empty()) {
            writeln!(f, "  {}: {}", trial.fault, trial.wrongs.join("; "))?;
        }
        let verdict = if self.ok { "every row came true" } else { "NOT OK: see above" };
        let time = if self.in_time { "and in time" } else { "but NOT IN TIME" };
        write!(
            f,
            "{} trials in {:.0} s, {} violations: {verdict}, {time}",
            self.trials.len(),
            self.took_s,
            self.violations
        )
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A trial with some numbers.
    pub fn trial(takeover_ms: f64, silence_ms: f64) -> Trial {
        Trial {
            fault: "kill-primary",
            runs: "the secondary".into(),
            takeover_ms: Some(takeover_ms),
            stages: Some(Stages { detect: 1.0, arbitrate: 2.0, apply: 3.0, restore: 4.0, resume: 5.0 }),
            silence_ms,
            silence_limit_ms: Some(100),
            client_gap_ms: silence_ms + 200.0,
            arbiter_away_ms: 0,
            late_frames: 0,
            violations: 0,
            wrongs: Vec::new(),
        }
    }

    #[test]
    fn a_report_says_what_is_wrong_and_what_is_late() {
        let good = Report::new(Frame::default(), vec![trial(10.0, 12.0), trial(11.0, 13.0)]);
        assert!(good.ok && good.in_time && good.to_string().ends_with("every row came true, and in time"));
        assert_eq!((good.faults[0].takeover_ms.p50, good.faults[0].takeover_ms.p99), (10.0, 11.0));
        let late = Report::new(Frame::default(), vec![trial(10.0, 101.0)]);
        assert!(late.ok && !late.in_time && late.to_string().contains("LATE"));
        let wrong = Trial { wrongs: vec!["two releasers".into()], violations: 1, ..trial(10.0, 12.0) };
        let wrong = Report::new(Frame::default(), vec![wrong]);
        assert!(!wrong.ok && wrong.to_string().contains("two releasers"));
    }
}

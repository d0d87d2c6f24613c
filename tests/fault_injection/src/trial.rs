//! One trial: a protected guest under load, one fault, and whether its row came true.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use mcd::control::status::TakeoverReport;
use mcd::testbed::client::Tally;
use mcd::testbed::namespaces::HostName;
use serde::Serialize;

use crate::fault_matrix::{Fault, Row, Runs};
use crate::faults::{After, Done};
use crate::test_pair::TestPair;
use crate::traffic_checker::{ReleaserInterval, TrafficReport};
use mcd::testbed::error::TestbedError;

/// The stages of a takeover, in ms each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Stages {
    /// From the last sign of life to the suspicion.
    pub detect: f64,
    /// Until the arbiter had decided.
    pub arbitrate: f64,
    /// Until every committed epoch was in the image.
    pub apply: f64,
    /// Until the machine had its state.
    pub restore: f64,
    /// Until the guest ran.
    pub resume: f64,
}

/// What one trial found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Trial {
    /// The row's name.
    pub fault: &'static str,
    /// Who ran the guest afterwards.
    pub runs: String,
    /// From the fault to the first packet of the new primary, if there was a takeover, in ms.
    pub takeover_ms: Option<f64>,
    /// Its stages.
    pub stages: Option<Stages>,
    /// The longest time without a frame of the guest on the clients' network, in ms.
    pub silence_ms: f64,
    /// How long that may be at most.
    pub silence_limit_ms: Option<u64>,
    /// The longest silence of a connection, its own retransmission timer included, in ms.
    pub client_gap_ms: f64,
    /// How long the arbiter was away, in ms.
    pub arbiter_away_ms: u64,
    /// Frames of a frozen primary that were checked before it froze and left after it woke.
    pub late_frames: u64,
    /// Lost writes, wrong replies, resets, silent connections, and whatever the traffic checker
    /// found.
    pub violations: u64,
    /// What of the row did not come true, and the violations, in words.
    pub wrongs: Vec<String>,
}

/// What the clients have counted so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Commands sent.
    pub requests: u64,
    /// Replies received.
    pub replies: u64,
    /// Writes that were answered, rightly.
    pub acknowledged_writes: u64,
    /// Keys that did not hold what had been acknowledged.
    pub lost_writes: u64,
    /// Replies that were not the one right reply.
    pub wrong_replies: u64,
    /// Connections that broke.
    pub resets: u64,
    /// Connections that were given up.
    pub silent: u64,
}

impl Counts {
    /// What a tally says now.
    pub fn of(tally: &Tally) -> Counts {
        Counts {
            requests: tally.requests.load(Relaxed),
            replies: tally.replies.load(Relaxed),
            acknowledged_writes: tally.acknowledged_writes.load(Relaxed),
            lost_writes: tally.lost_writes.load(Relaxed),
            wrong_replies: tally.wrong_replies.load(Relaxed),
            resets: tally.resets.load(Relaxed),
            silent: tally.silent.load(Relaxed),
        }
    }

    /// Adds what happened between two looks.
    pub fn add(&mut self, since: &Counts, now: &Counts) {
        self.requests += now.requests - since.requests;
        self.replies += now.replies - since.replies;
        self.acknowledged_writes += now.acknowledged_writes - since.acknowledged_writes;
        self.lost_writes += now.lost_writes - since.lost_writes;
        self.wrong_replies += now.wrong_replies - since.wrong_replies;
        self.resets += now.resets - since.resets;
        self.silent += now.silent - since.silent;
    }

    fn bad(&self) -> u64 {
        self.lost_writes + self.wrong_replies + self.resets + self.silent
    }
}

/// Runs one trial. Afterwards the guest is protected again. What the clients saw is added to
/// `totals`.
pub fn run(pair: &mut TestPair<'_>, row: &Row, totals: &mut Counts) -> Result<Trial, TestbedError> {
    let (old, generation) = begin(pair, row.fault)?;
    let look = |pair: &TestPair<'_>| pair.session.as_ref().map(|s| Counts::of(&s.tally)).unwrap_or_default();
    let since = look(pair);
    let complained = pair.session.as_ref().map_or(0, |session| session.tally.complaints.lock().len());
    let unplanned = pair.unplanned;
    let done = pair.inflict(row.fault, generation)?;
    let mut trial = Trial {
        fault: row.name,
        runs: String::new(),
        takeover_ms: None,
        stages: None,
        silence_ms: 0.0,
        silence_limit_ms: row.silence.limit_ms(pair.timeout_ms, done.away_ms, pair.arbiter.question_ms().unwrap_or(0)),
        client_gap_ms: 0.0,
        arbiter_away_ms: done.away_ms,
        late_frames: 0,
        violations: 0,
        wrongs: done.wrongs.clone(),
    };
    check_who_runs(&mut trial, row, old, &done);
    if let After::Leads(host, status) = &done.after {
        pair.runs_on(*host);
        if let Some(takeover) = status.takeover.as_ref().filter(|_| *host != old) {
            note_takeover(&mut trial, takeover, done.began_us);
        }
    }
    if matches!(done.after, After::Nobody) {
        let report = pair.capture.report().map_err(TestbedError::io("follow the frames"))?;
        check_frames(&mut trial, row, &report, old, &[], unplanned != pair.unplanned);
        let now = look(pair);
        check_clients(&mut trial, pair, &since, &now, complained);
        totals.add(&since, &now);
        pair.cold_start(&mut trial.wrongs)?;
        pair.settle()?;
        return Ok(trial);
    }
    pair.answered()?;
    trial.client_gap_ms = pair.gauges().iter().map(|gauge| gauge.silence_us()).max().unwrap_or(0) as f64 / 1000.0;
    trial.silence_ms = silence_us(&pair.capture.glance(), old, pair.runner) as f64 / 1000.0;
    let report = rest(pair, row, old, unplanned)?;
    let changes = pair.changes.clone();
    check_frames(&mut trial, row, &report, old, &changes, unplanned != pair.unplanned);
    let now = look(pair);
    check_clients(&mut trial, pair, &since, &now, complained);
    totals.add(&since, &now);
    Ok(trial)
}

/// Brings everything to rest and has every key read back; what was seen until then.
///
/// On a busy machine a node can be given up meanwhile, after the look at who runs the guest: frames
/// of the new primary then come before its takeover is known here. So whoever seems to be one too
/// many is looked for once more among the nodes; a second releaser is none of them.
fn rest(pair: &mut TestPair<'_>, row: &Row, old: HostName, unplanned: u64) -> Result<TrafficReport, TestbedError> {
    const LOOKS_MAX: u32 = 3;
    let mut looks = 0;
    loop {
        pair.settle()?;
        pair.verify()?;
        let report = pair.capture.report().map_err(TestbedError::io("follow the frames"))?;
        looks += 1;
        let explained = unexpected_releasers(row, &report, old, &pair.changes, unplanned != pair.unplanned).1.is_none();
        if explained || looks == LOOKS_MAX {
            return Ok(report);
        }
    }
}

/// Brings the guest to a random moment of its protected life. Returns the host it runs on and its
/// generation.
fn begin(pair: &mut TestPair<'_>, fault: Fault) -> Result<(HostName, u64), TestbedError> {
    loop {
        pair.settle()?;
        let life = Duration::from_micros(100_000 + pair.rng.below(300_000));
        pair.pass(life)?;
        if pair.protected().is_none() {
            continue;
        }
        pair.prepare(fault)?;
        pair.answered()?;
        pair.capture.mark().map_err(TestbedError::io("follow the frames"))?;
        pair.changes.clear();
        pair.gauges().iter().for_each(|gauge| gauge.reset());
        // The last moments are passed blindly, so that the fault falls anywhere in an epoch, not
        // where a look ends.
        let blind_us = pair.rng.below(1 + pair.settings.interval_ms * 1000);
        std::thread::sleep(Duration::from_micros(blind_us));
        let runner = pair.runner;
        let generation = match fault {
            Fault::KillNewcomerInResync | Fault::KillPrimaryInResync => pair.status(runner).map(|s| s.generation),
            _ => pair.protected(),
        };
        if let Some(generation) = generation {
            return Ok((runner, generation));
        }
    }
}

fn check_who_runs(trial: &mut Trial, row: &Row, old: HostName, done: &Done) {
    let (runs, right) = match (&done.after, row.runs) {
        (After::Pair, expected) => ("the pair", matches!(expected, Runs::Pair | Runs::PairOrEither)),
        (After::Nobody, expected) => ("nobody", expected == Runs::Nobody),
        (After::Leads(host, _), expected) if *host == old => {
            ("the primary", matches!(expected, Runs::Primary | Runs::Either | Runs::PairOrEither))
        }
        (After::Leads(..), expected) => {
            // A newcomer may have got its last page in the last instant.
            let whole = row.fault == Fault::KillPrimaryInResync;
            ("the secondary", matches!(expected, Runs::Secondary | Runs::Either | Runs::PairOrEither) || whole)
        }
    };
    trial.runs = runs.to_owned();
    if !right {
        trial.wrongs.push(format!("expected to run the guest: {}; runs it: {runs}", row.runs.words()));
    }
}

/// How long the guest said nothing because of the fault. At a change of hosts that ends with the
/// new primary's first frame: when there are few clients, all of them may wait for their own timers
/// after that.
fn silence_us(seen: &TrafficReport, old: HostName, new: HostName) -> u64 {
    let new_primary = seen.intervals.windows(2).find_map(|pair| match pair {
        [before, after] if old != new && after.host == new => Some(after.first_us.saturating_sub(before.last_us)),
        _ => None,
    });
    new_primary.unwrap_or(seen.longest_silence_us)
}

fn note_takeover(trial: &mut Trial, takeover: &TakeoverReport, began_us: u64) {
    let first_us = takeover.first_packet_monotonic_us;
    trial.takeover_ms = first_us.map(|us| us.saturating_sub(began_us) as f64 / 1000.0);
    trial.stages = Some(Stages {
        detect: takeover.detect_ms,
        arbitrate: takeover.arbitrate_ms,
        apply: takeover.apply_ms,
        restore: takeover.restore_ms,
        resume: takeover.resume_ms,
    });
}

fn check_frames(
    trial: &mut Trial,
    row: &Row,
    seen: &TrafficReport,
    old: HostName,
    changes: &[HostName],
    unplanned: bool,
) {
    let (late_frames, wrong) = unexpected_releasers(row, seen, old, changes, unplanned);
    trial.late_frames = late_frames;
    if let Some(wrong) = wrong {
        trial.violations += 1;
        trial.wrongs.push(wrong);
    }
    trial.violations += seen.violations + seen.resets;
    trial.wrongs.extend(seen.words.iter().cloned());
    if seen.resets > 0 {
        trial.wrongs.push(format!("the guest reset {} connections", seen.resets));
    }
}

/// How many late frames are forgiven, and what is wrong with the intervals if they are not those of
/// `old` and then of `changes`.
fn unexpected_releasers(
    row: &Row,
    seen: &TrafficReport,
    old: HostName,
    changes: &[HostName],
    unplanned: bool,
) -> (u64, Option<String>) {
    // Frames that a frozen process had checked before it was stopped leave when it wakes, at most
    // one per thread that releases.
    let forgiven =
        if matches!(row.fault, Fault::FreezePrimary(_) | Fault::FreezePrimaryEdge) || unplanned { 1 } else { 0 };
    let (intervals, late_frames) = forgive(&seen.intervals, forgiven);
    let expected: Vec<HostName> = std::iter::once(old).chain(changes.iter().copied()).collect();
    let hosts: Vec<HostName> = intervals.iter().map(|interval| interval.host).collect();
    // A new primary that is killed in its turn may have got as far as its first frames.
    let new_primary = row.fault == Fault::KillBothInTakeover && hosts == [old, old.other()];
    // A host from which no frame came (it died at once) has no interval.
    if hosts == expected || new_primary || (hosts.is_empty() && expected.len() == 1) {
        return (late_frames, None);
    }
    let list = |hosts: &[HostName]| hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let wrong = format!("two releasers: frames came from {}, expected from {}", list(&hosts), list(&expected));
    (late_frames, Some(format!("{wrong} ({:?})", seen.intervals)))
}

/// The intervals without those of at most `most` frames between two of the other host; and how many
/// frames those were.
fn forgive(intervals: &[ReleaserInterval], most: u64) -> (Vec<ReleaserInterval>, u64) {
    let (mut kept, mut late): (Vec<ReleaserInterval>, u64) = (Vec::new(), 0);
    for (at, interval) in intervals.iter().enumerate() {
        let between = at > 1 && at + 1 < intervals.len();
        if between && interval.frames <= most {
            late += interval.frames;
        } else if let Some(last) = kept.last_mut().filter(|last| last.host == interval.host) {
            last.frames += interval.frames;
            last.last_us = interval.last_us;
        } else {
            kept.push(*interval);
        }
    }
    (kept, late)
}

fn check_clients(trial: &mut Trial, pair: &TestPair<'_>, since: &Counts, now: &Counts, complained: usize) {
    let mut seen = Counts::default();
    seen.add(since, now);
    trial.violations += seen.bad();
    if let Some(session) = pair.session.as_ref().filter(|_| seen.bad() > 0) {
        let complaints = session.tally.complaints.lock();
        trial.wrongs.extend(complaints.iter().skip(complained).cloned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_late_frame_between_two_of_the_new_primary_is_counted_apart() {
        let (a, b) = (HostName::A, HostName::B);
        let interval = |host, frames| ReleaserInterval { host, frames, first_us: 0, last_us: 0 };
        let hosts = |intervals: &[ReleaserInterval]| intervals.iter().map(|r| r.host).collect::<Vec<_>>();
        let late = [interval(a, 9), interval(b, 5), interval(a, 1), interval(b, 7)];
        let (kept, count) = forgive(&late, 1);
        assert_eq!((hosts(&kept), count), (vec![a, b], 1));
        assert_eq!(hosts(&forgive(&late, 0).0), [a, b, a, b]);
        let worse = [interval(a, 9), interval(b, 5), interval(a, 2), interval(b, 7)];
        assert_eq!(hosts(&forgive(&worse, 1).0), [a, b, a, b]);
        // The new primary's first frame is never a late one of its own.
        assert_eq!(hosts(&forgive(&[interval(a, 9), interval(b, 1), interval(a, 3)], 1).0), [a, b, a]);
    }
}

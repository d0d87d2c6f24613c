//! What a run found, for a person and for a program.

use std::fmt;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::control::metrics::{EpochSample, Quantiles};
use crate::testbed::probe::histogram;

/// Median and 99th percentile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pair {
    /// Half are at most this.
    pub p50: u64,
    /// 99 in 100 are at most this.
    pub p99: u64,
}

impl Pair {
    /// Of a histogram.
    pub fn of(histogram: &Histogram<u64>) -> Pair {
        Pair { p50: histogram.value_at_quantile(0.5), p99: histogram.value_at_quantile(0.99) }
    }
}

/// One kill and what came of it. Times in ms.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Round {
    /// How the secondary noticed: `closed` or `silence`.
    pub cause: String,
    /// From the kill to the suspicion: `detect_ms` without the part that the node was alive and had
    /// nothing to say.
    pub noticed_ms: f64,
    /// From the last sign of life to the suspicion.
    pub detect_ms: f64,
    /// Until the arbiter had decided.
    pub arbitrate_ms: f64,
    /// Until every committed epoch was in the image.
    pub apply_ms: f64,
    /// Until the machine had its state.
    pub restore_ms: f64,
    /// Until the guest ran.
    pub resume_ms: f64,
    /// From the suspicion to the first packet.
    pub first_packet_ms: f64,
    /// From the kill to the first packet the new primary released.
    pub takeover_ms: f64,
    /// The longest silence a client saw, its own TCP retransmission timer included.
    pub client_gap_ms: f64,
    /// From the start of the new secondary until the guest was protected again.
    pub resync_ms: f64,
}

/// What the clients saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ClientReport {
    /// Commands sent.
    pub requests: u64,
    /// Replies received.
    pub replies: u64,
    /// Writes that were answered.
    pub acknowledged_writes: u64,
    /// Keys that did not hold at the end what had been acknowledged.
    pub lost_writes: u64,
    /// Replies that were not the right one, or that nobody asked for.
    pub wrong_replies: u64,
    /// Connections that broke.
    pub resets: u64,
    /// Connections given up because no reply came for a minute.
    pub silent: u64,
    /// Connections, the latency probe's included.
    pub connections: u64,
}

/// The floor of a pause for the median dirty set, by the formula measured for hosts of this kind,
/// in µs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PauseFloor {
    /// If every page is copied from warm memory.
    pub low: f64,
    /// If every page is cold and alone.
    pub high: f64,
}

impl PauseFloor {
    /// For so many dirty pages: kick and empty pause, dirty log, copying, state.
    pub fn of(dirty_pages: u64) -> PauseFloor {
        let pages = dirty_pages as f64;
        let floor = |copy_us: f64| 40.0 + 7.0 + 0.03 * pages + copy_us * pages + 20.0;
        PauseFloor { low: floor(0.21), high: floor(0.47) }
    }
}

/// How long epochs took and what they held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct EpochShape {
    /// How long captures stopped the guest.
    pub pause_us: Quantiles,
    /// From the start of a pause to the ack.
    pub commit_us: Pair,
    /// Pages in an epoch.
    pub dirty_pages: Quantiles,
    /// What a pause must cost at least for the median of `dirty_pages`.
    pub pause_floor_us: PauseFloor,
}

/// All epochs of all nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct EpochsReport {
    /// Epochs that secondaries acknowledged, as last told by each node.
    pub committed: u64,
    /// Epochs captured and never committed.
    pub aborted: u64,
    /// Times and pages.
    #[serde(flatten)]
    pub shape: EpochShape,
    /// Bytes on the wire between the hosts, resync included.
    pub wire_bytes: u64,
}

/// Latencies with one request in flight, without load, in µs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LatencyReport {
    /// While the guest ran alone.
    pub solo: Pair,
    /// While it was protected.
    pub protected: Pair,
}

/// The whole report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Every kill.
    pub rounds: Vec<Round>,
    /// What the clients saw.
    pub client: ClientReport,
    /// All epochs.
    pub epochs: EpochsReport,
    /// The epochs of a while in which the guest wrote memory and nothing else happened; only with
    /// such a load.
    pub quiet_epochs: Option<EpochShape>,
    /// What protection adds to a request.
    pub latency_us: LatencyReport,
    /// Whether nothing was lost, wrong, doubled or reset.
    pub ok: bool,
    /// What was wrong, in words, the first few.
    pub complaints: Vec<String>,
    /// Takeovers beside the rounds: a node was frozen for so long that the other one gave it up.
    pub unplanned_takeovers: u32,
    /// The seed of the run.
    pub seed: u64,
}

/// Collects epochs.
pub struct EpochSamples {
    pause_us: Histogram<u64>,
    commit_us: Histogram<u64>,
    dirty_pages: Histogram<u64>,
}

impl EpochSamples {
    /// None yet.
    pub fn new() -> EpochSamples {
        EpochSamples { pause_us: histogram(), commit_us: histogram(), dirty_pages: histogram() }
    }

    /// Adds some.
    pub fn add(&mut self, samples: &[EpochSample]) {
        for sample in samples {
            self.pause_us.saturating_record(sample.pause_us);
            self.commit_us.saturating_record(sample.commit_us);
            self.dirty_pages.saturating_record(sample.dirty_pages);
        }
    }

    /// What they were like.
    pub fn shape(&self) -> EpochShape {
        let quantiles = |h: &Histogram<u64>| {
            let Pair { p50, p99 } = Pair::of(h);
            Quantiles { p50, p99, max: h.max() }
        };
        let dirty_pages = quantiles(&self.dirty_pages);
        EpochShape {
            pause_us: quantiles(&self.pause_us),
            commit_us: Pair::of(&self.commit_us),
            dirty_pages,
            pause_floor_us: PauseFloor::of(dirty_pages.p50),
        }
    }
}

impl Default for EpochSamples {
    fn default() -> EpochSamples {
        EpochSamples::new()
    }
}

/// The median of one of the numbers of all rounds.
pub fn median(rounds: &[Round], number: impl Fn(&Round) -> f64) -> f64 {
    let mut values: Vec<f64> = rounds.iter().map(number).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// A number with commas between its thousands.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let head = digits.len() % 3;
    let mut text = digits.get(..head).unwrap_or_default().to_owned();
    for group in digits.as_bytes().get(head..).unwrap_or_default().chunks(3) {
        if !text.is_empty() {
            text.push(',');
        }
        text.extend(group.iter().map(|digit| char::from(*digit)));
    }
    text
}

impl fmt::Display for EpochShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EpochShape { pause_us: pause, commit_us: commit, dirty_pages: dirty, pause_floor_us: floor } = self;
        write!(
            f,
            "pause p50 {} p99 {} max {} µs; commit p50 {} p99 {} µs; dirty pages p50 {} p99 {} max {} \
             (floor of a pause for p50: {:.0} to {:.0} µs)",
            pause.p50,
            pause.p99,
            pause.max,
            commit.p50,
            commit.p99,
            dirty.p50,
            dirty.p99,
            dirty.max,
            floor.low,
            floor.high
        )
    }
}

impl fmt::Display for Report {
    /// For a person: one screen, the answer last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { client, epochs, latency_us: latency, .. } = self;
        if !self.rounds.is_empty() {
            let take = |number: fn(&Round) -> f64| median(&self.rounds, number);
            let worst = |number: fn(&Round) -> f64| self.rounds.iter().map(number).fold(0.0, f64::max);
            writeln!(
                f,
                "takeover    {} × SIGKILL: first packet {:.1} ms after the kill (median; worst {:.1})",
                self.rounds.len(),
                take(|r| r.takeover_ms),
                worst(|r| r.takeover_ms)
            )?;
            writeln!(
                f,
                "            noticed {:.1}, arbitrate {:.1}, apply {:.1}, restore {:.1}, resume {:.1} ms (medians)",
                take(|r| r.noticed_ms),
                take(|r| r.arbitrate_ms),
                take(|r| r.apply_ms),
                take(|r| r.restore_ms),
                take(|r| r.resume_ms)
            )?;
            writeln!(
                f,
                "            longest silence a client saw {:.0} ms (median; worst {:.0}); \
                    protected again after {:.0} ms",
                take(|r| r.client_gap_ms),
                worst(|r| r.client_gap_ms),
                take(|r| r.resync_ms)
            )?;
        }
        if self.unplanned_takeovers > 0 {
            writeln!(f, "            {} more unplanned, by stalls of this machine", self.unplanned_takeovers)?;
        }
        writeln!(
            f,
            "epochs      {} committed, {} aborted, {} MB on the wire",
            grouped(epochs.committed),
            epochs.aborted,
            grouped(epochs.wire_bytes / 1_000_000)
        )?;
        writeln!(f, "            {}", epochs.shape)?;
        if let Some(quiet) = &self.quiet_epochs {
            writeln!(f, "            without requests: {quiet}")?;
        }
        writeln!(
            f,
            "latency     one request in flight: solo p50 {} p99 {} µs, protected p50 {} p99 {} µs",
            latency.solo.p50, latency.solo.p99, latency.protected.p50, latency.protected.p99
        )?;
        writeln!(
            f,
            "client      {} connections, {} requests, {} replies, every one checked; {} acknowledged writes",
            client.connections,
            grouped(client.requests),
            grouped(client.replies),
            grouped(client.acknowledged_writes)
        )?;
        writeln!(
            f,
            "            {} lost writes, {} wrong replies, {} connections reset, {} silent",
            client.lost_writes, client.wrong_replies, client.resets, client.silent
        )?;
        for complaint in &self.complaints {
            writeln!(f, "            {complaint}")?;
        }
        f.write_str(if self.ok { "ok: no client noticed" } else { "NOT OK: see above" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            rounds: vec![Round {
                cause: "closed".into(),
                noticed_ms: 0.5,
                detect_ms: 1.0,
                arbitrate_ms: 2.0,
                apply_ms: 3.0,
                restore_ms: 4.0,
                resume_ms: 5.0,
                first_packet_ms: 6.0,
                takeover_ms: 7.0,
                client_gap_ms: 8.0,
                resync_ms: 9.0,
            }],
            client: ClientReport::default(),
            epochs: EpochsReport { shape: EpochSamples::new().shape(), ..EpochsReport::default() },
            quiet_epochs: None,
            latency_us: LatencyReport::default(),
            ok: true,
            complaints: Vec::new(),
            unplanned_takeovers: 0,
            seed: 1,
        }
    }

    #[test]
    fn the_json_has_the_keys_that_programs_read() {
        let value = serde_json::to_value(report()).unwrap();
        for path in [
            "/rounds/0/cause",
            "/rounds/0/detect_ms",
            "/rounds/0/arbitrate_ms",
            "/rounds/0/apply_ms",
            "/rounds/0/restore_ms",
            "/rounds/0/resume_ms",
            "/rounds/0/first_packet_ms",
            "/rounds/0/takeover_ms",
            "/rounds/0/client_gap_ms",
            "/rounds/0/resync_ms",
            "/client/requests",
            "/client/replies",
            "/client/acknowledged_writes",
            "/client/lost_writes",
            "/client/wrong_replies",
            "/client/resets",
            "/client/connections",
            "/epochs/committed",
            "/epochs/aborted",
            "/epochs/pause_us/p50",
            "/epochs/pause_us/p99",
            "/epochs/pause_us/max",
            "/epochs/commit_us/p50",
            "/epochs/commit_us/p99",
            "/epochs/dirty_pages/p50",
            "/epochs/dirty_pages/p99",
            "/epochs/dirty_pages/max",
            "/epochs/wire_bytes",
            "/latency_us/solo/p50",
            "/latency_us/solo/p99",
            "/latency_us/protected/p50",
            "/latency_us/protected/p99",
            "/ok",
        ] {
            assert!(value.pointer(path).is_some(), "{path} is missing");
        }
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1000, 12_345, 1_234_567].map(grouped), ["0", "999", "1,000", "12,345", "1,234,567"]);
        assert!(report().to_string().ends_with("ok: no client noticed"));
        let bad = Report { ok: false, complaints: vec!["lost it".into()], ..report() };
        assert!(bad.to_string().contains("lost it") && bad.to_string().ends_with("NOT OK: see above"));
    }
}

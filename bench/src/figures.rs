//! What of a demo's report is drawn.

use serde::Deserialize;

/// The report of `mcd demo --json`.
#[derive(Debug, Deserialize)]
pub struct Demo {
    /// Every kill.
    pub rounds: Vec<Takeover>,
    /// Epochs of a while in which the guest wrote memory and nothing else happened.
    pub quiet_epochs: Option<Epochs>,
    /// A client with one request in flight.
    pub latency_us: Latency,
}

/// A takeover; times in ms.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Takeover {
    /// From the kill to the suspicion.
    pub noticed_ms: f64,
    /// Until the arbiter had decided.
    pub arbitrate_ms: f64,
    /// From the kill to the first packet of the new primary.
    pub takeover_ms: f64,
}

/// What epochs were like.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Epochs {
    /// How long the guest was paused.
    pub pause_us: Quantiles,
    /// How many pages travelled.
    pub dirty_pages: Quantiles,
    /// What a pause costs at least.
    pub pause_floor_us: Floor,
}

/// The floor of a pause, in µs.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Floor {
    /// With every page in a cache.
    pub low: f64,
    /// With none.
    pub high: f64,
}

/// Latency solo and protected, in µs.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Latency {
    /// While the guest ran alone.
    pub solo: Quantiles,
    /// While it was protected.
    pub protected: Quantiles,
}

/// Median and 99th percentile.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Quantiles {
    /// Half are at most this.
    pub p50: u64,
    /// 99 in 100 are at most this.
    pub p99: u64,
}

//! What a person sees while the demo runs: a line when something happens, and one per second.

use std::fmt::{self, Display};
use std::io::Write;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::report::{Pair, grouped};
use crate::control::metrics::EpochSample;
use crate::control::status::NodeStatus;
use crate::testbed::probe::histogram;

const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Prints, and collects the numbers of the running second.
pub(super) struct Screen {
    started: Instant,
    last_line: Instant,
    last_replies: u64,
    pause_us: Histogram<u64>,
    dirty_pages: Histogram<u64>,
}

/// What the line per second says beside the epochs.
pub(super) struct Moment<'a> {
    pub(super) status: Option<&'a NodeStatus>,
    /// The host the guest is on.
    pub(super) host: char,
    /// Replies so far.
    pub(super) replies: u64,
    /// Median latency of the probe in this second, in µs, and of a solo guest.
    pub(super) latency_us: Option<(u64, u64)>,
}

impl Screen {
    pub(super) fn new() -> Screen {
        let now = Instant::now();
        Screen { started: now, last_line: now, last_replies: 0, pause_us: histogram(), dirty_pages: histogram() }
    }

    /// Says something that happened.
    pub(super) fn say(&self, what: impl Display) {
        self.print(format_args!("{what}"));
    }

    fn print(&self, text: fmt::Arguments<'_>) {
        // A reader that went away is no reason to end in the middle of a round.
        let _ = writeln!(std::io::stdout(), "{:6.1} s  {text}", self.started.elapsed().as_secs_f64());
    }

    pub(super) fn add(&mut self, samples: &[EpochSample]) {
        for sample in samples {
            self.pause_us.saturating_record(sample.pause_us);
            self.dirty_pages.saturating_record(sample.dirty_pages);
        }
    }

    /// Whether the next line per second is due.
    pub(super) fn is_due(&self) -> bool {
        self.last_line.elapsed() >= LINE_INTERVAL
    }

    /// Prints the line per second and begins the next second.
    pub(super) fn line(&mut self, moment: &Moment<'_>) {
        let seconds = self.last_line.elapsed().as_secs_f64().max(0.001);
        let state = moment.status.map_or_else(|| "no answer".to_owned(), |status| status.state.to_string());
        let pause = Pair::of(&self.pause_us);
        let added = moment
            .latency_us
            .map_or_else(|| "-".to_owned(), |(now, solo)| format!("{:+.2} ms", (now as f64 - solo as f64) / 1000.0));
        let replies = moment.replies.saturating_sub(self.last_replies) as f64 / seconds;
        self.print(format_args!(
            "{} {state:<10} {:4.0} epochs/s  pause {:4}/{:<4} µs  dirty {:4} pages  added {added:>9}  {:>7} replies/s",
            moment.host,
            self.pause_us.len() as f64 / seconds,
            pause.p50,
            pause.p99,
            Pair::of(&self.dirty_pages).p50,
            grouped(replies as u64),
        ));
        self.last_line = Instant::now();
        self.last_replies = moment.replies;
        self.pause_us.reset();
        self.dirty_pages.reset();
    }
}

//! The rounds of the demo: a kill at a random moment, and what comes of it.

use std::thread;
use std::time::Duration;

use super::error::DemoError;
use super::report::Round;
use super::run::{ANSWER_LIMIT, Demo, RESYNC_LIMIT};
use crate::control::status::{NodeStatus, Role, State, TakeoverReport};
use crate::testbed::client::monotonic_us;

/// Longest wait for a takeover.
const TAKEOVER_LIMIT: Duration = Duration::from_secs(30);

impl<'a> Demo<'a> {
    /// Lets the guest live until the random moment at which its host is to die. Both nodes know
    /// then that the guest is protected.
    pub(super) fn come_to_the_moment(&mut self) -> Result<(), DemoError> {
        loop {
            let life_us = 500_000 + self.rng.below(2_000_000);
            self.pass(Duration::from_micros(life_us))?;
            self.wait("both nodes to see the guest protected", RESYNC_LIMIT, |demo| {
                Ok(demo.both_protected().then_some(()))
            })?;
            self.sample();
            // The last moments are passed blindly, so that the kill falls anywhere in an epoch, not
            // where a look ends.
            thread::sleep(Duration::from_micros(self.rng.below(1 + self.options.interval_ms * 1000)));
            // On a busy machine a node can be frozen for so long that the other one gives it up,
            // as it should. A guest whose only copy is on the host that dies would be lost, as it
            // must.
            if self.both_protected() {
                return Ok(());
            }
            self.screen
                .say("the nodes have lost sight of each other; the kill waits until the guest is protected again");
        }
    }

    fn both_protected(&mut self) -> bool {
        let mut nodes = std::iter::once(&mut self.primary).chain(&mut self.secondary);
        nodes.all(|node| node.status().is_some_and(|status| status.protected))
    }

    /// Kills the primary and waits until the guest runs on the other host and every client has been
    /// answered. What it returns lacks the resync that is to follow.
    pub(super) fn kill(&mut self, round: u32) -> Result<Round, DemoError> {
        let Some(new_primary) = self.secondary.take() else { return Err(DemoError::NoSecondary) };
        self.gauges().for_each(|gauge| gauge.reset());
        let killed_us = monotonic_us();
        self.primary.kill().map_err(DemoError::io("kill a node"))?;
        let dead = std::mem::replace(&mut self.primary, new_primary);
        let rounds = self.options.rounds;
        self.screen.say(format_args!("round {round} of {rounds}: SIGKILL to the node on host {}", dead.host()));
        self.bury_primary();
        let takeover = self.wait("the secondary to take over", TAKEOVER_LIMIT, |demo| {
            demo.status = demo.primary.status();
            match &demo.status {
                // It has given up its image: the other node was given the guest in the instant
                // before it was killed.
                Some(status) if status.state == State::Connecting => Err(DemoError::lost(&demo.primary)),
                status => Ok(status.as_ref().and_then(taken_over)),
            }
        })?;
        // Waits for the dead process too, which gives back its memory.
        drop(dead);
        let seen_us = monotonic_us();
        self.wait("every connection to be answered again", ANSWER_LIMIT, |demo| {
            Ok(demo.gauges().all(|gauge| !gauge.waits_since_before(seen_us)).then_some(()))
        })?;
        let client_gap_ms = self.gauges().map(|gauge| gauge.silence_us()).max().unwrap_or(0) as f64 / 1000.0;
        let since_kill_ms = |time_us: u64| time_us.saturating_sub(killed_us) as f64 / 1000.0;
        let takeover_ms = since_kill_ms(takeover.first_packet_monotonic_us.unwrap_or(0));
        self.screen.say(format_args!(
            "host {} runs the guest: first packet {takeover_ms:.1} ms after the kill; \
                longest silence a client saw {client_gap_ms:.0} ms",
            self.primary.host()
        ));
        Ok(Round {
            noticed_ms: since_kill_ms(takeover.started_monotonic_us),
            cause: takeover.cause,
            detect_ms: takeover.detect_ms,
            arbitrate_ms: takeover.arbitrate_ms,
            apply_ms: takeover.apply_ms,
            restore_ms: takeover.restore_ms,
            resume_ms: takeover.resume_ms,
            first_packet_ms: takeover.first_packet_ms.unwrap_or(0.0),
            takeover_ms,
            client_gap_ms,
            resync_ms: 0.0,
        })
    }

    /// Does `part`, and again if meanwhile the primary was fenced: on a busy machine it can stand
    /// still for so long that the secondary takes over without being asked to.
    pub(super) fn steadily<T>(
        &mut self,
        mut part: impl FnMut(&mut Demo<'a>) -> Result<T, DemoError>,
    ) -> Result<T, DemoError> {
        loop {
            match part(self) {
                Err(DemoError::Fenced) => {
                    self.screen.say("the primary was frozen for so long that it was given up");
                    self.recover()?;
                    self.unplanned += 1;
                }
                other => return other,
            }
        }
    }

    /// The primary is fenced, or has ended by itself: its new primary is the primary now, and needs
    /// a secondary.
    pub(super) fn recover(&mut self) -> Result<(), DemoError> {
        let Some(new_primary) = self.secondary.take() else { return Err(DemoError::NoSecondary) };
        let dead = std::mem::replace(&mut self.primary, new_primary);
        self.bury_primary();
        // The first packet may take its time where no client asks.
        let takeover = self.wait("the secondary to take over", TAKEOVER_LIMIT, |demo| {
            demo.status = demo.primary.status();
            Ok(demo.status.as_ref().filter(|status| status.role == Role::Primary).and_then(|s| s.takeover.clone()))
        })?;
        let (dead_host, new_primary) = (dead.host(), self.primary.host());
        // A fenced node stays, silent, until it is told to go.
        drop(dead);
        self.screen.say(format_args!("host {new_primary} took over from host {dead_host}: {takeover}"));
        self.protect()?;
        Ok(())
    }
}

/// The takeover's times, once the first packet is out.
fn taken_over(status: &NodeStatus) -> Option<TakeoverReport> {
    let takeover = status.takeover.as_ref().filter(|takeover| takeover.first_packet_monotonic_us.is_some())?;
    (status.role == Role::Primary).then(|| takeover.clone())
}

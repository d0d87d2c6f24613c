//! How each fault is brought about, and how it is known what came of it.

use std::thread;
use std::time::Duration;

use mcd::control::status::{NodeStatus, Role, State};
use mcd::testbed::client::monotonic_us;
use mcd::testbed::namespaces::HostName;
use mcd::testbed::nodes::StartAs;

use crate::fault_matrix::Fault;
use crate::test_pair::TestPair;
use mcd::testbed::error::TestbedError;

/// Longest wait for a decision.
const DECISION_LIMIT: Duration = Duration::from_secs(30);
/// How long the arbiter is away in faults that begin so.
const ARBITER_AWAY: Duration = Duration::from_secs(1);
/// How long a fault that must change nothing is watched.
const WATCH: Duration = Duration::from_millis(600);
/// How long the link is slow.
const SLOW: Duration = Duration::from_secs(3);
/// How a node exits that may not start because the guest runs elsewhere.
const REFUSED: i32 = 4;

/// What became of the pair.
#[derive(Clone, Debug)]
pub enum After {
    /// It was never apart.
    Pair,
    /// This host's node runs the guest, in a newer generation (or alone, if there was no pair
    /// before).
    Leads(HostName, Box<NodeStatus>),
    /// Nobody runs the guest.
    Nobody,
}

/// A fault that is over.
#[derive(Clone, Debug)]
pub struct Done {
    /// When it began, in µs of the monotonic clock.
    pub began_us: u64,
    /// How long the arbiter was away, in ms.
    pub away_ms: u64,
    /// What became of the pair.
    pub after: After,
    /// What was wrong, in words.
    pub wrongs: Vec<String>,
}

impl TestPair<'_> {
    /// What a fault needs before it: most need a protected guest, some a newcomer that is being
    /// filled.
    pub fn prepare(&mut self, fault: Fault) -> Result<(), TestbedError> {
        if !matches!(fault, Fault::KillNewcomerInResync | Fault::KillPrimaryInResync) {
            return Ok(());
        }
        let other = self.runner.other();
        self.kill(other)?;
        self.wait("the primary to go on alone", DECISION_LIMIT, |pair| {
            Ok(pair.leader().filter(|(_, status)| status.state == State::Solo).map(|_| ()))
        })?;
        self.bury(other);
        // So that the resync lasts.
        self.partitions.slow_down(&self.namespaces).map_err(TestbedError::io("slow the link down"))?;
        self.start(StartAs::Secondary, other)?;
        self.wait("a resync to begin", DECISION_LIMIT, |pair| {
            let status = pair.status(pair.runner);
            Ok(status.filter(|status| status.resync.as_ref().is_some_and(|resync| resync.pages_left > 0)).map(|_| ()))
        })
    }

    /// Brings the fault about, waits for what comes of it, and takes it away again.
    pub fn inflict(&mut self, fault: Fault, generation: u64) -> Result<Done, TestbedError> {
        let old = self.runner;
        let began_us = monotonic_us();
        let mut done = Done { began_us, away_ms: 0, after: After::Nobody, wrongs: Vec::new() };
        match fault {
            Fault::KillPrimary => {
                self.kill(old)?;
                done.after = self.decision(generation)?;
            }
            Fault::KillSecondary => {
                self.kill(old.other())?;
                done.after = self.decision(generation)?;
            }
            Fault::FreezePrimary(ms) => self.frozen(old, ms, generation, &mut done)?,
            Fault::FreezePrimaryEdge => {
                let us = self.timeout_ms * (500 + self.rng.below(1000));
                self.pause_process(old, Duration::from_micros(us))?;
                self.pass(WATCH)?;
                done.after = self.unchanged(generation)?;
            }
            Fault::FreezeSecondary(ms) => self.frozen(old.other(), ms, generation, &mut done)?,
            Fault::Drop(ports, way) => {
                let cut = self.partitions.drop_packets(&self.namespaces, old, ports, way);
                cut.map_err(TestbedError::io("drop packets"))?;
                done.after = self.decision(generation)?;
                self.linger()?;
            }
            Fault::LinkDown => {
                self.partitions.link_down(&self.namespaces).map_err(TestbedError::io("take the link down"))?;
                done.after = self.decision(generation)?;
                self.linger()?;
            }
            Fault::SlowLink => {
                self.partitions.slow_down(&self.namespaces).map_err(TestbedError::io("slow the link down"))?;
                self.pass(SLOW)?;
                done.after = self.unchanged(generation)?;
            }
            Fault::ArbiterUnreachable => {
                self.arbiter.partition().map_err(TestbedError::io("cut the arbiter off"))?;
                self.pass(ARBITER_AWAY)?;
                done.after = self.unchanged(generation)?;
            }
            Fault::ArbiterRestart => {
                self.arbiter.restart().map_err(TestbedError::io("restart the arbiter"))?;
                self.pass(WATCH)?;
                done.after = self.unchanged(generation)?;
            }
            Fault::ArbiterUnreachableThenKillPrimary | Fault::ArbiterUnreachableThenKillSecondary => {
                self.arbiter.partition().map_err(TestbedError::io("cut the arbiter off"))?;
                let victim = if fault == Fault::ArbiterUnreachableThenKillPrimary { old } else { old.other() };
                done.began_us = monotonic_us();
                self.kill(victim)?;
                self.without_arbiter(generation, &mut done)?;
            }
            Fault::ArbiterFullThenKillPrimary => {
                self.arbiter.fill().map_err(TestbedError::io("fill the arbiter's disk"))?;
                done.began_us = monotonic_us();
                self.kill(old)?;
                self.without_arbiter(generation, &mut done)?;
            }
            Fault::ArbiterFullThenDrop => {
                self.arbiter.fill().map_err(TestbedError::io("fill the arbiter's disk"))?;
                done.began_us = monotonic_us();
                let cut = self.partitions.drop_packets(
                    &self.namespaces,
                    old,
                    crate::fault_matrix::Ports::Both,
                    crate::fault_matrix::Way::Both,
                );
                cut.map_err(TestbedError::io("drop packets"))?;
                self.without_arbiter(generation, &mut done)?;
            }
            Fault::KillNewcomerInResync => {
                self.kill(old.other())?;
                done.after = self.wait("the primary to go on alone", DECISION_LIMIT, |pair| {
                    let leads = pair.leader().filter(|(_, status)| status.state == State::Solo);
                    Ok(leads.map(|(host, status)| After::Leads(host, Box::new(status))))
                })?;
            }
            Fault::KillPrimaryInResync => {
                self.kill(old)?;
                done.after = self.wait("the newcomer to give up", DECISION_LIMIT, |pair| {
                    let Some(status) = pair.status(old.other()) else { return Ok(None) };
                    Ok(match (status.role, status.state) {
                        (Role::Secondary, State::Connecting) => Some(After::Nobody),
                        (Role::Primary, _) => Some(After::Leads(old.other(), Box::new(status))),
                        _ => None,
                    })
                })?;
            }
            Fault::KillBothInTakeover | Fault::KillBoth => {
                self.kill(old)?;
                if fault == Fault::KillBothInTakeover {
                    // Anywhere between the first suspicion and the first packets of the new
                    // primary.
                    thread::sleep(Duration::from_micros(self.rng.below(15_000)));
                }
                self.kill(old.other())?;
            }
        }
        self.arbiter.heal().map_err(TestbedError::io("bring the arbiter back"))?;
        self.partitions.heal(&self.namespaces).map_err(TestbedError::io("heal the partition"))?;
        Ok(done)
    }

    /// Waits until a node runs the guest in a newer generation, with its takeover's first packet
    /// out.
    fn decision(&mut self, generation: u64) -> Result<After, TestbedError> {
        self.wait("a node to be given the guest", DECISION_LIMIT, |pair| {
            let leads = pair.leader().filter(|(_, status)| {
                let shown = status.takeover.as_ref().is_none_or(|takeover| takeover.first_packet_ms.is_some());
                status.generation > generation && shown
            });
            Ok(leads.map(|(host, status)| After::Leads(host, Box::new(status))))
        })
    }

    /// What became of a fault that should have changed nothing.
    fn unchanged(&mut self, generation: u64) -> Result<After, TestbedError> {
        if self.protected() == Some(generation) { Ok(After::Pair) } else { self.decision(generation) }
    }

    /// The fault lasts a while longer: time for the loser to do what it should not.
    fn linger(&mut self) -> Result<(), TestbedError> {
        let time = Duration::from_millis(self.rng.below(300));
        self.pass(time)
    }

    /// Stops a process for a time that is exact, because nothing else is looked at meanwhile.
    fn pause_process(&mut self, host: HostName, time: Duration) -> Result<(), TestbedError> {
        self.freeze(host, true)?;
        thread::sleep(time);
        self.freeze(host, false)
    }

    fn frozen(&mut self, host: HostName, ms: u64, generation: u64, done: &mut Done) -> Result<(), TestbedError> {
        let wakes_us = done.began_us + ms * 1000;
        self.freeze(host, true)?;
        if ms < self.timeout_ms {
            self.pass(Duration::from_millis(ms))?;
            self.freeze(host, false)?;
            self.pass(WATCH)?;
            done.after = self.unchanged(generation)?;
            return Ok(());
        }
        let decided = self.decision(generation);
        self.pass(Duration::from_micros(wakes_us.saturating_sub(monotonic_us())))?;
        self.freeze(host, false)?;
        done.after = decided?;
        let was_primary = host == self.runner;
        self.wait("the sleeper to see that it lost the guest", DECISION_LIMIT, |pair| {
            if pair.node(host).is_none_or(|node| node.ended().is_some()) {
                // A fencing script has seen to it.
                return Ok(Some(()));
            }
            let status = pair.status(host);
            Ok(status.filter(|s| if was_primary { s.role == Role::Fenced } else { !s.protected }).map(|_| ()))
        })
    }

    /// Nobody may run the guest in a new generation until the arbiter is back.
    fn without_arbiter(&mut self, generation: u64, done: &mut Done) -> Result<(), TestbedError> {
        self.pass(ARBITER_AWAY)?;
        if let Some((host, status)) = self.leader().filter(|(_, status)| status.generation > generation) {
            done.wrongs.push(format!(
                "host {host} was in generation {} although the arbiter could not have said so",
                status.generation
            ));
        }
        self.arbiter.heal().map_err(TestbedError::io("bring the arbiter back"))?;
        done.away_ms = monotonic_us().saturating_sub(done.began_us) / 1000;
        done.after = self.decision(generation)?;
        Ok(())
    }

    /// Both copies are gone: the guest must not start by itself, and does on an operator's word.
    pub fn cold_start(&mut self, wrongs: &mut Vec<String>) -> Result<(), TestbedError> {
        self.session = None;
        for host in [HostName::A, HostName::B] {
            self.kill(host)?;
            self.bury(host);
        }
        self.capture.forget_flows().map_err(TestbedError::io("follow the frames"))?;
        let host = if self.rng.chance(50) { HostName::A } else { HostName::B };
        if !self.arbiter.keeps_record() {
            return self.boot(StartAs::ColdStart, host);
        }
        self.start(StartAs::Primary, host)?;
        let ended = self.wait("a plain primary to be refused", DECISION_LIMIT, |pair| {
            Ok(pair.node(host).and_then(mcd::testbed::nodes::Node::ended))
        })?;
        if ended.code() != Some(REFUSED) {
            wrongs.push(format!("a plain `mcd primary` was not refused: {ended}"));
        }
        self.bury(host);
        self.boot(StartAs::ColdStart, host)
    }
}

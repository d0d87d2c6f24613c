//! The load: many long-lived connections that read and write their own keys at random and check
//! every reply.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::Duration;

use super::client::{Broken, Connection, Dial, Gauge, Tally};
use super::model::Model;
use super::phase_barrier::PhaseBarrier;
use super::rng::Rng;

/// What the load is like.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Number of connections.
    pub connections: usize,
    /// Decides every command.
    pub seed: u64,
    /// Most commands sent in one go.
    pub pipeline_max: u64,
    /// Longest pause of a connection between two goes, in µs; the pauses are random. 0: none.
    pub think_us_max: u64,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions { connections: 16, seed: 1, pipeline_max: 16, think_us_max: 10_000 }
    }
}

/// What the load does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing in flight, connections open.
    Hold,
    /// Sending and checking.
    Run,
    /// Every key has been read back; then as [`Phase::Hold`].
    Verify,
    /// The same over new connections, the old ones having been closed: the server itself was
    /// started anew.
    VerifyAnew,
    /// Over.
    End,
}

/// A running load. Dropping it ends it.
pub struct Load {
    barrier: Arc<PhaseBarrier<Phase>>,
    tally: Arc<Tally>,
    gauges: Vec<Arc<Gauge>>,
    threads: Vec<JoinHandle<()>>,
}

struct Worker {
    number: usize,
    options: LoadOptions,
    dial: Dial,
    connection: Option<Connection>,
    model: Model,
    rng: Rng,
    tally: Arc<Tally>,
    gauge: Arc<Gauge>,
    barrier: Arc<PhaseBarrier<Phase>>,
}

impl Load {
    /// Opens every connection; then holds. Every reply and complaint is counted in `tally`.
    pub fn open(options: &LoadOptions, dial: &Dial, tally: &Arc<Tally>) -> io::Result<Load> {
        let barrier = Arc::new(PhaseBarrier::new(Phase::Hold, options.connections));
        let mut load = Load { barrier, tally: tally.clone(), gauges: Vec::new(), threads: Vec::new() };
        for number in 0..options.connections {
            let gauge = Arc::new(Gauge::default());
            let worker = Worker {
                number,
                options: options.clone(),
                dial: dial.clone(),
                connection: Some(Connection::open(format!("connection {number}"), dial, tally.clone(), gauge.clone())?),
                model: Model::new(format!("load{number}")),
                rng: Rng::split(options.seed, number as u64),
                tally: tally.clone(),
                gauge: gauge.clone(),
                barrier: load.barrier.clone(),
            };
            load.gauges.push(gauge);
            load.threads.push(std::thread::Builder::new().name(format!("load {number}")).spawn(move || worker.run())?);
        }
        Ok(load)
    }

    /// Asks for a phase; see [`Load::has_reached`].
    pub fn ask(&self, phase: Phase) {
        self.barrier.ask(phase);
    }

    /// Whether every connection is in that phase.
    pub fn has_reached(&self, phase: Phase) -> bool {
        self.barrier.all_reached(phase)
    }

    /// Asks for a phase and waits for it; false if it takes longer than `timeout`.
    pub fn bring_to(&self, phase: Phase, timeout: Duration) -> bool {
        self.ask(phase);
        self.barrier.wait_all_reached(phase, timeout)
    }

    /// The waiting times of each connection.
    pub fn gauges(&self) -> &[Arc<Gauge>] {
        &self.gauges
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.tally.over.store(true, Relaxed);
        self.barrier.ask(Phase::End);
        for thread in self.threads.drain(..) {
            // A panic of a worker has been printed; there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

impl Worker {
    fn run(mut self) {
        let mut phase = Phase::Hold;
        loop {
            let pause = (phase == Phase::Run && self.connection.is_some()).then(|| self.think());
            let wanted = self.barrier.wait_other(phase, pause);
            if wanted == Phase::End {
                return;
            }
            let done = match wanted {
                Phase::Run => self.one_go(),
                Phase::Verify if phase != Phase::Verify => self.verify(),
                Phase::VerifyAnew if phase != Phase::VerifyAnew => self.verify_anew(),
                _ => Ok(()),
            };
            if done.is_err() {
                self.connection = None;
            }
            if wanted != phase {
                phase = wanted;
                self.barrier.reached(self.number, phase);
            }
        }
    }

    fn think(&mut self) -> Duration {
        Duration::from_micros(self.rng.below(self.options.think_us_max + 1))
    }

    fn one_go(&mut self) -> Result<(), Broken> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        // Half of the goes are single commands, so that a lone request's latency matters too.
        let depth = if self.rng.chance(50) { 1 } else { 1 + self.rng.below(self.options.pipeline_max) };
        let commands = (0..depth).map(|_| self.model.draw(&mut self.rng)).collect();
        connection.exchange(&mut self.model, commands)
    }

    fn verify_anew(&mut self) -> Result<(), Broken> {
        self.connection = None;
        let name = format!("connection {} (opened anew)", self.number);
        let opened = Connection::open(name, &self.dial, self.tally.clone(), self.gauge.clone());
        let connection = opened.map_err(|error| self.tally.no_server(self.number, &error))?;
        self.connection.insert(connection).verify(&mut self.model)
    }

    fn verify(&mut self) -> Result<(), Broken> {
        if let Some(connection) = &mut self.connection {
            return connection.verify(&mut self.model);
        }
        // The broken connection has been counted. What it had been promised is checked all the
        // same.
        let name = format!("connection {} (checked over a new one)", self.number);
        let opened = Connection::open(name, &self.dial, self.tally.clone(), self.gauge.clone());
        let Ok(mut connection) = opened else { return Ok(()) };
        let _ = connection.verify(&mut self.model);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::testbed::probe::{Probe, ProbeMode};
    use crate::testbed::test_server::{Fault, TestServer};

    const WAIT_MAX: Duration = Duration::from_secs(30);

    fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + WAIT_MAX;
        while !holds() {
            assert!(Instant::now() < deadline, "waited in vain until {what}");
            std::thread::yield_now();
        }
    }

    /// Runs a load against a server until the fault, if there is one, is noticed; then verifies.
    fn run_with(fault: Option<Fault>) -> Arc<Tally> {
        let server = TestServer::start(fault, 500);
        let tally = Arc::new(Tally::default());
        let options = LoadOptions { connections: 4, seed: 42, think_us_max: 200, ..LoadOptions::default() };
        let load = Load::open(&options, &server.dial(), &tally).unwrap();
        load.ask(Phase::Run);
        match fault {
            None => until("the load ran", || tally.requests.load(Relaxed) > 2000),
            Some(fault) => until(&format!("{fault:?} was noticed"), || !tally.is_clean()),
        }
        // An answer left out has shifted all that follow: the last of that go is waited for longer
        // than a test should last.
        if fault != Some(Fault::DropReply) {
            assert!(load.bring_to(Phase::Hold, WAIT_MAX));
            let at_rest = tally.requests.load(Relaxed);
            assert!(load.bring_to(Phase::Verify, WAIT_MAX));
            assert!(tally.requests.load(Relaxed) > at_rest);
        }
        tally
    }

    fn counts(tally: &Tally) -> [u64; 4] {
        [&tally.wrong_replies, &tally.lost_writes, &tally.resets, &tally.silent].map(|count| count.load(Relaxed))
    }

    #[test]
    fn a_correct_server_gets_no_complaint() {
        let tally = run_with(None);
        assert!(tally.is_clean(), "{:?}", tally.complaints.lock());
        assert_eq!(tally.requests.load(Relaxed), tally.replies.load(Relaxed));
        assert!(tally.acknowledged_writes.load(Relaxed) > 500);
    }

    #[test]
    fn every_planted_fault_is_caught() {
        use Fault::*;
        for fault in [LoseWrites, RollBack, DoubleIncr, WrongGet, DoubleReply, DropReply, Reset, Garbage] {
            let tally = run_with(Some(fault));
            let [wrong, lost, resets, silent] = counts(&tally);
            let complaints = tally.complaints.lock();
            assert!(!tally.is_clean() && !complaints.is_empty(), "{fault:?} went unnoticed");
            match fault {
                LoseWrites | RollBack | DoubleIncr => assert!(wrong + lost > 0, "{fault:?}: {complaints:?}"),
                Reset => assert_eq!((wrong, lost, resets), (0, 0, 1), "{complaints:?}"),
                _ => assert!(wrong > 0, "{fault:?}: {complaints:?}"),
            }
            assert_eq!(silent, 0);
        }
    }

    #[test]
    fn a_server_started_anew_must_have_every_key() {
        for fault in [None, Some(Fault::LoseWrites)] {
            let server = TestServer::start(fault, 300);
            let tally = Arc::new(Tally::default());
            let options = LoadOptions { connections: 2, seed: 7, think_us_max: 0, ..LoadOptions::default() };
            let load = Load::open(&options, &server.dial(), &tally).unwrap();
            load.ask(Phase::Run);
            until("the load ran", || tally.requests.load(Relaxed) > 1000);
            assert!(load.bring_to(Phase::Hold, WAIT_MAX));
            let before = tally.replies.load(Relaxed);
            assert!(load.bring_to(Phase::VerifyAnew, WAIT_MAX));
            assert!(tally.replies.load(Relaxed) > before || fault.is_some());
            assert_eq!(tally.is_clean(), fault.is_none(), "{:?}", tally.complaints.lock());
            if fault.is_none() {
                drop(server);
                assert!(load.bring_to(Phase::Hold, WAIT_MAX) && load.bring_to(Phase::VerifyAnew, WAIT_MAX));
                assert_eq!(tally.resets.load(Relaxed), 2, "{:?}", tally.complaints.lock());
            }
        }
    }

    #[test]
    fn a_write_lost_in_silence_is_found_at_the_end() {
        use crate::testbed::model::{Command, Key};
        let server = TestServer::start(Some(Fault::LoseWrites), 1);
        let (tally, mut model) = (Arc::new(Tally::default()), Model::new("m"));
        let mut connection = Connection::open("one", &server.dial(), tally.clone(), Arc::default()).unwrap();
        let sets = ["first", "second"].map(|value| Command::Set(Key::Text(9), value.into()));
        connection.exchange(&mut model, sets.to_vec()).unwrap();
        assert_eq!((counts(&tally), tally.acknowledged_writes.load(Relaxed)), ([0; 4], 2));
        connection.verify(&mut model).unwrap();
        assert_eq!(counts(&tally), [0, 1, 0, 0]);
        let complaints = tally.complaints.lock();
        assert_eq!(*complaints, ["one: GET m:text:9: expected \"second\", got \"first\""]);
    }

    #[test]
    fn a_server_that_falls_silent_is_given_up_and_counted() {
        use crate::testbed::model::{Command, Key};
        let server = TestServer::start(Some(Fault::Mute), 1);
        let (tally, gauge, mut model) = (Arc::new(Tally::default()), Arc::new(Gauge::default()), Model::new("m"));
        let connection = Connection::open("one", &server.dial(), tally.clone(), gauge.clone()).unwrap();
        let mut connection = connection.with_timeout(Duration::from_millis(50));
        let write = Command::Set(Key::Text(0), b"x".to_vec());
        connection.exchange(&mut model, vec![write.clone()]).unwrap();
        connection.exchange(&mut model, vec![write]).unwrap_err();
        assert_eq!(counts(&tally), [0, 0, 0, 1]);
        assert!(gauge.silence_us() >= 50_000);
        assert!(!model.is_certain(Key::Text(0)));
    }

    #[test]
    fn the_probe_times_each_request_and_rests_when_idle() {
        let server = TestServer::start(None, 0);
        let tally = Arc::new(Tally::default());
        let probe = Probe::open(&server.dial(), &tally, Duration::from_millis(1)).unwrap();
        probe.ask(ProbeMode::Measure);
        until("it measured", || tally.replies.load(Relaxed) >= 100);
        probe.ask(ProbeMode::Idle);
        until("it rests", || probe.has_reached(ProbeMode::Idle));
        let asked = tally.replies.load(Relaxed);
        assert_eq!(probe.take().len(), asked);
        assert_eq!(probe.take().len(), 0);
        assert_eq!(probe.gauge().silence_us() > 0, asked > 0);
        probe.ask(ProbeMode::Verify);
        until("it verified", || probe.has_reached(ProbeMode::Verify));
        assert!(tally.is_clean(), "{:?}", tally.complaints.lock());
    }
}

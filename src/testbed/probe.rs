//! The latency probe: one connection with one request in flight, SET then GET, each timed and
//! checked.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use parking_lot::Mutex;

use super::client::{Broken, Connection, Dial, Gauge, Tally};
use super::model::{Command, Key, Model};
use super::phase_barrier::PhaseBarrier;

/// Longest latency that is told apart, in µs: beyond it, it is just this long.
const LATENCY_MAX_US: u64 = 600_000_000;

/// What the probe does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeMode {
    /// Nothing in flight.
    Idle,
    /// One request after the other.
    Measure,
    /// A pair of requests now and then.
    Watch,
    /// Its key has been read back; then as idle.
    Verify,
    /// Over.
    End,
}

/// A histogram of latencies in µs.
pub fn histogram() -> Histogram<u64> {
    // Three digits up to ten minutes: bounds that are constants and right.
    Histogram::new_with_max(LATENCY_MAX_US, 3).unwrap_or_else(|_| unreachable!("the bounds are constants"))
}

/// A running probe. Dropping it ends it.
pub struct Probe {
    barrier: Arc<PhaseBarrier<ProbeMode>>,
    latencies: Arc<Mutex<Histogram<u64>>>,
    gauge: Arc<Gauge>,
    tally: Arc<Tally>,
    thread: Option<JoinHandle<()>>,
}

impl Probe {
    /// Opens its connection; then it is idle. In [`ProbeMode::Watch`] it asks every
    /// `watch_interval`.
    pub fn open(dial: &Dial, tally: &Arc<Tally>, watch_interval: Duration) -> io::Result<Probe> {
        let barrier = Arc::new(PhaseBarrier::new(ProbeMode::Idle, 1));
        let (gauge, latencies) = (Arc::new(Gauge::default()), Arc::new(Mutex::new(histogram())));
        let mut worker = Worker {
            connection: Some(Connection::open("probe", dial, tally.clone(), gauge.clone())?),
            model: Model::new("probe"),
            latencies: latencies.clone(),
            barrier: barrier.clone(),
            asked: 0,
        };
        let thread = std::thread::Builder::new().name("probe".to_owned()).spawn(move || worker.run(watch_interval))?;
        Ok(Probe { barrier, latencies, gauge, tally: tally.clone(), thread: Some(thread) })
    }

    /// Asks for a mode; see [`Probe::has_reached`].
    pub fn ask(&self, mode: ProbeMode) {
        self.barrier.ask(mode);
    }

    /// Whether it is in that mode, with nothing of the one before in flight.
    pub fn has_reached(&self, mode: ProbeMode) -> bool {
        self.barrier.all_reached(mode)
    }

    /// The latencies since the last call, in µs.
    pub fn take(&self) -> Histogram<u64> {
        std::mem::replace(&mut self.latencies.lock(), histogram())
    }

    /// Its waiting times.
    pub fn gauge(&self) -> &Arc<Gauge> {
        &self.gauge
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.tally.over.store(true, Relaxed);
        self.barrier.ask(ProbeMode::End);
        if let Some(thread) = self.thread.take() {
            // A panic has been printed; there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

struct Worker {
    connection: Option<Connection>,
    model: Model,
    latencies: Arc<Mutex<Histogram<u64>>>,
    barrier: Arc<PhaseBarrier<ProbeMode>>,
    asked: u64,
}

impl Worker {
    fn run(&mut self, watch_interval: Duration) {
        let mut mode = ProbeMode::Idle;
        loop {
            let pause = match mode {
                _ if self.connection.is_none() => None,
                ProbeMode::Measure => Some(Duration::ZERO),
                ProbeMode::Watch => Some(watch_interval),
                _ => None,
            };
            let wanted = self.barrier.wait_other(mode, pause);
            let done = match wanted {
                ProbeMode::End => return,
                ProbeMode::Measure | ProbeMode::Watch => self.ask_twice(),
                ProbeMode::Verify if mode != wanted => self.verify(),
                ProbeMode::Verify | ProbeMode::Idle => Ok(()),
            };
            if done.is_err() {
                self.connection = None;
            }
            if wanted != mode {
                mode = wanted;
                self.barrier.reached(0, mode);
            }
        }
    }

    fn verify(&mut self) -> Result<(), Broken> {
        self.connection.as_mut().map_or(Ok(()), |connection| connection.verify(&mut self.model))
    }

    fn ask_twice(&mut self) -> Result<(), Broken> {
        const KEY: Key = Key::Text(0);
        self.asked += 1;
        let value = format!("asked {:056}", self.asked).into_bytes();
        for command in [Command::Set(KEY, value), Command::Get(KEY)] {
            let Some(connection) = &mut self.connection else { return Ok(()) };
            let started = Instant::now();
            connection.exchange(&mut self.model, vec![command])?;
            let took_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.latencies.lock().saturating_record(took_us);
        }
        Ok(())
    }
}

//! Reads the clocks on every vCPU, all the time: none may ever be behind what any vCPU has read
//! before.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::guest_report::{CLOCKS_PORT, ClockSteps, Clocks, CpuClocks};

/// How long a thread rests between two rounds unless it is to be busy.
const REST: Duration = Duration::from_millis(1);
/// How often it reads in a round.
const READS_PER_ROUND: u32 = 20;
/// Two reads that are further apart say nothing of a third between them, in ns.
const NEIGHBOURS_NS: u64 = 50_000;
/// Longest line that is asked with, in bytes.
const LINE_BYTES_MAX: u64 = 64;

/// One clock, read by all.
#[derive(Debug, Default)]
struct Shared {
    /// The newest time that any vCPU has read, in ns.
    newest_ns: AtomicU64,
}

/// One clock as seen on one vCPU.
#[derive(Debug, Default)]
struct Seen {
    last_ns: AtomicU64,
    back: AtomicU64,
    back_ns_max: AtomicU64,
    forward_ns_max: AtomicU64,
}

impl Seen {
    /// Reads the clock by `read`, and compares it with what was read before on any vCPU.
    fn look(&self, shared: &Shared, read: impl FnOnce() -> u64) -> u64 {
        // In this order: what is loaded here was read before what is read now.
        let newest = shared.newest_ns.load(SeqCst);
        let now = read();
        if now < newest {
            self.back.fetch_add(1, Relaxed);
            self.back_ns_max.fetch_max(newest - now, Relaxed);
            // So that one step back is counted about once.
            let _ = shared.newest_ns.compare_exchange(newest, now, SeqCst, SeqCst);
        } else {
            shared.newest_ns.fetch_max(now, SeqCst);
        }
        let last = self.last_ns.swap(now, Relaxed);
        if last != 0 {
            self.forward_ns_max.fetch_max(now.saturating_sub(last), Relaxed);
        }
        now
    }

    fn steps(&self) -> ClockSteps {
        let [back, back_ns_max, forward_ns_max] =
            [&self.back, &self.back_ns_max, &self.forward_ns_max].map(|count| count.load(Relaxed));
        ClockSteps { back, back_ns_max, forward_ns_max }
    }
}

#[derive(Debug, Default)]
struct Cpu {
    reads: AtomicU64,
    monotonic: Seen,
    boottime: Seen,
    realtime: Seen,
}

/// Everything that is watched.
#[derive(Debug)]
struct Watch {
    monotonic: Shared,
    boottime: Shared,
    realtime: Shared,
    cpus: Vec<Cpu>,
    /// The distance from CLOCK_MONOTONIC to the wall clock at the start, in ns.
    wall_ns: i64,
    wall_moved_ns_min: AtomicI64,
    wall_moved_ns_max: AtomicI64,
}

/// Watches the clocks and answers, for ever.
pub fn serve(busy: bool) -> io::Result<()> {
    let count = thread::available_parallelism()?.get();
    let wall_ns = signed(read(ClockId::CLOCK_REALTIME)) - signed(read(ClockId::CLOCK_MONOTONIC));
    let watch = Arc::new(Watch {
        monotonic: Shared::default(),
        boottime: Shared::default(),
        realtime: Shared::default(),
        cpus: (0..count).map(|_| Cpu::default()).collect(),
        wall_ns,
        wall_moved_ns_min: AtomicI64::new(0),
        wall_moved_ns_max: AtomicI64::new(0),
    });
    for number in 0..count {
        let watch = watch.clone();
        thread::Builder::new().name(format!("cpu {number}")).spawn(move || watch.run(number, busy))?;
    }
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, CLOCKS_PORT))?;
    for stream in listener.incoming() {
        // Who asks and goes away again has no answer coming.
        let _ = stream.and_then(|stream| answer(&watch, &stream));
    }
    Ok(())
}

fn answer(watch: &Watch, stream: &TcpStream) -> io::Result<()> {
    use io::Read;
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if lines.by_ref().take(LINE_BYTES_MAX).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let text = serde_json::to_string(&watch.clocks()?).map_err(io::Error::other)? + "\n";
        let mut writer = stream;
        writer.write_all(text.as_bytes())?;
    }
}

impl Watch {
    fn run(&self, number: usize, busy: bool) {
        let mut set = CpuSet::new();
        if let Err(error) = set.set(number).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)) {
            eprintln!("mcd-lab-guest: a thread cannot be kept on vCPU {number}: {error}");
            return;
        }
        let Some(cpu) = self.cpus.get(number) else { return };
        loop {
            for _ in 0..READS_PER_ROUND {
                self.look(cpu);
            }
            if !busy {
                thread::sleep(REST);
            }
        }
    }

    fn look(&self, cpu: &Cpu) {
        let before_ns = cpu.monotonic.look(&self.monotonic, || read(ClockId::CLOCK_MONOTONIC));
        let wall_ns = cpu.realtime.look(&self.realtime, || read(ClockId::CLOCK_REALTIME));
        let after_ns = cpu.monotonic.look(&self.monotonic, || read(ClockId::CLOCK_MONOTONIC));
        cpu.boottime.look(&self.boottime, || read(ClockId::CLOCK_BOOTTIME));
        cpu.reads.fetch_add(1, Relaxed);
        if after_ns.saturating_sub(before_ns) <= NEIGHBOURS_NS {
            let moved_ns = signed(wall_ns) - signed(before_ns) - self.wall_ns;
            self.wall_moved_ns_min.fetch_min(moved_ns, Relaxed);
            self.wall_moved_ns_max.fetch_max(moved_ns, Relaxed);
        }
    }

    fn clocks(&self) -> io::Result<Clocks> {
        let clocksource = std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")?;
        let tell = |cpu: &Cpu| CpuClocks {
            reads: cpu.reads.load(Relaxed),
            monotonic: cpu.monotonic.steps(),
            boottime: cpu.boottime.steps(),
            realtime: cpu.realtime.steps(),
        };
        Ok(Clocks {
            cpus: self.cpus.iter().map(tell).collect(),
            realtime_ns: read(ClockId::CLOCK_REALTIME),
            wall_moved_ns: [&self.wall_moved_ns_min, &self.wall_moved_ns_max].map(|moved| moved.load(Relaxed)),
            clocksource: clocksource.trim().to_owned(),
        })
    }
}

/// A clock's time, in ns. Every kernel has these clocks; a zero would be counted as a step back.
fn read(clock: ClockId) -> u64 {
    const NS_PER_S: u64 = 1_000_000_000;
    clock_gettime(clock).map_or(0, |time| {
        let [s, ns] = [time.tv_sec(), time.tv_nsec()].map(|part| u64::try_from(part).unwrap_or(0));
        s * NS_PER_S + ns
    })
}

fn signed(ns: u64) -> i64 {
    i64::try_from(ns).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_back_are_counted_against_every_vcpu() {
        let (shared, one, other) = (Shared::default(), Seen::default(), Seen::default());
        assert_eq!(one.look(&shared, || 100), 100);
        other.look(&shared, || 90);
        other.look(&shared, || 95);
        one.look(&shared, || 400);
        assert_eq!(one.steps(), ClockSteps { back: 0, back_ns_max: 0, forward_ns_max: 300 });
        assert_eq!(other.steps(), ClockSteps { back: 1, back_ns_max: 10, forward_ns_max: 5 });
    }
}

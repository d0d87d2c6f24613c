//! `mcd-lab-guest`: the lab's own eyes inside the Linux guest. It watches the clocks, measures the
//! disk, and (in the hosts) sets the clock.

mod clocks;
mod disk;
#[path = "../../guest_report.rs"]
mod guest_report;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

/// What the lab wants to know of its guest.
#[derive(Debug, Parser)]
#[command(name = "mcd-lab-guest", version)]
enum Command {
    /// Read the clocks on every vCPU and tell what they did to whoever asks
    Clocks {
        /// Never rest: a load on every vCPU
        #[arg(long)]
        busy: bool,
    },
    /// Measure the disk that this directory is on
    Disk {
        /// The directory
        directory: PathBuf,
        /// The size of the file that is written, in MiB
        #[arg(default_value_t = 16)]
        mib: u32,
        /// How many small operations of each kind
        #[arg(default_value_t = 200)]
        operations: u32,
    },
    /// Set the wall clock by the time server there
    SetClock {
        /// Where
        server: SocketAddr,
    },
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Clocks { busy } => clocks::serve(busy),
        Command::Disk { directory, mib, operations } => disk::measure(&directory, mib, operations),
        Command::SetClock { server } => set_clock(server),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mcd-lab-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Asks several times, because the quickest answer is the most exact one, and says how exact it
/// was.
fn set_clock(server: SocketAddr) -> io::Result<()> {
    const QUESTIONS: u32 = 10;
    let mut stream = TcpStream::connect(server)?;
    stream.set_nodelay(true)?;
    let mut best: Option<(Duration, Instant, i64)> = None;
    for _ in 0..QUESTIONS {
        let asked = Instant::now();
        stream.write_all(b"?")?;
        let mut answer = [0; 8];
        stream.read_exact(&mut answer)?;
        let took = asked.elapsed();
        if best.is_none_or(|(quickest, ..)| took < quickest) {
            best = Some((took, asked + took / 2, i64::from_le_bytes(answer)));
        }
    }
    let (took, heard_at, server_ns) = best.ok_or(io::ErrorKind::UnexpectedEof)?;
    let now = Duration::from_nanos(u64::try_from(server_ns).unwrap_or(0)) + heard_at.elapsed();
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(now))?;
    println!("set to within {} us", took.as_micros() / 2);
    Ok(())
}

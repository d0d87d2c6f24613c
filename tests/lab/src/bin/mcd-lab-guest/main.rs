//! `mcd-lab-guest`: the lab's own eyes inside the Linux guest. It watches the clocks, measures the disk, and (in the hosts) sets the clock.

mod clocks;
mod disk;
#[path = "../../told.rs"]
mod told;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

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
    /// Set the wall clock to so many ns since 1970
    SetClock {
        /// The time
        realtime_ns: i64,
    },
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Clocks { busy } => clocks::serve(busy),
        Command::Disk { directory, mib, operations } => disk::measure(&directory, mib, operations),
        Command::SetClock { realtime_ns } => set_clock(realtime_ns),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mcd-lab-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

fn set_clock(realtime_ns: i64) -> io::Result<()> {
    const NS_PER_S: i64 = 1_000_000_000;
    let time = TimeSpec::new(realtime_ns / NS_PER_S, realtime_ns % NS_PER_S);
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time)?)
}

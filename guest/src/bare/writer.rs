//! The memory writer on the vCPUs: on vCPU 1 if there is one, else between the server's rounds.

use mcd_guest::dirty::{Board, Writer};

use super::clock;
use super::ports::{WAIT_FOREVER, wait};

/// Where the server asks and the writer looks.
pub static BOARD: Board = Board::new();

/// How often an idle writer looks at the board.
const IDLE_LOOK_US: u32 = 10_000;

/// What every vCPU but the first does. vCPU 1 writes; the others have nothing to do.
pub fn run(cpu: u32) -> ! {
    let mut writer = Writer::new();
    loop {
        if cpu > 1 {
            wait(WAIT_FOREVER);
            continue;
        }
        match writer.step(&BOARD, clock::now_us(cpu)) {
            Some(0) => {}
            Some(wait_us) => wait(u32::try_from(wait_us).unwrap_or(IDLE_LOOK_US).min(IDLE_LOOK_US)),
            None => wait(IDLE_LOOK_US),
        }
    }
}

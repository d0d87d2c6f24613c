//! The newest output of the guest, for whoever wants to read it: bounded, and the guest never waits
//! for a reader.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

/// Most bytes that are kept: a boot's messages twice over.
const KEPT_BYTES_MAX: usize = 128 << 10;
/// Most bytes handed to a reader at once.
const CHUNK_BYTES_MAX: usize = 16 << 10;

/// The newest bytes of the console. Each reader has a place of its own; one that is too slow loses
/// the oldest and learns how many.
#[derive(Default)]
pub(super) struct Ring {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    /// How many bytes were ever written: the place behind the newest.
    end: u64,
    closed: bool,
}

/// What a reader gets.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum News {
    /// The next bytes; `lost` of those before them are gone.
    Bytes {
        /// How many bytes this reader was too slow for.
        lost: u64,
    },
    /// The console is closed, and everything that was kept has been read.
    Closed,
}

impl Ring {
    /// Appends output of the guest. Takes a lock that is never held for long, and waits for nobody.
    pub(super) fn push(&self, output: &[u8]) {
        let mut state = self.state.lock();
        state.bytes.extend(output);
        state.end += output.len() as u64;
        let surplus = state.bytes.len().saturating_sub(KEPT_BYTES_MAX);
        state.bytes.drain(..surplus);
        drop(state);
        self.changed.notify_all();
    }

    /// There is no more output: readers end once they have read everything.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waits for bytes behind place `at`, puts them into `into` and moves the place.
    pub(super) fn read(&self, at: &mut u64, into: &mut Vec<u8>) -> News {
        into.clear();
        let mut state = self.state.lock();
        while state.end <= *at {
            if state.closed {
                return News::Closed;
            }
            self.changed.wait(&mut state);
        }
        let oldest = state.end - state.bytes.len() as u64;
        let lost = oldest.saturating_sub(*at);
        let skip = usize::try_from((*at).saturating_sub(oldest)).unwrap_or(usize::MAX);
        into.extend(state.bytes.iter().skip(skip).take(CHUNK_BYTES_MAX));
        *at = at.saturating_add(lost).saturating_add(into.len() as u64);
        News::Bytes { lost }
    }
}

/// The machine's end: what is written to it is the guest's output.
pub(super) struct RingWriter(pub(super) Arc<Ring>);

impl Write for RingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands the output from place `at` on to `out`, until the console is closed or `out` fails.
pub(super) fn copy(ring: &Ring, mut at: u64, mut out: impl Write) -> io::Result<()> {
    let mut chunk = Vec::new();
    while let News::Bytes { lost } = ring.read(&mut at, &mut chunk) {
        if lost > 0 {
            write!(out, "\r\n[mcd: {lost} bytes of the console are lost: nobody read them in time]\r\n")?;
        }
        out.write_all(&chunk)?;
        out.flush()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_gets_everything_in_order_and_then_the_end() {
        let ring = Arc::new(Ring::default());
        let reader = std::thread::spawn({
            let ring = Arc::clone(&ring);
            move || {
                let mut all = Vec::new();
                copy(&ring, 0, &mut all).map(|()| all)
            }
        });
        let mut writer = RingWriter(Arc::clone(&ring));
        let said: Vec<u8> = (0..50_000u32).map(|n| n as u8).collect();
        said.chunks(7).for_each(|piece| writer.write_all(piece).expect("never fails"));
        ring.close();
        assert!(reader.join().expect("thread").expect("a vector") == said);
    }

    #[test]
    fn a_slow_reader_loses_the_oldest_and_is_told() {
        let ring = Ring::default();
        for _ in 0..3 {
            ring.push(&vec![b'a'; KEPT_BYTES_MAX / 2]);
        }
        ring.push(b"end");
        let (mut at, mut chunk, mut read) = (0, Vec::new(), 0);
        assert_eq!(ring.read(&mut at, &mut chunk), News::Bytes { lost: KEPT_BYTES_MAX as u64 / 2 + 3 });
        ring.close();
        read += chunk.len();
        while ring.read(&mut at, &mut chunk) == (News::Bytes { lost: 0 }) {
            read += chunk.len();
        }
        assert_eq!((read, at), (KEPT_BYTES_MAX, ring.state.lock().end));
        assert_eq!(ring.read(&mut at, &mut chunk), News::Closed);
    }
}

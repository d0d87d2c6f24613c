//! A bounded queue of log lines and the thread that writes them.
//!
//! Stderr is a pipe to a service manager or a terminal, and a write to it waits for its reader. A
//! node whose driver waited there would miss its heartbeats. So a line that finds the queue full is
//! dropped and counted, and the count is logged once there is room.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait.
const LINES_MAX: usize = 8192;
/// Bytes that these may have. As much again may be in the writer's hands.
const BYTES_MAX: usize = 1 << 20;

thread_local! {
    /// True in the thread that writes: its own report finds room always, or its count would be
    /// lost.
    static IS_WRITER: Cell<bool> = const { Cell::new(false) };
}

#[derive(Default)]
struct State {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Lines dropped since the last report.
    dropped: u64,
    /// The writer has lines in its hands.
    writing: bool,
}

impl State {
    fn is_idle(&self) -> bool {
        self.lines.is_empty() && !self.writing && self.dropped == 0
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is something to write.
    filled: Condvar,
    /// All is written.
    idle: Condvar,
}

/// A handle to the queue, which lives as long as the process.
#[derive(Clone, Default)]
pub(super) struct LogQueue {
    shared: Arc<Shared>,
}

impl LogQueue {
    /// Starts the thread that writes lines to `sink`; it calls `report_dropped` with the number of
    /// lines that were dropped, whenever some were.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(super) fn start_writer(
        &self,
        sink: impl Write + Send + 'static,
        report_dropped: impl Fn(u64) + Send + 'static,
    ) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new().name("mcd-log".into()).spawn(move || {
            IS_WRITER.set(true);
            shared.write_all(sink, report_dropped);
        })?;
        Ok(())
    }

    /// Adds a line, or counts it as dropped. Waits for nothing.
    fn push(&self, line: &[u8]) {
        let mut state = self.shared.state.lock();
        let is_full = state.lines.len() >= LINES_MAX || state.bytes.saturating_add(line.len()) > BYTES_MAX;
        if is_full && !IS_WRITER.get() {
            state.dropped = state.dropped.saturating_add(1);
            return;
        }
        state.bytes = state.bytes.saturating_add(line.len());
        state.lines.push_back(line.to_vec());
        self.shared.filled.notify_one();
    }

    /// Waits until all is written, but not longer than `timeout`.
    pub(super) fn flush(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.state.lock();
        while !state.is_idle() {
            if self.shared.idle.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }
}

impl Shared {
    fn write_all(&self, mut sink: impl Write, report_dropped: impl Fn(u64)) {
        loop {
            let mut state = self.state.lock();
            while state.lines.is_empty() && state.dropped == 0 {
                state.writing = false;
                self.idle.notify_all();
                self.filled.wait(&mut state);
            }
            state.writing = true;
            state.bytes = 0;
            let (lines, dropped) = (mem::take(&mut state.lines), mem::take(&mut state.dropped));
            drop(state);
            for line in lines {
                // Nobody is left to hear of a log that cannot be written.
                let _ = sink.write_all(&line);
            }
            if dropped > 0 {
                report_dropped(dropped);
            }
        }
    }
}

impl<'a> MakeWriter<'a> for LogQueue {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { queue: self }
    }
}

/// Where the subscriber writes one event, which it does in one call.
pub(super) struct Line<'a> {
    queue: &'a LogQueue,
}

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crossbeam::channel::{Receiver, Sender, bounded, unbounded};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// A sink whose every write waits for leave, as a pipe that nobody reads does.
    struct Stalled {
        leave: Receiver<()>,
        written: Sender<String>,
    }

    impl Write for Stalled {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            // Leave for all once the test has let go.
            let _ = self.leave.recv();
            let _ = self.written.send(String::from_utf8_lossy(line).into_owned());
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn stalled() -> (LogQueue, Sender<()>, Receiver<String>) {
        let queue = LogQueue::default();
        let ((let_go, leave), (written, lines)) = (bounded(0), unbounded());
        let reports = queue.clone();
        let report = move |dropped| reports.push(format!("{dropped} dropped").as_bytes());
        queue.start_writer(Stalled { leave, written }, report).unwrap();
        (queue, let_go, lines)
    }

    #[test]
    fn a_stalled_reader_holds_up_nobody_and_is_told_of_what_it_missed() {
        let (queue, let_go, lines) = stalled();
        queue.push(b"first");
        // The writer has the first line in its hands when this comes back.
        let_go.send(()).unwrap();
        assert_eq!(lines.recv().unwrap(), "first");
        // It would hang here if a push waited. The writer takes at most one batch meanwhile.
        for _ in 0..3 * LINES_MAX {
            queue.push(b"x");
        }
        drop(let_go);
        queue.flush(LONG);
        let (written, reports): (Vec<_>, Vec<_>) = lines.try_iter().partition(|line| line == "x");
        assert!((LINES_MAX..=2 * LINES_MAX).contains(&written.len()), "{} lines", written.len());
        let dropped: u64 =
            reports.iter().map(|line| line.strip_suffix(" dropped").unwrap().parse::<u64>().unwrap()).sum();
        assert_eq!(written.len() as u64 + dropped, 3 * LINES_MAX as u64, "each line is written or counted");
    }

    #[test]
    fn bytes_are_bounded_too() {
        let (queue, let_go, lines) = stalled();
        let line = vec![b'y'; BYTES_MAX / 4];
        for _ in 0..20 {
            queue.push(&line);
        }
        assert!(queue.shared.state.lock().bytes <= BYTES_MAX);
        drop(let_go);
        queue.flush(LONG);
        let written = lines.try_iter().filter(|line| line.starts_with('y')).count();
        assert!((4..=8).contains(&written), "{written} lines");
    }

    #[test]
    fn a_flush_waits_for_the_last_line_but_not_for_ever() {
        let (queue, let_go, lines) = stalled();
        queue.push(b"last");
        queue.flush(Duration::from_millis(1));
        assert!(lines.is_empty(), "its reader is stalled");
        drop(let_go);
        queue.flush(LONG);
        assert_eq!(lines.try_recv().unwrap(), "last");
    }
}

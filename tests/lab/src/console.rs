//! What a host says on its console: kept in a file, and looked through line by line.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;

/// Longest line that is kept whole, in bytes; of a longer one the parts are lines.
const LINE_BYTES_MAX: usize = 4096;

/// A console that is being listened to. Dropping it waits until the other side has closed.
#[derive(Debug)]
pub struct Console {
    lines: Arc<Mutex<Vec<String>>>,
    listener: Option<JoinHandle<()>>,
}

impl Console {
    /// Listens to `stream` and writes everything to the file `log`.
    pub fn listen(stream: UnixStream, log: &Path) -> io::Result<Console> {
        let log = File::create(log)?;
        let lines = Arc::default();
        let theirs = Arc::clone(&lines);
        let listener = std::thread::Builder::new().name("console".to_owned());
        let listener = Some(listener.spawn(move || follow(stream, log, &theirs))?);
        Ok(Console { lines, listener })
    }

    /// How many lines there were so far: a place to look from.
    pub fn mark(&self) -> usize {
        self.lines.lock().len()
    }

    /// The first line after `mark` that `is_it`.
    pub fn find(&self, mark: usize, is_it: impl Fn(&str) -> bool) -> Option<String> {
        self.lines.lock().get(mark..).unwrap_or_default().iter().find(|line| is_it(line)).cloned()
    }

    /// The last lines, for an error.
    pub fn tail(&self) -> String {
        const LINES: usize = 25;
        let lines = self.lines.lock();
        let from = lines.len().saturating_sub(LINES);
        let last = lines.get(from..).unwrap_or_default();
        format!("\n--- the last lines of its console:\n{}", last.join("\n"))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(listener) = self.listener.take() {
            // A panic of it has been printed.
            let _ = listener.join();
        }
    }
}

fn follow(mut stream: UnixStream, mut log: File, lines: &Mutex<Vec<String>>) {
    let (mut buffer, mut line) = ([0; 4096], Vec::new());
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        // A full disk costs the record, not the run.
        let _ = log.write_all(bytes);
        let mut lines = lines.lock();
        for byte in bytes {
            match byte {
                b'\r' => {}
                b'\n' => lines.push(take_text(&mut line)),
                _ => line.push(*byte),
            }
            if line.len() >= LINE_BYTES_MAX {
                lines.push(take_text(&mut line));
            }
        }
    }
}

fn take_text(line: &mut Vec<u8>) -> String {
    String::from_utf8_lossy(&std::mem::take(line)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_after_the_mark_only() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let (mut host, ours) = UnixStream::pair().unwrap();
        let console = Console::listen(ours, &log).unwrap();
        host.write_all(b"one\r\ntwo\nthr").unwrap();
        while console.mark() < 2 {
            std::thread::yield_now();
        }
        assert_eq!(console.find(0, |line| line.starts_with("tw")).unwrap(), "two");
        assert_eq!(console.find(2, |_| true), None);
        host.write_all(b"ee\n").unwrap();
        drop(host);
        let lines = console.lines.clone();
        drop(console);
        assert_eq!(*lines.lock(), ["one", "two", "three"]);
        assert_eq!(std::fs::read(&log).unwrap(), b"one\r\ntwo\nthree\n");
    }
}

//! The command channel of a host: a serial line on which init runs one shell command after the
//! other.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Most bytes of output that are taken.
const OUTPUT_BYTES_MAX: u64 = 4 << 20;

/// What a command came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its exit status.
    pub code: i32,
    /// What it printed, stderr included.
    pub text: String,
}

/// Our end of the channel.
#[derive(Debug)]
pub struct Channel {
    stream: BufReader<UnixStream>,
    number: u64,
}

impl Channel {
    /// Takes the stream of the serial line.
    pub fn new(stream: UnixStream) -> Channel {
        Channel { stream: BufReader::new(stream), number: 0 }
    }

    /// Waits for init's greeting. What is sent before it is lost: nobody has opened the line yet.
    pub fn wait_ready(&mut self, limit: Duration) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        let mut line = String::new();
        while line.trim_end() != "lab: ready" {
            line.clear();
            if self.stream.by_ref().take(256).read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    /// Runs `command` in a shell and waits for its end, `limit` between two signs of life. A
    /// command that goes on in the background must send its output elsewhere.
    pub fn run(&mut self, command: &str, limit: Duration) -> io::Result<Output> {
        self.number += 1;
        self.stream.get_ref().set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        self.stream.get_ref().set_write_timeout(Some(limit.max(Duration::from_millis(1))))?;
        let line = format!("{} {}\n", self.number, command.replace('\n', " "));
        self.stream.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut header = String::new();
            if self.stream.by_ref().take(256).read_line(&mut header)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // Answers to commands that were given up are of no interest.
            let Some((number, code, length)) = parse(&header) else { continue };
            if length > OUTPUT_BYTES_MAX {
                return Err(io::Error::other(format!("{length} bytes of output are too many")));
            }
            let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
            self.stream.read_exact(&mut bytes)?;
            if number == self.number {
                return Ok(Output { code, text: String::from_utf8_lossy(&bytes).into_owned() });
            }
        }
    }
}

/// `lab: NUMBER STATUS LENGTH`.
fn parse(header: &str) -> Option<(u64, i32, u64)> {
    let mut words = header.trim_end().strip_prefix("lab: ")?.split_whitespace();
    let (number, code, length) = (words.next()?, words.next()?, words.next()?);
    Some((number.parse().ok()?, code.parse().ok()?, length.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    #[test]
    fn an_answer_to_an_older_command_is_not_taken_for_this_one() {
        let (mut host, ours) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(ours);
        host.write_all(b"noise\nlab: ready\n").unwrap();
        channel.wait_ready(LIMIT).unwrap();
        channel.run("sleep 9", Duration::from_millis(1)).unwrap_err();
        host.write_all(b"lab: 1 0 2\nnolab: 2 5 4\nlab:").unwrap();
        assert_eq!(channel.run("x\ny", LIMIT).unwrap(), Output { code: 5, text: "lab:".to_owned() });
        assert_sent(&mut host, "1 sleep 9\n2 x y\n");
        // Dropping `host` would not do: a child that another test is starting has a copy of its
        // descriptor until it execs. Then the command would still be sent, and lost unread at the
        // exec, which is ConnectionReset.
        host.shutdown(Shutdown::Both).unwrap();
        assert_eq!(channel.run("z", LIMIT).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    fn assert_sent(host: &mut UnixStream, expected: &str) {
        let mut sent = vec![0; expected.len()];
        host.read_exact(&mut sent).unwrap();
        assert_eq!(String::from_utf8(sent).unwrap(), expected);
    }

    #[test]
    fn too_much_output_is_refused_before_it_is_read() {
        let (mut host, ours) = UnixStream::pair().unwrap();
        host.write_all(b"lab: 1 0 99999999999\n").unwrap();
        assert!(Channel::new(ours).run("yes", LIMIT).unwrap_err().to_string().contains("too many"));
    }
}

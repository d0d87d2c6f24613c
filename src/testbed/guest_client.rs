//! A client of the built-in guest for tests that compare answers themselves: one connection, and
//! commands as lines.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::client::connect;
use super::namespaces::{GUEST_IPV4, Namespace};
use super::wait::WAIT_MAX;

/// The guest's port.
pub const GUEST_PORT: u16 = 6379;
/// Longest line of an answer that is taken, in bytes.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// Connects to the guest from the clients' `network`.
///
/// # Errors
/// If the network cannot be entered or the guest does not accept the connection.
pub fn connect_to_guest(network: &Namespace, timeout: Duration) -> io::Result<TcpStream> {
    let address = SocketAddr::from((GUEST_IPV4, GUEST_PORT));
    network.run(|| connect(address, timeout)).map_err(io::Error::other)?
}

/// A client with one connection.
pub struct GuestClient {
    to: TcpStream,
    from: BufReader<TcpStream>,
}

impl GuestClient {
    /// Connects from the clients' `network`.
    ///
    /// # Errors
    /// As [`connect_to_guest`].
    pub fn connect(network: &Namespace) -> io::Result<GuestClient> {
        GuestClient::over(connect_to_guest(network, WAIT_MAX)?, WAIT_MAX)
    }

    /// Uses a connection that there is. No answer for longer than `timeout` is an error.
    ///
    /// # Errors
    /// If the system refuses the timeout or a second descriptor.
    pub fn over(to: TcpStream, timeout: Duration) -> io::Result<GuestClient> {
        to.set_read_timeout(Some(timeout))?;
        let from = BufReader::new(to.try_clone()?);
        Ok(GuestClient { to, from })
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)
    }

    /// Sends a command and does not wait for its answer.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn send(&mut self, command: &str) -> io::Result<()> {
        self.send_bytes(format!("{command}\r\n").as_bytes())
    }

    /// Fills `bytes` with what the guest sends next.
    ///
    /// # Errors
    /// If it sends less before the timeout or the end of the connection.
    pub fn read_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.from.read_exact(bytes)
    }

    /// The next line that the guest sends, without its end.
    ///
    /// # Errors
    /// If none comes before the timeout or the end of the connection.
    pub fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.from.by_ref().take(LINE_BYTES_MAX).read_line(&mut line)?;
        match line.strip_suffix("\r\n") {
            Some(text) => Ok(text.to_owned()),
            None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("no whole line: {line:?}"))),
        }
    }

    /// Sends a command and waits for the first line of its answer.
    ///
    /// # Errors
    /// As [`GuestClient::send`] and [`GuestClient::line`].
    pub fn ask(&mut self, command: &str) -> io::Result<String> {
        self.send(command)?;
        self.line()
    }

    /// The value of a key; `None` if there is no such key.
    ///
    /// # Errors
    /// As [`GuestClient::ask`], or if the answer is no string.
    pub fn get(&mut self, key: &str) -> io::Result<Option<String>> {
        let length = self.ask(&format!("GET {key}"))?;
        match length.as_str() {
            "$-1" => Ok(None),
            _ if length.starts_with('$') => self.line().map(Some),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("no string: {length}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn an_answer_is_a_whole_line_or_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut guest, _) = listener.accept().unwrap();
        let mut client = GuestClient::over(client, WAIT_MAX).unwrap();
        guest.write_all(b"+OK\r\n$5\r\n").unwrap();
        assert_eq!(client.ask("SET a b").unwrap(), "+OK");
        assert_eq!(client.line().unwrap(), "$5");
        guest.write_all(b"+HAL").unwrap();
        guest.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(client.line().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let mut sent = [0; 9];
        guest.read_exact(&mut sent).unwrap();
        assert_eq!(&sent, b"SET a b\r\n");
    }
}

//! The connection between two nodes: blocking TCP, split into a reader and a writer that live in
//! threads of their own, and a closer that ends both from anywhere.

use super::frame::{FrameReader, FrameWriter};
use crate::protocol::stall_detector::TcpInfo;
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long sent bytes may stay unacknowledged before the kernel gives the connection up.
/// Heartbeats and a [`LinkWatch`](super::LinkWatch) notice a silent peer much earlier; this frees
/// what is left waiting.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(10);

/// Sockets get descriptor numbers from here up: above those of a machine and its vCPUs, below the
/// usual limit of 1,024.
const DESCRIPTOR_MIN: i32 = 512;

/// Connections the kernel keeps until they are accepted. Beyond it a connect is dropped and tried
/// again by its kernel only a second later; a crowd must not do that to the peer.
const BACKLOG: i32 = 128;

/// Why a connection could not be had.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The address means nothing.
    #[error("cannot resolve {to}: {source}; give an address as HOST:PORT")]
    Resolve {
        /// What was asked for.
        to: String,
        /// Why not.
        source: io::Error,
    },
    /// Nobody answered there.
    #[error("cannot connect to {to}: {source}; check that the primary runs there and the port is open")]
    Connect {
        /// What was asked for.
        to: String,
        /// Why not.
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {at}: {source}; choose another address or port")]
    Listen {
        /// What was asked for.
        at: String,
        /// Why not.
        source: io::Error,
    },
    /// A connection came and could not be taken.
    #[error("cannot accept a connection: {0}")]
    Accept(#[source] io::Error),
    /// The listener was closed on purpose.
    #[error("the listener is closed")]
    ListenerClosed,
}

/// One half of a link as a byte stream. Both halves share the socket, which closes when the last of
/// them and of the closers is gone.
#[derive(Debug, Clone)]
pub struct Half {
    stream: Arc<TcpStream>,
    /// Past it a read fails with a timeout.
    deadline: Option<Instant>,
}

impl Read for Half {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        (&*self.stream).read(buf)
    }
}

impl Write for Half {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        (&*self.stream).write(buf)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self.stream).write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsRawFd for Half {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

/// The reading half of a link.
pub type LinkReader = FrameReader<Half>;

/// The writing half of a link.
pub type LinkWriter = FrameWriter<Half>;

impl LinkReader {
    /// Reads fail with a timeout ([`is_timeout`](super::WireError::is_timeout)) once it is past
    /// `deadline`, however the peer spaces its bytes; `None` waits for ever again.
    pub fn set_read_deadline(&mut self, deadline: Option<Instant>) {
        let half = self.source_mut();
        half.deadline = deadline;
        if deadline.is_none() {
            // The only time it is refused is zero.
            let _ = half.stream.set_read_timeout(None);
        }
    }
}

/// Asks for the bytes of a TCP socket that were not sent yet (linux/sockios.h).
const SIOCOUTQNSD: libc::Ioctl = 0x894B;

/// Ends a link from any thread: a blocked reader or writer wakes at once with an error.
#[derive(Debug, Clone)]
pub struct LinkCloser {
    stream: Arc<TcpStream>,
}

impl LinkCloser {
    /// Ends the link both ways. What was written before still goes out. Ending it again does
    /// nothing.
    pub fn shutdown(&self) {
        // The only failure is a socket that is not connected any more.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// True if something that was written has not been sent: the peer's window is closed, or the
    /// link is slow.
    pub fn has_unsent(&self) -> bool {
        let mut bytes: libc::c_int = 0;
        // SAFETY: the kernel writes one int, which outlives the call.
        let result = unsafe { libc::ioctl(self.stream.as_raw_fd(), SIOCOUTQNSD, &raw mut bytes) };
        result != 0 || bytes > 0
    }

    /// What the kernel knows of the connection; `None` if it does not tell.
    pub(super) fn tcp_info(&self) -> Option<TcpInfo> {
        let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
        let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
        let fd = self.stream.as_raw_fd();
        // SAFETY: the kernel writes at most `length` bytes, the size of `info`; both outlive the
        // call.
        let result = unsafe {
            libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut length)
        };
        if result != 0 {
            return None;
        }
        // SAFETY: plain numbers, for which zeros (what the kernel did not write) and all else are
        // valid.
        let info = unsafe { info.assume_init() };
        let ago = |ms: u32| Duration::from_millis(u64::from(ms));
        Some(TcpInfo {
            on_their_way: info.tcpi_unacked > 0,
            // Bytes are a word from the peer too, and the kernel does not count every one as an
            // acknowledgement.
            heard_ago: ago(info.tcpi_last_ack_recv.min(info.tcpi_last_data_recv)),
            received_ago: ago(info.tcpi_last_data_recv),
        })
    }
}

/// A connection to another node.
#[derive(Debug)]
pub struct Link {
    stream: Arc<TcpStream>,
    peer: SocketAddr,
}

impl Link {
    /// Connects to `to` (HOST:PORT), trying each of its addresses, for at most `time` altogether.
    ///
    /// # Errors
    /// [`LinkError::Resolve`] and [`LinkError::Connect`].
    pub fn connect(to: &str, time: Duration) -> Result<Link, LinkError> {
        let deadline = Instant::now() + time;
        let resolved = to.to_socket_addrs().map_err(|source| LinkError::Resolve { to: to.to_owned(), source })?;
        let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in resolved {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                failure = io::ErrorKind::TimedOut.into();
                break;
            }
            match connect_once(address, left).and_then(Link::over) {
                Ok(link) => return Ok(link),
                Err(source) => failure = source,
            }
        }
        Err(LinkError::Connect { to: to.to_owned(), source: failure })
    }

    fn over(socket: Socket) -> io::Result<Link> {
        tune(&socket)?;
        let socket = renumber(socket)?;
        let stream = TcpStream::from(socket);
        let peer = stream.peer_addr()?;
        Ok(Link { stream: Arc::new(stream), peer })
    }

    /// The other end's address.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Something that ends the link from any thread.
    pub fn closer(&self) -> LinkCloser {
        LinkCloser { stream: Arc::clone(&self.stream) }
    }

    /// The two halves.
    pub fn split(self) -> (LinkReader, LinkWriter) {
        let half = Half { stream: self.stream, deadline: None };
        (FrameReader::new(half.clone()), FrameWriter::new(half))
    }
}

fn connect_once(address: SocketAddr, time: Duration) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.connect_timeout(&address.into(), time)?;
    Ok(socket)
}

/// Gives the socket a high descriptor number. When a process is killed, the kernel closes its files
/// from the highest number down, and closing a virtual machine's takes it some 20 ms: with a higher
/// number than any of those, the peer hears of our death before that.
fn renumber(socket: Socket) -> io::Result<Socket> {
    match nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(DESCRIPTOR_MIN)) {
        // SAFETY: the descriptor was made by this very call and belongs to nobody else.
        Ok(descriptor) => Ok(Socket::from(unsafe { OwnedFd::from_raw_fd(descriptor) })),
        // Where the limit on descriptors is that low, the old number serves too.
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::EMFILE) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// Sets what an epoch and its ack need: no waiting for more bytes, and a congestion control that is
/// fast inside a data centre.
fn tune(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(UNACKNOWLEDGED_MAX))?;
    // Best effort: a host may not offer or allow it, and then its default serves.
    if let Err(error) = socket.set_tcp_congestion(b"cubic") {
        tracing::debug!(%error, "congestion control stays the host's default");
    }
    Ok(())
}

/// Waits for nodes to connect.
#[derive(Debug)]
pub struct Listener {
    socket: Arc<TcpListener>,
    at: SocketAddr,
}

impl Listener {
    /// Listens at `at` (ADDRESS:PORT; port 0 takes any free one).
    ///
    /// # Errors
    /// [`LinkError::Resolve`] and [`LinkError::Listen`].
    pub fn bind(at: &str) -> Result<Listener, LinkError> {
        let resolved = at.to_socket_addrs().map_err(|source| LinkError::Resolve { to: at.to_owned(), source })?;
        let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in resolved {
            match listen_once(address) {
                Ok((socket, at)) => return Ok(Listener { socket: Arc::new(socket), at }),
                Err(source) => failure = source,
            }
        }
        Err(LinkError::Listen { at: at.to_owned(), source: failure })
    }

    /// The address listened on, with the port that was taken.
    pub fn local_address(&self) -> SocketAddr {
        self.at
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// [`LinkError::Accept`], after which it may be called again; [`LinkError::ListenerClosed`]
    /// once a closer was used.
    pub fn accept(&self) -> Result<Link, LinkError> {
        loop {
            match self.socket.accept() {
                Ok((stream, _)) => return Link::over(Socket::from(stream)).map_err(LinkError::Accept),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What accept(2) says once the socket was shut down.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Err(LinkError::ListenerClosed),
                Err(error) => return Err(LinkError::Accept(error)),
            }
        }
    }

    /// Something that wakes and ends the listener from any thread.
    pub fn closer(&self) -> ListenerCloser {
        ListenerCloser { socket: Arc::clone(&self.socket) }
    }
}

fn listen_once(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A node that restarts must get its port back while old connections linger.
    socket.set_reuse_address(true)?;
    match socket.bind(&address.into()) {
        // At boot a network may be configured late, and an address that is moved between hosts
        // comes when it comes: connections arrive from then on.
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
            match address {
                SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
                SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
            }
            socket.bind(&address.into())?;
            tracing::warn!(%address, "this host does not have the address to listen on yet; it is waited for");
        }
        bound => bound?,
    }
    socket.listen(BACKLOG)?;
    let listener = TcpListener::from(socket);
    let at = listener.local_addr()?;
    Ok((listener, at))
}

/// Ends a listener from any thread.
#[derive(Debug, Clone)]
pub struct ListenerCloser {
    socket: Arc<TcpListener>,
}

impl ListenerCloser {
    /// Ends the listener; a blocked accept wakes with [`LinkError::ListenerClosed`]. Ending it
    /// again does nothing.
    pub fn shutdown(&self) {
        // SAFETY: the descriptor is open for as long as `self.socket` lives; shutdown(2) takes no
        // pointer.
        unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_RDWR) };
    }
}

#[cfg(test)]
pub(in crate::wire) mod tests {
    use super::*;
    use crate::protocol::messages::Message;
    use crate::wire::{FrameKind, WireError};

    /// Both ends of a link on this host.
    pub(in crate::wire) fn pair() -> (Link, Link) {
        let listener = Listener::bind("127.0.0.1:0").unwrap();
        let there = listener.local_address().to_string();
        let near = Link::connect(&there, Duration::from_secs(10)).unwrap();
        (near, listener.accept().unwrap())
    }

    fn bye() -> Message {
        Message::Bye { reason: "test".into() }
    }

    #[test]
    fn frames_cross_and_a_close_between_them_is_clean() {
        let (near, far) = pair();
        let (_, mut writer) = near.split();
        let (mut reader, _) = far.split();
        let state = vec![7; FrameKind::State.bytes_max()];
        let sender = std::thread::spawn(move || {
            writer.write_message(&bye()).unwrap();
            writer.write(FrameKind::State, &state).unwrap();
            writer.write_message(&bye()).unwrap();
        });
        assert_eq!(reader.read().unwrap().message().unwrap(), bye());
        assert_eq!(reader.read().unwrap().payload.len(), FrameKind::State.bytes_max());
        assert_eq!(reader.read().unwrap().message().unwrap(), bye());
        sender.join().unwrap();
        assert!(matches!(reader.read(), Err(WireError::Closed)));
    }

    #[test]
    fn a_closer_wakes_a_blocked_reader_and_a_blocked_writer() {
        let (near, far) = pair();
        let closer = near.closer();
        let (mut reader, mut writer) = near.split();
        let reads = std::thread::spawn(move || reader.read().map(|_| ()).unwrap_err());
        let writes = std::thread::spawn(move || {
            let state = vec![7; FrameKind::State.bytes_max()];
            loop {
                if let Err(error) = writer.write(FrameKind::State, &state) {
                    break error;
                }
            }
        });
        closer.shutdown();
        closer.shutdown();
        assert!(reads.join().unwrap().is_disconnect());
        assert!(writes.join().unwrap().is_disconnect());
        drop(far);
    }

    #[test]
    fn a_read_that_times_out_goes_on_where_it_was() {
        let (near, far) = pair();
        let (mut reader, _) = near.split();
        reader.set_read_deadline(Some(Instant::now()));
        assert!(reader.read().unwrap_err().is_timeout());
        let mut batch = crate::wire::FrameBatch::new();
        batch.push_message(&bye()).unwrap();
        let (head, tail) = batch.as_bytes().split_at(23);
        (&*far.stream).write_all(head).unwrap();
        reader.set_read_deadline(Some(Instant::now() + Duration::from_millis(50)));
        assert!(reader.read().unwrap_err().is_timeout());
        (&*far.stream).write_all(tail).unwrap();
        reader.set_read_deadline(None);
        assert_eq!(reader.read().unwrap().message().unwrap(), bye());
    }

    #[test]
    fn a_listener_can_be_ended_from_outside() {
        let listener = Listener::bind("127.0.0.1:0").unwrap();
        let closer = listener.closer();
        let waits = std::thread::spawn(move || listener.accept().map(|_| ()).unwrap_err());
        closer.shutdown();
        assert!(matches!(waits.join().unwrap(), LinkError::ListenerClosed));
    }

    #[test]
    fn failures_name_the_address() {
        let listener = Listener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_address().to_string();
        let taken = Listener::bind(&at).unwrap_err();
        assert!(matches!(&taken, LinkError::Listen { .. }) && taken.to_string().contains(&at));
        drop(listener);
        let refused = Link::connect(&at, Duration::from_secs(5)).unwrap_err();
        assert!(matches!(&refused, LinkError::Connect { .. }) && refused.to_string().contains(&at));
        assert!(matches!(Listener::bind("nonsense"), Err(LinkError::Resolve { .. })));
    }
}

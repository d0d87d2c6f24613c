//! Sees every frame that leaves either host towards the clients: a packet socket in the clients'
//! network that tells by the bridge's port which host it came from. The kernel's filter lets only
//! frames with the guest's source address through, and only as they come in.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mcd::testbed::client::monotonic_us;
use mcd::testbed::namespaces::{HostName, Namespaces};
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, LinkAddr, MsgFlags, recvmsg};
use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;

use crate::traffic_checker::{TrafficChecker, TrafficReport};

/// Room for frames that wait for the traffic checker, in bytes: seconds of the load's traffic.
const ROOM_BYTES: libc::c_int = 64 << 20;
/// Longest frame.
const FRAME_BYTES_MAX: usize = 65_536;
/// From linux/if_packet.h.
const PACKET_STATISTICS: libc::c_int = 6;
/// How often the thread looks whether it is still wanted, in ms.
const LOOK_MS: u16 = 20;
/// How long the thread may take to catch up.
const CATCH_UP_MAX: Duration = Duration::from_secs(10);

/// A running capture. Dropping it ends it.
pub struct Capture {
    shared: Arc<Shared>,
    socket: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    traffic_checker: Mutex<TrafficChecker>,
    /// Every frame that came before this moment has been checked.
    checked_until_us: AtomicU64,
    over: AtomicBool,
}

impl Capture {
    /// Starts to watch for frames from `mac`.
    pub fn start(namespaces: &Namespaces, mac: [u8; 6]) -> io::Result<Capture> {
        let (socket, ports) = namespaces.lan.run(|| open(mac)).map_err(io::Error::other)??;
        let socket = Arc::new(socket);
        let shared = Arc::new(Shared {
            traffic_checker: Mutex::default(),
            checked_until_us: AtomicU64::new(0),
            over: AtomicBool::new(false),
        });
        let (watching, fd) = (shared.clone(), socket.clone());
        let thread =
            std::thread::Builder::new().name("traffic check".to_owned()).spawn(move || watching.watch(&fd, ports))?;
        Ok(Capture { shared, socket, thread: Some(thread) })
    }

    /// Begins a new account.
    pub fn mark(&self) -> io::Result<()> {
        self.catch_up()?;
        self.lost()?;
        self.shared.traffic_checker.lock().mark(monotonic_us());
        Ok(())
    }

    /// Forgets every connection.
    pub fn forget_flows(&self) -> io::Result<()> {
        self.catch_up()?;
        self.shared.traffic_checker.lock().forget_flows();
        Ok(())
    }

    /// What was seen since the mark. A frame that the kernel had no room for is an error: then
    /// nothing is proved.
    pub fn report(&self) -> io::Result<TrafficReport> {
        self.catch_up()?;
        let lost = self.lost()?;
        if lost > 0 {
            return Err(io::Error::other(format!("{lost} frames came faster than they could be checked")));
        }
        Ok(self.shared.traffic_checker.lock().report(monotonic_us()))
    }

    /// What was seen so far, without waiting for the newest frames.
    pub fn glance(&self) -> TrafficReport {
        self.shared.traffic_checker.lock().report(monotonic_us())
    }

    /// See [`TrafficChecker::totals`].
    pub fn totals(&self) -> (u64, u64) {
        self.shared.traffic_checker.lock().totals()
    }

    fn catch_up(&self) -> io::Result<()> {
        let (now_us, deadline) = (monotonic_us(), Instant::now() + CATCH_UP_MAX);
        while self.shared.checked_until_us.load(Relaxed) < now_us {
            if Instant::now() >= deadline {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the traffic checker does not keep up with the frames",
                ));
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Frames lost since the last call.
    fn lost(&self) -> io::Result<u32> {
        let mut statistics = Statistics::default();
        let mut length = size_of::<Statistics>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes, which is the size of `statistics`; both
        // outlive the call.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        if result == 0 { Ok(statistics.lost) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.shared.over.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic has been printed; there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

/// What the kernel tells of a packet socket; reading it sets both to zero.
#[repr(C)]
#[derive(Default)]
struct Statistics {
    taken: u32,
    lost: u32,
}

/// The ports of the clients' bridge, by interface number.
type Ports = [(usize, HostName); 2];

impl Shared {
    fn watch(&self, socket: &OwnedFd, ports: Ports) {
        let mut frame = vec![0; FRAME_BYTES_MAX];
        while !self.over.load(Relaxed) {
            // Taken before the look that finds nothing: all that came before it has been checked
            // then.
            let now_us = monotonic_us();
            match receive(socket, &mut frame, &ports) {
                Ok(Some((host, at_us, length))) => {
                    self.traffic_checker.lock().frame(host, at_us, frame.get(..length).unwrap_or_default());
                }
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.checked_until_us.store(now_us, Relaxed);
                    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                    // Whatever it says, the next look tells.
                    let _ = poll(&mut fds, PollTimeout::from(LOOK_MS));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Nothing is checked any more, and whoever waits for it is told by the time it
                    // takes.
                    eprintln!("mcd-harness: the capture failed: {error}");
                    return;
                }
            }
        }
    }
}

/// The next frame: whose, when, how long. `None` for one from elsewhere.
fn receive(socket: &OwnedFd, frame: &mut [u8], ports: &Ports) -> io::Result<Option<(HostName, u64, usize)>> {
    let mut control = nix::cmsg_space!(libc::timespec);
    let mut buffers = [IoSliceMut::new(frame)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut buffers, Some(&mut control), flags)?;
    let Some(address) = message.address else { return Ok(None) };
    let Some((_, host)) = ports.iter().find(|(index, _)| *index == address.ifindex()) else { return Ok(None) };
    let mut at_us = monotonic_us();
    for item in message.cmsgs()? {
        if let ControlMessageOwned::ScmTimestampns(stamp) = item {
            at_us = monotonic(stamp.tv_sec() as u64 * 1_000_000 + stamp.tv_nsec() as u64 / 1000);
        }
    }
    Ok(Some((*host, at_us, message.bytes)))
}

/// The kernel stamps frames with the time of day: the same moment on the monotonic clock.
fn monotonic(real_us: u64) -> u64 {
    let real_now = clock_gettime(ClockId::CLOCK_REALTIME);
    let real_now_us = real_now.map_or(real_us, |t| t.tv_sec() as u64 * 1_000_000 + t.tv_nsec() as u64 / 1000);
    monotonic_us().saturating_sub(real_now_us.saturating_sub(real_us))
}

fn open(mac: [u8; 6]) -> io::Result<(OwnedFd, Ports)> {
    let port = |name: &str| if_nametoindex(name);
    let (a, b) = (port("to-a")?, port("to-b")?);
    // No protocol yet: no frame is taken before the filter stands.
    // SAFETY: socket(2) takes no pointer.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made by the call above and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut filter = filter(mac, a, b);
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    set(&socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
    set(&socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &1i32)?;
    if set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &ROOM_BYTES).is_err() {
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, &ROOM_BYTES)?;
    }
    // SAFETY: an all-zero sockaddr_ll is a valid one.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: `address` is a whole sockaddr_ll of the length that is given, and outlives the call.
    let bound = unsafe { libc::bind(fd, (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32) };
    if bound != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((socket, [(a as usize, HostName::A), (b as usize, HostName::B)]))
}

fn set<T>(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes at `value`, which outlives the call.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const *value).cast(), size_of::<T>() as u32) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Incoming frames at one of two ports with this source address, in the kernel's filter language.
fn filter(mac: [u8; 6], port_a: u32, port_b: u32) -> Vec<libc::sock_filter> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_ABS) as u16;
    const WORD: u16 = LOAD | libc::BPF_W as u16;
    const HALF: u16 = LOAD | libc::BPF_H as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const PACKET_OUTGOING: u32 = 4;
    const KIND: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE) as u32;
    const PORT: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_IFINDEX) as u32;
    let [m0, m1, m2, m3, m4, m5] = mac;
    let step = |code, k, yes, no| libc::sock_filter { code, jt: yes, jf: no, k };
    vec![
        step(WORD, KIND, 0, 0),
        step(EQUAL, PACKET_OUTGOING, 8, 0),
        step(WORD, PORT, 0, 0),
        step(EQUAL, port_a, 1, 0),
        step(EQUAL, port_b, 0, 5),
        step(HALF, 6, 0, 0),
        step(EQUAL, u32::from_be_bytes([0, 0, m0, m1]), 0, 3),
        step(WORD, 8, 0, 0),
        step(EQUAL, u32::from_be_bytes([m2, m3, m4, m5]), 0, 1),
        step(RETURN, FRAME_BYTES_MAX as u32, 0, 0),
        step(RETURN, 0, 0, 0),
    ]
}

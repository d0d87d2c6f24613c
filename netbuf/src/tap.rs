//! The tap interface as a packet port.

use crate::port::PacketPort;
use nix::errno::Errno;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use thiserror::Error;
use tun_tap::{Iface, Mode};

/// Longest name of a network interface, in bytes (Linux's IFNAMSIZ without the closing zero).
const NAME_BYTES_MAX: usize = 15;

/// Why a tap could not be opened. Each message is one line that says what to do.
#[derive(Debug, Error)]
pub enum TapError {
    /// Another process has the tap open.
    #[error("tap {name} is occupied: another process has it open; end that process or name another tap")]
    Occupied {
        /// The tap.
        name: String,
    },
    /// The tap is another user's, or has no owner.
    #[error(
        "tap {name} is not this user's: run as its owner or as root, or make it anew for this user: \
            ip link del {name} && ip tuntap add dev {name} mode tap user $USER"
    )]
    NotOwned {
        /// The tap.
        name: String,
    },
    /// This process may not open the tun driver at all.
    #[error("no permission to open /dev/net/tun for tap {name}: run as root, or give this user the right (mode 0666)")]
    NotPermitted {
        /// The tap.
        name: String,
    },
    /// There is no such interface.
    #[error("there is no tap {name}: create it: ip tuntap add dev {name} mode tap && ip link set {name} up")]
    Missing {
        /// The tap.
        name: String,
    },
    /// It is there and takes no frames.
    #[error("tap {name} is down, so the guest would have no network: ip link set {name} up")]
    Down {
        /// The tap.
        name: String,
    },
    /// The interface exists and is not a tap with one queue.
    #[error(
        "{name} is not a tap with one queue: name another interface, or create one: ip tuntap add dev NAME mode tap"
    )]
    NotATap {
        /// The interface.
        name: String,
    },
    /// The host has no tun driver.
    #[error("cannot open tap {name}: /dev/net/tun is missing; load the driver: modprobe tun")]
    NoDriver {
        /// The tap.
        name: String,
    },
    /// Linux would not take the name.
    #[error("{name:?} cannot name a tap: use 1 to 15 letters, digits, '-', '_' or '.'")]
    BadName {
        /// The name.
        name: String,
    },
    /// Anything else the system says.
    #[error("cannot open tap {name}: {source}")]
    Io {
        /// The tap.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

/// A tap interface: Ethernet frames, no header in front of them, non-blocking.
#[derive(Debug)]
pub struct TunTapPort {
    iface: Iface,
}

impl TunTapPort {
    /// Opens the tap `name`, which exists.
    ///
    /// # Errors
    /// [`TapError::Missing`] if it does not exist, and the other kinds as they say.
    pub fn open(name: &str) -> Result<TunTapPort, TapError> {
        check_name(name)?;
        // Without this look the kernel would create the tap: down, outside of every bridge, and
        // gone with this process.
        match nix::net::if_::if_nametoindex(name) {
            Ok(_) => attach(name),
            Err(_) => Err(TapError::Missing { name: name.to_owned() }),
        }
    }

    /// Creates the tap `name`, or opens it if it exists. A tap made here is down, and is gone when
    /// the port is dropped.
    ///
    /// # Errors
    /// As [`TapError`] says.
    pub fn create(name: &str) -> Result<TunTapPort, TapError> {
        check_name(name)?;
        attach(name)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        self.iface.name()
    }
}

pub(crate) fn check_name(name: &str) -> Result<(), TapError> {
    let ok = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if ok { Ok(()) } else { Err(TapError::BadName { name: name.to_owned() }) }
}

fn attach(name: &str) -> Result<TunTapPort, TapError> {
    let iface = Iface::without_packet_info(name, Mode::Tap).map_err(|source| explain(name, source))?;
    set_nonblocking(&iface).map_err(|source| TapError::Io { name: name.to_owned(), source })?;
    Ok(TunTapPort { iface })
}

fn set_nonblocking(iface: &Iface) -> io::Result<()> {
    let fd = iface.as_raw_fd();
    let mut on: libc::c_int = 1;
    // SAFETY: the descriptor is open for as long as `iface` lives, and FIONBIO reads one int from a
    // pointer that is valid here.
    match unsafe { libc::ioctl(fd, libc::FIONBIO, &mut on) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Tells the failures of opening the device (ENOENT, ENODEV, ENXIO, EACCES) and of taking the
/// interface (EBUSY, EPERM, EINVAL) apart.
pub(crate) fn explain(name: &str, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EBUSY) => TapError::Occupied { name },
        Some(Errno::EPERM) => TapError::NotOwned { name },
        Some(Errno::EACCES) => TapError::NotPermitted { name },
        Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => TapError::NoDriver { name },
        Some(Errno::EINVAL) => TapError::NotATap { name },
        _ => TapError::Io { name, source },
    }
}

impl PacketPort for TunTapPort {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        let sent = self.iface.send(frame)?;
        if sent == frame.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.iface.recv(buf)
    }

    fn as_raw_fd(&self) -> RawFd {
        self.iface.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_linux_refuses_are_refused_first() {
        for bad in ["", "sixteen-letters-", "a b", "tap%d", "a/b", ".", "..", "tap\0"] {
            assert!(matches!(TunTapPort::create(bad), Err(TapError::BadName { .. })), "{bad:?}");
        }
    }

    #[test]
    fn every_failure_says_what_to_do() {
        let error = |errno: i32| explain("tap7", io::Error::from_raw_os_error(errno)).to_string();
        assert!(error(libc::EBUSY).contains("occupied"));
        // It is there, so the advice is not to create it.
        assert!(error(libc::EPERM).contains("not this user's") && error(libc::EPERM).contains("anew for this user"));
        assert!(error(libc::EACCES).contains("/dev/net/tun") && error(libc::EACCES).contains("root"));
        assert!(error(libc::ENOENT).contains("modprobe tun"));
        assert!(error(libc::EINVAL).contains("not a tap"));
        for errno in [libc::EBUSY, libc::EPERM, libc::ENOENT, libc::EINVAL, libc::EMFILE] {
            assert!(error(errno).contains("tap7") && !error(errno).contains('\n'));
        }
    }
}

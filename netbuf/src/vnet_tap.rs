//! The tap interface as a packet port that leaves checksums and segmentation to the kernel.
//!
//! The kernel puts a virtio-net header in front of each frame (`IFF_VNET_HDR`) and reads one from
//! each frame sent. So a guest's large segments go out as one frame, to be cut by the card or the
//! next tap, and frames between guests of one host need no checksum at all. Headers are always
//! there; what they may say is set by the driver's agreement.

use crate::link::link_state;
use crate::port::{PacketPort, VNET_HEADER_BYTES};
use crate::tap::{TapError, check_name, explain};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

mod ioctls {
    #![allow(missing_docs)] // the macros make undocumented functions of them
    use nix::libc::{c_int, ifreq};
    use nix::{ioctl_write_int_bad, ioctl_write_ptr_bad, request_code_write};

    // The kernel's numbers say "an int" for all three; the first takes an interface request all the
    // same, the second a number.
    ioctl_write_ptr_bad!(tun_set_interface, request_code_write!(b'T', 202, size_of::<c_int>()), ifreq);
    ioctl_write_int_bad!(tun_set_offload, request_code_write!(b'T', 208, size_of::<c_int>()));
    ioctl_write_ptr_bad!(tun_set_header_bytes, request_code_write!(b'T', 216, size_of::<c_int>()), c_int);
}

/// Frames received may lack their checksum (TUN_F_CSUM).
const RECEIVE_UNCHECKED: libc::c_int = 1;

/// A tap interface: Ethernet frames behind a virtio-net header, non-blocking.
#[derive(Debug)]
pub struct VnetTapPort {
    fd: OwnedFd,
    name: String,
    receives_unchecked: AtomicBool,
}

impl VnetTapPort {
    /// Opens the tap `name`, which exists.
    ///
    /// # Errors
    /// [`TapError::Missing`] if it does not exist, and the other kinds as they say.
    pub fn open(name: &str) -> Result<VnetTapPort, TapError> {
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
    pub fn create(name: &str) -> Result<VnetTapPort, TapError> {
        check_name(name)?;
        attach(name)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The interface was deleted: takes the one that has its name now, if there is one. The
    /// descriptor keeps its number, so whoever polls it need not know.
    fn reattach(&self) -> Result<(), TapError> {
        let new = VnetTapPort::open(&self.name)?;
        if self.receives_unchecked.load(Ordering::SeqCst) {
            new.receive_unchecked(true).map_err(|source| TapError::Io { name: self.name.clone(), source })?;
        }
        // SAFETY: both descriptors are open; the call closes what ours was and makes it another
        // name of the new one, in one step.
        let result = unsafe { libc::dup3(new.fd.as_raw_fd(), self.fd.as_raw_fd(), libc::O_CLOEXEC) };
        Errno::result(result).map(drop).map_err(|errno| explain(&self.name, errno.into()))
    }
}

/// Refuses a tap that is down: what is sent to it is lost.
///
/// # Errors
/// [`TapError::Down`], and [`TapError::Missing`] if there is none.
pub fn check_up(name: &str) -> Result<(), TapError> {
    match link_state(name) {
        Ok(Some(link)) if link.is_up => Ok(()),
        Ok(Some(_)) => Err(TapError::Down { name: name.to_owned() }),
        Ok(None) => Err(TapError::Missing { name: name.to_owned() }),
        Err(source) => Err(TapError::Io { name: name.to_owned(), source }),
    }
}

fn attach(name: &str) -> Result<VnetTapPort, TapError> {
    let explained = |errno: Errno| explain(name, errno.into());
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let fd = nix::fcntl::open("/dev/net/tun", flags, Mode::empty()).map_err(explained)?;
    // SAFETY: an interface request is plain numbers, for which all zeros are values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The name is shorter than its place (check_name), so a zero stays at its end.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open and the request is a whole ifreq that lives through the call.
    unsafe { ioctls::tun_set_interface(fd.as_raw_fd(), &request) }.map_err(explained)?;
    // SAFETY: as above; the pointer is to an int that lives through the call.
    unsafe { ioctls::tun_set_header_bytes(fd.as_raw_fd(), &(VNET_HEADER_BYTES as libc::c_int)) }.map_err(explained)?;
    // A tap that outlives its users remembers what the last one said.
    // SAFETY: the call takes a number.
    unsafe { ioctls::tun_set_offload(fd.as_raw_fd(), 0) }.map_err(explained)?;
    Ok(VnetTapPort { fd, name: name.to_owned(), receives_unchecked: AtomicBool::new(false) })
}

impl PacketPort for VnetTapPort {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        let sent = nix::unistd::write(&self.fd, frame)?;
        if sent == frame.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        match nix::unistd::read(&self.fd, buf) {
            // Whoever reads tries again after a while, so this does too.
            Err(Errno::EBADFD) if self.reattach().is_ok() => Err(io::ErrorKind::WouldBlock.into()),
            read => Ok(read?),
        }
    }

    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn has_headers(&self) -> bool {
        true
    }

    fn receive_unchecked(&self, allowed: bool) -> io::Result<()> {
        // The call takes a lock of the whole network stack, so it is made only when it changes
        // something.
        if self.receives_unchecked.load(Ordering::SeqCst) != allowed {
            // SAFETY: the descriptor is open, and the call takes a number.
            unsafe { ioctls::tun_set_offload(self.fd.as_raw_fd(), if allowed { RECEIVE_UNCHECKED } else { 0 }) }?;
            self.receives_unchecked.store(allowed, Ordering::SeqCst);
        }
        Ok(())
    }
}

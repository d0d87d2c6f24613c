//! What the kernel says about a network interface (rtnetlink), in the network namespace of the
//! calling thread.

use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};
use std::io;
use std::os::fd::AsRawFd;

/// Bytes of a message's header, and of what follows it in one about an interface.
const HEADER_BYTES: usize = 16;
const INTERFACE_BYTES: usize = 16;
/// More than the kernel says about one interface.
const ANSWER_BYTES_MAX: usize = 32 << 10;

/// How an interface is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkState {
    /// Its number: another one under the same name is another interface.
    pub index: u32,
    /// It was set up (`ip link set NAME up`).
    pub is_up: bool,
    /// It has a carrier: of a tap, a process has it open.
    pub has_carrier: bool,
    /// The number of the bridge, bond or the like that it is a port of.
    pub master: Option<u32>,
}

/// How the interface `name` is; `None` if there is none.
///
/// # Errors
/// What the system says.
pub fn link_state(name: &str) -> io::Result<Option<LinkState>> {
    let Ok(index) = nix::net::if_::if_nametoindex(name) else { return Ok(None) };
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    sendto(socket.as_raw_fd(), &question(index), &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = vec![0; ANSWER_BYTES_MAX];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    read_answer(answer.get(..length).unwrap_or_default())
}

/// A request for what there is to say about one interface (RTM_GETLINK).
fn question(index: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + INTERFACE_BYTES);
    bytes.extend(((HEADER_BYTES + INTERFACE_BYTES) as u32).to_ne_bytes());
    bytes.extend(libc::RTM_GETLINK.to_ne_bytes());
    bytes.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    // The sequence number and the sender, of which there is one each.
    bytes.extend([0; 8]);
    // Family and kind, which are any; the number; flags and their mask, which change nothing.
    bytes.extend([0; 4]);
    bytes.extend(index.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes
}

fn read_answer(answer: &[u8]) -> io::Result<Option<LinkState>> {
    let cut_off = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer was cut off");
    let (header, rest) = answer.split_at_checked(HEADER_BYTES).ok_or_else(cut_off)?;
    match u16_at(header, 4).ok_or_else(cut_off)? {
        libc::RTM_NEWLINK => {}
        kind if i32::from(kind) == libc::NLMSG_ERROR => {
            let errno = u32_at(rest, 0).ok_or_else(cut_off)?.cast_signed().wrapping_neg();
            // It went away between two calls.
            return if errno == libc::ENODEV { Ok(None) } else { Err(io::Error::from_raw_os_error(errno)) };
        }
        _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel answered something else")),
    }
    let (about, attributes) = rest.split_at_checked(INTERFACE_BYTES).ok_or_else(cut_off)?;
    let (index, flags) = (u32_at(about, 4).ok_or_else(cut_off)?, u32_at(about, 8).ok_or_else(cut_off)?);
    let is = |flag: libc::c_int| flags & flag.cast_unsigned() != 0;
    Ok(Some(LinkState {
        index,
        is_up: is(libc::IFF_UP),
        has_carrier: is(libc::IFF_LOWER_UP),
        master: attribute(attributes, libc::IFLA_MASTER),
    }))
}

/// The number in the attribute of this kind.
fn attribute(mut attributes: &[u8], kind: u16) -> Option<u32> {
    const ATTRIBUTE_HEADER_BYTES: usize = 4;
    loop {
        let (length, this) = (usize::from(u16_at(attributes, 0)?), u16_at(attributes, 2)?);
        if this == kind {
            return u32_at(attributes.get(..length)?, ATTRIBUTE_HEADER_BYTES);
        }
        // Each begins at a multiple of four bytes; one that is shorter than its header is no end.
        attributes = attributes.get(length.max(ATTRIBUTE_HEADER_BYTES).next_multiple_of(4)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_there_and_a_made_up_name_is_not() {
        let lo = link_state("lo").expect("an answer").expect("there is one");
        assert!(lo.index > 0 && lo.master.is_none());
        assert_eq!(link_state("no-such-link").expect("an answer"), None);
    }

    /// An answer about interface 7 with these flags and attributes.
    fn answer(flags: i32, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut bytes = question(7);
        bytes[4..6].copy_from_slice(&libc::RTM_NEWLINK.to_ne_bytes());
        bytes[HEADER_BYTES + 8..HEADER_BYTES + 12].copy_from_slice(&flags.to_ne_bytes());
        for (kind, value) in attributes {
            bytes.extend((4 + value.len() as u16).to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(*value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn answers_are_read_and_damaged_ones_refused() {
        let up = libc::IFF_UP | libc::IFF_LOWER_UP;
        let port = answer(up, &[(libc::IFLA_IFNAME, b"tap0\0"), (libc::IFLA_MASTER, &3u32.to_ne_bytes())]);
        let state = LinkState { index: 7, is_up: true, has_carrier: true, master: Some(3) };
        assert_eq!(read_answer(&port).expect("an answer"), Some(state));
        let down = LinkState { index: 7, is_up: false, has_carrier: false, master: None };
        assert_eq!(read_answer(&answer(0, &[(libc::IFLA_IFNAME, b"tap0\0")])).expect("an answer"), Some(down));
        let mut gone = answer(0, &[]);
        gone[4..6].copy_from_slice(&(libc::NLMSG_ERROR as u16).to_ne_bytes());
        gone[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&(-libc::ENODEV).to_ne_bytes());
        assert_eq!(read_answer(&gone).expect("an answer"), None);
        gone[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&(-libc::EPERM).to_ne_bytes());
        assert_eq!(read_answer(&gone).expect_err("an error").raw_os_error(), Some(libc::EPERM));
        for length in 0..HEADER_BYTES + INTERFACE_BYTES {
            assert!(read_answer(&port[..length]).is_err(), "{length}");
        }
        // An attribute without a length does not stop the reader.
        assert_eq!(attribute(&[0; 64], 9), None);
        assert!(read_answer(&question(7)).is_err());
    }
}

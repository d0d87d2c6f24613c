//! The little of Ethernet, IPv4 and TCP that a traffic checker must read. Nothing here believes a
//! length that it has not checked.

use std::net::Ipv4Addr;

/// TCP's flags, as far as they matter here.
pub mod flags {
    /// The sender has no more to say.
    pub const FIN: u8 = 0x01;
    /// The first segment of a direction.
    pub const SYN: u8 = 0x02;
    /// The connection is refused or broken.
    pub const RST: u8 = 0x04;
    /// The acknowledgement number means something.
    pub const ACK: u8 = 0x10;
}

/// A TCP segment inside an IPv4 packet inside a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Who sent it.
    pub source: (Ipv4Addr, u16),
    /// To whom.
    pub target: (Ipv4Addr, u16),
    /// Number of the first byte of `payload` (or of SYN or FIN).
    pub sequence: u32,
    /// The next byte the sender expects, if [`flags::ACK`] is set.
    pub acknowledged: u32,
    /// See [`flags`].
    pub flags: u8,
    /// The bytes it carries.
    pub payload: &'a [u8],
}

impl Segment<'_> {
    /// Whether all of these flags are set.
    pub fn has(&self, wanted: u8) -> bool {
        self.flags & wanted == wanted
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    /// A whole TCP segment.
    Tcp(Segment<'a>),
    /// Anything else, by EtherType.
    Other(u16),
}

/// Length of an Ethernet header.
const ETHERNET_BYTES: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const PROTOCOL_TCP: u8 = 6;

/// Reads a frame; `None` if it is not even one, or an IPv4 packet with TCP that does not hold what
/// it says.
pub fn parse(frame: &[u8]) -> Option<Packet<'_>> {
    let ethertype = number16(frame, 12)?;
    let packet = frame.get(ETHERNET_BYTES..)?;
    if ethertype != ETHERTYPE_IPV4 {
        return Some(Packet::Other(ethertype));
    }
    let (first, protocol) = (*packet.first()?, *packet.get(9)?);
    let header = usize::from(first & 15) * 4;
    let total = usize::from(number16(packet, 2)?);
    if first >> 4 != 4 || header < 20 || total < header {
        return None;
    }
    // Fragments carry no header after the first; the guest sends none, and one would show as
    // something else than TCP.
    if protocol != PROTOCOL_TCP || number16(packet, 6)? & 0x3fff != 0 {
        return Some(Packet::Other(ethertype));
    }
    // Short frames are padded: the packet's own length counts.
    let segment = packet.get(header..total)?;
    let offset = usize::from(*segment.get(12)? >> 4) * 4;
    if offset < 20 {
        return None;
    }
    Some(Packet::Tcp(Segment {
        source: (address(packet, 12)?, number16(segment, 0)?),
        target: (address(packet, 16)?, number16(segment, 2)?),
        sequence: number32(segment, 4)?,
        acknowledged: number32(segment, 8)?,
        flags: *segment.get(13)?,
        payload: segment.get(offset..)?,
    }))
}

fn number16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn number32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn address(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(number32(bytes, at)?))
}

/// Builds frames for tests, the way they are on the wire.
#[cfg(test)]
pub mod build {

    /// A frame with a TCP segment from 10.77.0.2:6379 to 10.77.0.1:`port`, padded to Ethernet's
    /// least length.
    pub fn tcp(port: u16, sequence: u32, acknowledged: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        let total = u16::try_from(40 + payload.len()).unwrap();
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 77, 0, 2, 10, 77, 0, 1]);
        frame.extend(6379u16.to_be_bytes());
        frame.extend(port.to_be_bytes());
        frame.extend(sequence.to_be_bytes());
        frame.extend(acknowledged.to_be_bytes());
        frame.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        frame.extend(payload);
        frame.resize(frame.len().max(60), 0);
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_read_without_its_padding() {
        let frame = build::tcp(40_000, 7, 9, flags::ACK, b"hi");
        let Some(Packet::Tcp(segment)) = parse(&frame) else { panic!("{:?}", parse(&frame)) };
        assert_eq!((segment.source.1, segment.target), (6379, (Ipv4Addr::new(10, 77, 0, 1), 40_000)));
        assert_eq!((segment.sequence, segment.acknowledged, segment.payload), (7, 9, &b"hi"[..]));
        assert!(segment.has(flags::ACK) && !segment.has(flags::SYN));
    }

    #[test]
    fn truncated_frames_and_false_lengths_are_rejected() {
        let frame = build::tcp(40_000, 7, 9, flags::ACK, &[5; 40]);
        for length in 0..frame.len() {
            let whole = matches!(parse(&frame[..length]), Some(Packet::Tcp(_)));
            assert!(!whole, "{length} bytes were taken for a whole segment");
        }
        for (at, value) in [(14, 0x41), (14, 0x65), (17, 255), (46, 0x00), (46, 0xf0)] {
            let mut lie = frame.clone();
            lie[at] = value;
            assert!(!matches!(parse(&lie), Some(Packet::Tcp(s)) if s.payload.len() > 40), "byte {at}");
        }
        assert_eq!(parse(&[&frame[..12], &[8, 6, 0, 0]].concat()), Some(Packet::Other(0x0806)));
    }
}

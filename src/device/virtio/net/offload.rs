//! The virtio-net header, and the work that it may leave to the other side.
//!
//! What the guest wrote goes to the host's network stack only as far as it was agreed on: a header
//! may ask for a checksum to be filled in and for TCP to be cut into segments, nothing else. Where
//! exactly is checked by whoever does it, against the frame.

use crate::device::net::{NET_HEADER_BYTES, Offloads};

/// The device fills in checksums.
const F_CSUM: u64 = 1 << 0;
/// The driver takes frames without a checksum.
const F_GUEST_CSUM: u64 = 1 << 1;
/// The device cuts TCP over IPv4.
const F_HOST_TSO4: u64 = 1 << 11;
/// The device cuts TCP over IPv6.
const F_HOST_TSO6: u64 = 1 << 12;

/// Flag of a header: the checksum is to be filled in.
const NEEDS_CSUM: u8 = 1;
/// Flag of a header: the checksum was found right.
const DATA_VALID: u8 = 2;
/// Kinds of large frames: none, TCP over IPv4, TCP over IPv6.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

/// Where the fields of a header are: flags, kind of large frame, header length, segment size,
/// checksum start and offset.
const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
const GSO_FIELDS: std::ops::Range<usize> = 2..6;
const NUM_BUFFERS: usize = 10;

/// The features a device offers whose backend can carry `offloads`.
pub(super) fn features(offloads: Offloads) -> u64 {
    let mut features = 0;
    if offloads.checksum {
        features |= F_CSUM;
        // Large frames need their checksums filled in.
        features |= if offloads.segmentation { F_HOST_TSO4 | F_HOST_TSO6 } else { 0 };
    }
    features | if offloads.guest_checksum { F_GUEST_CSUM } else { 0 }
}

/// What a driver with these features has agreed to. Segmentation is agreed on if either kind is;
/// the other is refused frame by frame.
pub(super) fn agreed(features: u64) -> Offloads {
    let checksum = features & F_CSUM != 0;
    Offloads {
        checksum,
        segmentation: checksum && features & (F_HOST_TSO4 | F_HOST_TSO6) != 0,
        guest_checksum: features & F_GUEST_CSUM != 0,
    }
}

/// Makes the header in front of a frame from the guest one that asks for nothing beyond what its
/// `features` allow; false if the frame is of no use without that.
pub(super) fn from_guest(header: &mut [u8; NET_HEADER_BYTES], features: u64) -> bool {
    let (needs_csum, gso) = (header[FLAGS] & NEEDS_CSUM != 0, header[GSO_TYPE]);
    let gso_agreed = match gso {
        GSO_NONE => true,
        GSO_TCPV4 => needs_csum && features & F_HOST_TSO4 != 0,
        GSO_TCPV6 => needs_csum && features & F_HOST_TSO6 != 0,
        _ => false,
    };
    if needs_csum && features & F_CSUM != 0 {
        header[FLAGS] = NEEDS_CSUM;
        header[NUM_BUFFERS..].fill(0);
    } else {
        header.fill(0);
    }
    if gso == GSO_NONE {
        header[GSO_FIELDS].fill(0);
    }
    gso_agreed && (!needs_csum || features & F_CSUM != 0)
}

/// Makes the header in front of a frame to the guest one that its `features` allow; false if the
/// guest cannot take the frame.
pub(super) fn to_guest(header: &mut [u8; NET_HEADER_BYTES], features: u64) -> bool {
    let lacks_csum = header[FLAGS] & NEEDS_CSUM != 0;
    let large = header[GSO_TYPE] != GSO_NONE;
    if features & F_GUEST_CSUM != 0 {
        header[FLAGS] &= NEEDS_CSUM | DATA_VALID;
        header[GSO_FIELDS].fill(0);
    } else {
        header.fill(0);
    }
    header[GSO_TYPE] = GSO_NONE;
    // The frame is in one chain.
    header[NUM_BUFFERS..].copy_from_slice(&[1, 0]);
    !large && (!lacks_csum || features & F_GUEST_CSUM != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Offloads = Offloads { checksum: true, segmentation: true, guest_checksum: true };

    /// A header with these flags and this kind, and every other field set.
    fn header(flags: u8, gso: u8) -> [u8; NET_HEADER_BYTES] {
        [flags, gso, 54, 0, 0xb4, 5, 34, 0, 16, 0, 7, 7]
    }

    #[test]
    fn features_and_agreements_belong_together() {
        assert_eq!(features(Offloads::NONE), 0);
        assert_eq!(features(ALL), 1 | 2 | 1 << 11 | 1 << 12);
        assert_eq!(agreed(features(ALL)), ALL);
        assert_eq!(features(Offloads { checksum: false, ..ALL }), 2, "no segments without checksums");
        assert_eq!(agreed(F_HOST_TSO4), Offloads::NONE);
    }

    #[test]
    fn a_guest_asks_for_no_more_than_it_agreed_to() {
        for gso in 0..=255 {
            for flags in 0..=255 {
                for features in [0, F_CSUM, F_CSUM | F_HOST_TSO4, F_CSUM | F_HOST_TSO6, features(ALL)] {
                    let mut bytes = header(flags, gso);
                    if from_guest(&mut bytes, features) {
                        let asks = bytes[FLAGS] == NEEDS_CSUM;
                        assert!(bytes[FLAGS] == 0 || asks && features & F_CSUM != 0);
                        assert!(bytes[GSO_TYPE] == 0 && bytes[2..6] == [0; 4] || asks && bytes[GSO_TYPE] == gso);
                        assert!(bytes[GSO_TYPE] != 1 || features & F_HOST_TSO4 != 0);
                        assert!(bytes[GSO_TYPE] != 4 || features & F_HOST_TSO6 != 0);
                        assert!([0, 1, 4].contains(&bytes[GSO_TYPE]));
                        assert!(asks || bytes == [0; NET_HEADER_BYTES]);
                        assert_eq!(bytes[10..], [0, 0]);
                    } else {
                        assert!(gso != 0 || flags & 1 != 0, "a plain frame always goes");
                    }
                }
            }
        }
        let mut bytes = header(1, 1);
        assert!(from_guest(&mut bytes, features(ALL)));
        assert_eq!(bytes, [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0], "where and how passes through");
    }

    #[test]
    fn a_guest_gets_no_more_than_it_agreed_to() {
        let mut bytes = header(1, 0);
        assert!(to_guest(&mut bytes, F_GUEST_CSUM));
        assert_eq!(bytes, [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 1, 0]);
        assert!(!to_guest(&mut header(1, 0), 0), "it would take the missing checksum for a wrong one");
        assert!(!to_guest(&mut header(1, 1), F_GUEST_CSUM), "too large");
        let mut bytes = header(2, 0);
        assert!(to_guest(&mut bytes, 0));
        assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    }
}

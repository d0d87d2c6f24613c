//! Telling the network where the guest is now: RARP for the switches, gratuitous ARP for hosts when the address is known.

use std::net::Ipv4Addr;

const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const FRAME_BYTES_MIN: usize = 60;

/// The frames that announce a guest, in the order to send them.
pub fn frames(mac: [u8; 6], ip: Option<Ipv4Addr>) -> Vec<Vec<u8>> {
    // RFC 903, request reverse (3): "who am I", as QEMU and others announce a moved guest.
    let mut frames = vec![arp(ETHERTYPE_RARP, 3, mac, Ipv4Addr::UNSPECIFIED, mac, Ipv4Addr::UNSPECIFIED)];
    if let Some(ip) = ip {
        // RFC 5227 §3: an ARP request whose sender and target address are the same.
        frames.push(arp(ETHERTYPE_ARP, 1, mac, ip, [0; 6], ip));
    }
    frames
}

fn arp(
    kind: u16,
    operation: u16,
    sender: [u8; 6],
    sender_ip: Ipv4Addr,
    target: [u8; 6],
    target_ip: Ipv4Addr,
) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_BYTES_MIN);
    frame.extend_from_slice(&BROADCAST);
    frame.extend_from_slice(&sender);
    frame.extend_from_slice(&kind.to_be_bytes());
    frame.extend_from_slice(&1u16.to_be_bytes()); // hardware: Ethernet
    frame.extend_from_slice(&0x0800u16.to_be_bytes()); // protocol: IPv4
    frame.extend_from_slice(&[6, 4]);
    frame.extend_from_slice(&operation.to_be_bytes());
    frame.extend_from_slice(&sender);
    frame.extend_from_slice(&sender_ip.octets());
    frame.extend_from_slice(&target);
    frame.extend_from_slice(&target_ip.octets());
    frame.resize(FRAME_BYTES_MIN, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_have_the_form_of_the_rfcs() {
        let mac = [2, 0, 0, 1, 2, 3];
        let frames = frames(mac, Some(Ipv4Addr::new(10, 0, 0, 7)));
        assert_eq!(frames.len(), 2);
        assert_eq!(&frames[0][12..14], &[0x80, 0x35]);
        assert_eq!(&frames[0][20..22], &[0, 3]);
        assert_eq!(&frames[0][32..38], &mac);
        assert_eq!(&frames[1][12..14], &[0x08, 0x06]);
        assert_eq!(&frames[1][28..32], &[10, 0, 0, 7]);
        assert_eq!(&frames[1][38..42], &[10, 0, 0, 7]);
        assert!(frames.iter().all(|frame| frame.len() == 60));
    }
}

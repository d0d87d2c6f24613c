//! Telling the network where the guest is now: RARP for the switches, gratuitous ARP for hosts when
//! the address is known.

use std::net::Ipv4Addr;

use crate::protocol::command::AnnounceSeries;
use crate::protocol::types::Instant;

const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const FRAME_BYTES_MIN: usize = 60;

/// What is announced, and when it is once more.
pub(crate) struct Announcer {
    frames: Vec<Vec<u8>>,
    series: AnnounceSeries,
    /// The number of the next announcement; the first was number 0.
    next: u32,
    last: Instant,
}

impl Announcer {
    /// The announcement of a guest whose first is sent now.
    pub(crate) fn new(mac: [u8; 6], ip: Option<Ipv4Addr>, series: AnnounceSeries, now: Instant) -> Announcer {
        Announcer { frames: frames(mac, ip), series, next: 1, last: now }
    }

    /// The frames, in the order to send them.
    pub(crate) fn frames(&self) -> &[Vec<u8>] {
        &self.frames
    }

    /// When they are to be sent again, if ever.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.series.pause_before(self.next).map(|pause| self.last + pause)
    }

    /// Whether they are to be sent again now; true once for each time.
    pub(crate) fn take_due(&mut self, now: Instant) -> bool {
        let Some(due) = self.due().filter(|due| *due <= now) else { return false };
        (self.next, self.last) = (self.next + 1, due);
        true
    }
}

fn frames(mac: [u8; 6], ip: Option<Ipv4Addr>) -> Vec<Vec<u8>> {
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
    use std::time::Duration;

    use super::*;

    /// When, in ms, the network is told again in this series.
    fn repeats(series: AnnounceSeries) -> Vec<u64> {
        let at = |ms: u64| Instant::from_us(ms * 1000);
        let mut announcer = Announcer::new([2; 6], None, series, at(1_000));
        let said = (1_000..20_000).filter(|ms| announcer.take_due(at(*ms))).map(|ms| ms - 1_000).collect();
        assert_eq!(announcer.due(), None);
        said
    }

    #[test]
    fn it_is_said_again_a_few_times() {
        assert_eq!(repeats(AnnounceSeries::DEFAULT), [50, 300, 750, 1_400, 2_250, 3_300]);
        let ms = Duration::from_millis;
        let capped = AnnounceSeries { initial: ms(100), max: ms(300), rounds: 5, step: ms(150) };
        assert_eq!(repeats(capped), [100, 350, 650, 950]);
        assert!(repeats(AnnounceSeries { rounds: 1, ..capped }).is_empty());
    }

    #[test]
    fn a_node_that_was_asleep_says_all_of_it_later() {
        let at = |ms: u64| Instant::from_us(ms * 1000);
        let mut announcer = Announcer::new([2; 6], None, AnnounceSeries::DEFAULT, at(0));
        let mut said = 0;
        while announcer.take_due(at(60_000)) {
            said += 1;
        }
        assert_eq!((said, announcer.due()), (6, None));
    }

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

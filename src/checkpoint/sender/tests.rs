//! How a sender ends.

use std::io::Read;
use std::net::TcpListener;
use std::sync::mpsc;
use std::thread;

use super::*;
use crate::machine::GuestRam;
use crate::protocol::layout::ImageLayout;
use crate::protocol::machine_shape::MachineShape;
use crate::protocol::messages::Message;
use crate::wire::Link;

/// Far longer than what is waited for takes.
const LONG: Duration = Duration::from_secs(60);
const PAGES: u64 = 16 << 8;

/// A sender, and the end of its connection that the peer has.
fn sender() -> (Sender, std::net::TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address").to_string();
    let link = Link::connect(&address, LONG).expect("a connection");
    let (peer, _) = listener.accept().expect("the connection");
    let closer = link.closer();
    let (_, writer) = link.split();
    let layout = Arc::new(ImageLayout::of(&MachineShape::bare(PAGES * 4096, 1, [2, 0, 0, 0, 0, 1])));
    let image = GuestImage::new(GuestRam::new(PAGES * 4096).expect("memory"), layout, Vec::new());
    let started =
        Sender::start(1, (writer, closer), image, Packing::Uncompressed, CapturePool::default(), || {}, |_| {});
    (started.expect("a thread"), peer)
}

#[test]
fn what_was_handed_over_leaves_before_the_end() {
    let (sender, mut peer) = sender();
    for _ in 0..100 {
        sender.submit(SenderJob::Message(Message::HashBlocks { first: 0, count: 1 }));
    }
    assert!(sender.finish_within(LONG), "the peer takes it");
    let mut bytes = Vec::new();
    peer.read_to_end(&mut bytes).expect("it reads to the end");
    assert_eq!(bytes.len() % 100, 0, "100 messages of one length");
    assert!(bytes.len() > 100 * 16);
}

#[test]
fn a_peer_that_takes_nothing_holds_up_no_end() {
    let (sender, peer) = sender();
    // More than two sockets' buffers hold, although each page of zeros takes a few bytes only.
    for _ in 0..4_000 {
        sender.submit(SenderJob::Push((0..PAGES).collect()));
    }
    let (ended, in_time) = mpsc::channel();
    thread::spawn(move || ended.send(sender.finish_within(Duration::from_millis(1))));
    assert_eq!(in_time.recv_timeout(LONG), Ok(false), "it gave up, and said so");
    drop(peer);
}

//! The server behind a cable, with clients of the same network stack at the other end.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use smoltcp::iface::SocketHandle;
use smoltcp::phy::{Checksum, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::wire::IpAddress;

use super::*;
use crate::test_support::{PAGES, TestHost};

type Frames = Rc<RefCell<VecDeque<Vec<u8>>>>;

/// One end of a cable.
struct End {
    incoming: Frames,
    outgoing: Frames,
    /// Frames that may stand in the cable; more are refused, as by a full device.
    room: usize,
    /// Checksums are taken on trust, so that broken frames get further.
    trusts: bool,
}

struct Frame(Vec<u8>);
struct Slot(Frames);

impl RxToken for Frame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Slot {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, f: F) -> R {
        let mut frame = vec![0; bytes];
        let result = f(&mut frame);
        self.0.borrow_mut().push_back(frame);
        result
    }
}

impl Device for End {
    type RxToken<'a> = Frame;
    type TxToken<'a> = Slot;

    fn receive(&mut self, now: Instant) -> Option<(Frame, Slot)> {
        let slot = self.transmit(now)?;
        let frame = self.incoming.borrow_mut().pop_front()?;
        Some((Frame(frame), slot))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Slot> {
        (self.outgoing.borrow().len() < self.room).then(|| Slot(self.outgoing.clone()))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        if self.trusts {
            capabilities.checksum.ipv4 = Checksum::Tx;
            capabilities.checksum.tcp = Checksum::Tx;
            capabilities.checksum.icmpv4 = Checksum::Tx;
        }
        capabilities
    }
}

/// A server and its clients.
struct World {
    host: TestHost,
    server: Server,
    server_end: End,
    clients: Interface,
    sockets: SocketSet<'static>,
    client_end: End,
    next_port: u16,
}

impl World {
    fn new() -> World {
        World::with_trust(false)
    }

    /// A world whose server takes checksums on trust, or not.
    fn with_trust(trusts: bool) -> World {
        let (there, back) = (Frames::default(), Frames::default());
        let mut server_end = End { incoming: there.clone(), outgoing: back.clone(), room: 128, trusts };
        let mut client_end = End { incoming: back, outgoing: there, room: 128, trusts: false };
        let host = TestHost::new();
        let address = Address { mac: [2, 0, 0, 0, 0, 1], ipv4: [10, 0, 0, 2], prefix_len: 24, gateway: None };
        let server = Server::new(&mut server_end, &host, address, 11).expect("memory");
        let mut config = Config::new(EthernetAddress([2, 0, 0, 0, 0, 2]).into());
        config.random_seed = 12;
        let mut clients = Interface::new(config, &mut client_end, Instant::from_micros(host.now_us as i64));
        clients.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(IpAddress::v4(10, 0, 0, 1), 24)).expect("room");
        });
        World { host, server, server_end, clients, sockets: SocketSet::new(vec![]), client_end, next_port: 40_000 }
    }

    fn connect(&mut self) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 1 << 17]);
        let handle = self.sockets.add(Socket::new(buffer(), buffer()));
        let socket = self.sockets.get_mut::<Socket>(handle);
        socket.connect(self.clients.context(), (IpAddress::v4(10, 0, 0, 2), PORT), self.next_port).expect("connect");
        self.next_port = self.next_port.checked_add(1).unwrap_or(20_000);
        handle
    }

    /// Lets both ends work for `rounds` rounds of a millisecond.
    fn run(&mut self, rounds: usize) {
        for _ in 0..rounds {
            self.host.now_us += 1_000;
            let now = Instant::from_micros(self.host.now_us as i64);
            self.clients.poll(now, &mut self.client_end, &mut self.sockets);
            while self.server.poll(&mut self.server_end, &mut self.host) {}
            self.clients.poll(now, &mut self.client_end, &mut self.sockets);
        }
    }

    /// Sends all of `bytes` and gives `expected` bytes of replies, or what came before the server
    /// closed.
    fn exchange(&mut self, handle: SocketHandle, bytes: &[u8], expected: usize) -> Vec<u8> {
        let (mut sent, mut replies) = (0, Vec::new());
        for _ in 0..3_000 {
            let socket = self.sockets.get_mut::<Socket>(handle);
            if socket.may_send() {
                sent += socket.send_slice(&bytes[sent..]).expect("open");
            }
            self.run(1);
            let socket = self.sockets.get_mut::<Socket>(handle);
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), replies.extend_from_slice(bytes))).expect("open");
            }
            if sent == bytes.len() && replies.len() >= expected || !socket.is_active() {
                break;
            }
        }
        replies
    }

    fn ask(&mut self, handle: SocketHandle, line: &str, reply: &str) {
        let bytes = self.exchange(handle, format!("{line}\r\n").as_bytes(), reply.len());
        assert_eq!(String::from_utf8_lossy(&bytes), reply, "{line}");
    }

    fn state(&self, handle: SocketHandle) -> State {
        self.sockets.get::<Socket>(handle).state()
    }
}

#[test]
fn many_clients_connect_at_once_and_pipeline() {
    let mut world = World::new();
    let clients: Vec<SocketHandle> = (0..200).map(|_| world.connect()).collect();
    world.run(20);
    assert!(clients.iter().all(|client| world.state(*client) == State::Established));
    assert_eq!(world.server.statistics.connected, 200);
    for _ in 0..3 {
        for client in &clients {
            world.sockets.get_mut::<Socket>(*client).send_slice(&b"INCR n\r\n".repeat(16)).expect("open");
        }
        world.run(20);
    }
    let mut replies = Vec::new();
    for client in &clients {
        let socket = world.sockets.get_mut::<Socket>(*client);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), replies.extend_from_slice(bytes))).expect("open");
        }
    }
    let mut numbers: Vec<u32> =
        String::from_utf8(replies).expect("text").lines().map(|line| line[1..].parse().expect("number")).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (1..=200 * 3 * 16).collect::<Vec<u32>>(), "every INCR counted once");
}

#[test]
fn sockets_are_used_again() {
    let mut world = World::new();
    for round in 0..30 {
        let clients: Vec<SocketHandle> = (0..40).map(|_| world.connect()).collect();
        world.run(5);
        for (index, client) in clients.iter().enumerate() {
            assert_eq!(world.state(*client), State::Established, "round {round}");
            let socket = world.sockets.get_mut::<Socket>(*client);
            if index % 2 == 0 { socket.close() } else { socket.abort() }
        }
        world.run(5);
        clients.into_iter().for_each(|client| drop(world.sockets.remove(client)));
    }
    assert_eq!(world.server.statistics.connected, 0);
    assert_eq!(world.server.statistics.connections, 1200);
    assert!(world.server.connections.len() < 120, "{}", world.server.connections.len());
}

#[test]
fn a_large_value_goes_in_and_out() {
    let mut world = World::new();
    let client = world.connect();
    let value: Vec<u8> = (0..1 << 20).map(|i: u32| ((i * 7) >> 3) as u8).collect();
    let mut command = format!("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n${}\r\n", value.len()).into_bytes();
    command.extend_from_slice(&value);
    command.extend_from_slice(b"\r\n");
    assert_eq!(world.exchange(client, &command, 5), b"+OK\r\n");
    let mut expected = format!("${}\r\n", value.len()).into_bytes();
    expected.extend_from_slice(&value);
    expected.extend_from_slice(b"\r\n");
    let replies = world.exchange(client, b"GET k\r\nGET k\r\nPING\r\n", expected.len() * 2 + 7);
    assert!(replies == [&expected[..], &expected[..], b"+PONG\r\n"].concat(), "{} bytes", replies.len());
}

#[test]
fn a_client_that_makes_no_sense_is_told_and_closed() {
    let mut world = World::new();
    let client = world.connect();
    let replies = world.exchange(client, b"PING\r\n*1\r\n:5\r\nPING\r\n", usize::MAX);
    assert_eq!(replies, b"+PONG\r\n-ERR Protocol error: expected '$', got ':'\r\n");
    let client = world.connect();
    assert_eq!(world.exchange(client, b"QUIT\r\nPING\r\n", usize::MAX), b"+OK\r\n");
}

#[test]
fn a_client_that_closes_its_side_first_gets_its_replies() {
    let mut world = World::new();
    let client = world.connect();
    world.run(3);
    let socket = world.sockets.get_mut::<Socket>(client);
    socket.send_slice(b"PING\r\nSUM\r\nPING\r\nPIN").expect("open");
    socket.close();
    assert_eq!(world.exchange(client, b"", 36).len(), 7 + 5 + 16 + 2 + 7);
    world.run(20);
    assert_eq!(world.server.statistics.connected, 0);
}

#[test]
fn late_replies_keep_their_place() {
    let mut world = World::new();
    let (one, other) = (world.connect(), world.connect());
    world.run(3);
    world.host.writer_runs = false;
    world.exchange(one, b"DIRTY 10 1000\r\nPING\r\n", 0);
    world.run(5);
    assert!(!world.sockets.get::<Socket>(one).can_recv());
    world.ask(other, "DIRTY 0 0", "-BUSY another DIRTY is taking effect, try again\r\n");
    world.run(30);
    assert_eq!(world.server.wait_us(world.host.now_us), Some(WRITER_WAIT_US));
    world.host.writer_runs = true;
    assert_eq!(world.exchange(one, b"", 12), b"+OK\r\n+PONG\r\n");
    let sums = world.exchange(other, b"SUM\r\nSUM\r\n", 46);
    assert_eq!(sums[..23], sums[23..]);
    const { assert!(PAGES > 2, "a sum takes several rounds") };
}

#[test]
fn a_full_device_loses_nothing() {
    let mut world = World::new();
    let client = world.connect();
    world.run(3);
    world.server_end.room = 0;
    let socket = world.sockets.get_mut::<Socket>(client);
    socket.send_slice(&b"INCR n\r\n".repeat(10)).expect("open");
    world.run(50);
    assert!(!world.server.poll(&mut world.server_end, &mut world.host), "nothing to be done without room");
    assert!(world.server.wait_us(world.host.now_us) > Some(0), "and no reason to spin");
    world.server_end.room = 128;
    let replies = world.exchange(client, b"", 41);
    assert_eq!(replies, b":1\r\n:2\r\n:3\r\n:4\r\n:5\r\n:6\r\n:7\r\n:8\r\n:9\r\n:10\r\n");
}

#[test]
fn a_lost_reply_is_sent_again_soon() {
    let mut world = World::new();
    let client = world.connect();
    world.ask(client, "PING", "+PONG\r\n");
    world.run(30);
    world.sockets.get_mut::<Socket>(client).send_slice(b"PING\r\n").expect("open");
    let now = Instant::from_micros(world.host.now_us as i64);
    world.clients.poll(now, &mut world.client_end, &mut world.sockets);
    while world.server.poll(&mut world.server_end, &mut world.host) {}
    world.client_end.incoming.borrow_mut().clear();
    world.run(130);
    assert!(world.sockets.get::<Socket>(client).can_recv(), "within 130 ms of guest time");
}

#[test]
fn an_idle_server_waits_for_ever() {
    let mut world = World::new();
    assert_eq!(world.server.wait_us(world.host.now_us), None);
    let client = world.connect();
    world.ask(client, "PING", "+PONG\r\n");
    world.run(30);
    assert!(world.server.wait_us(world.host.now_us) > Some(1_000_000), "only the keep-alive is left");
}

/// A cheap source of chance.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % sides
    }
}

#[test]
fn broken_frames_do_no_harm() {
    let mut dice = Dice(0x1234_5678_9abc_def1);
    let mut world = World::with_trust(true);
    for round in 0..20_000 {
        let client = world.connect();
        for _ in 0..6 {
            let socket = world.sockets.get_mut::<Socket>(client);
            let _ = socket.send_slice(b"INCR n\r\nPING\r\n");
            if dice.roll(4) == 0 {
                socket.close();
            }
            let now = Instant::from_micros(world.host.now_us as i64);
            world.clients.poll(now, &mut world.client_end, &mut world.sockets);
            let frames: Vec<Vec<u8>> = world.client_end.outgoing.borrow().iter().cloned().collect();
            for mut frame in frames {
                for _ in 0..1 + dice.roll(3) {
                    // Mostly in the headers, where it hurts.
                    let at = if dice.roll(4) > 0 { 12 + dice.roll(62) } else { dice.roll(frame.len()) };
                    if let Some(byte) = frame.get_mut(at) {
                        *byte = if dice.roll(3) == 0 {
                            [0, 1, 0x7f, 0x80, 0xff][dice.roll(5)]
                        } else {
                            dice.roll(256) as u8
                        };
                    }
                }
                if dice.roll(5) == 0 {
                    frame.truncate(dice.roll(frame.len() + 1));
                }
                world.client_end.outgoing.borrow_mut().push_front(frame);
            }
            world.run(1 + dice.roll(3));
        }
        world.sockets.get_mut::<Socket>(client).abort();
        world.run(2);
        world.sockets.remove(client);
        // Long enough for what was left half open to time out now and then.
        world.host.now_us += if round % 50 == 49 { 700_000_000 } else { 0 };
    }
    world.run(50);
    let client = world.connect();
    world.ask(client, "PING", "+PONG\r\n");
}

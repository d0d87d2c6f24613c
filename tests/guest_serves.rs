//! The built-in guest on a real tap: unmodified clients, many connections, ping, idleness, and
//! pauses under load.
//!
//! Each test has a network namespace to itself, in which its guest is 10.77.0.2.

use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::RawFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mcd::machine::{CpuModel, GuestNet, Machine, NetBackend, Transmit};
use mcd::protocol::guest_event::GuestEvent;
use mcd::protocol::machine_shape::MachineShape;
use mcd::protocol::pages::PageSet;
use mcd::testbed::client::connect;
use mcd::testbed::guest_client::GuestClient;
use mcd::testbed::namespaces::find_tool;
use mcd::testbed::require::{NODE_DEVICES, with_rights};
use mcd::testbed::wait::WAIT_MAX;
use netbuf::{PacketPort, TunTapPort};
use nix::sched::{CloneFlags, unshare};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const SERVER: SocketAddr = SocketAddr::V4(SocketAddrV4::new(GUEST, 6379));
const MEMORY_BYTES: u64 = 96 << 20;

/// Runs `body`, the body of test `name`, in a network namespace of its own; in a user namespace too
/// where that is needed.
fn in_a_network(name: &str, body: impl FnOnce()) {
    with_rights(name, NODE_DEVICES, || {
        unshare(CloneFlags::CLONE_NEWNET).expect("who may make namespaces may make this one");
        body();
    });
}

struct Tap(TunTapPort);

impl NetBackend for Tap {
    fn transmit(&self, frame: &[u8]) -> Transmit {
        self.0.send(frame).expect("the tap is up");
        Transmit::Accepted
    }

    fn receive(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        match self.0.recv(buf) {
            Ok(length) => Ok(Some(length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn readable_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn ip(arguments: &str) {
    let tool = find_tool("ip").expect("iproute2 is installed: make setup");
    let status = Command::new(tool).args(arguments.split(' ')).status().expect("ip starts");
    assert!(status.success(), "ip {arguments}");
}

/// A guest that serves.
fn boot(cpus: u8) -> Machine {
    let tap = TunTapPort::create("guest").expect("tap");
    // Nobody speaks IPv6 here; its announcements would only wake the guest.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/guest/disable_ipv6", "1");
    ip("addr add 10.77.0.1/24 dev guest");
    ip("link set guest up");
    let shape = MachineShape::bare(MEMORY_BYTES, cpus, [2, 0, 0, 0, 0, 7]);
    let mut machine =
        Machine::new(&shape, CpuModel::Host, Arc::new(Tap(tap)), Vec::new(), Box::new(io::stderr())).expect("machine");
    machine.boot_builtin(&GuestNet { ipv4: GUEST, prefix_len: 24, gateway: None }).expect("boot");
    machine.resume().expect("resume");
    assert_eq!(machine.events().recv_timeout(WAIT_MAX), Ok(GuestEvent::Booted));
    machine
}

/// A client that knows what the guest must answer.
struct Client(GuestClient);

impl Client {
    fn connect() -> Client {
        let stream = connect(SERVER, WAIT_MAX).expect("connect");
        Client(GuestClient::over(stream, WAIT_MAX).expect("a client"))
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.send_bytes(bytes).expect("send");
    }

    fn expect(&mut self, reply: &[u8]) {
        let mut bytes = vec![0; reply.len()];
        self.0.read_exact(&mut bytes).expect("reply");
        assert!(bytes == reply, "{} instead of {}", bytes.escape_ascii(), reply.escape_ascii());
    }

    fn ask(&mut self, line: &str, reply: &str) {
        self.send(format!("{line}\r\n").as_bytes());
        self.expect(reply.as_bytes());
    }

    /// The first line of the reply.
    fn line(&mut self, line: &str) -> String {
        self.0.ask(line).expect("reply")
    }
}

#[test]
fn many_connections_pipeline() {
    in_a_network("many_connections_pipeline", || {
        for cpus in [1, 3] {
            let _machine = boot(cpus);
            let mut clients: Vec<Client> = (0..80).map(|_| Client::connect()).collect();
            for _ in 0..5 {
                clients.iter_mut().for_each(|client| client.send(&b"INCRBY n 2\r\nPING\r\n".repeat(16)));
                for client in &mut clients {
                    for _ in 0..16 {
                        let mut reply = Vec::new();
                        while !reply.ends_with(b"+PONG\r\n") {
                            let mut byte = [0];
                            client.0.read_exact(&mut byte).expect("reply");
                            reply.push(byte[0]);
                        }
                    }
                }
            }
            clients[0].ask("GET n", "$5\r\n12800\r\n");
            let value = "v".repeat(1 << 20);
            clients[1].send(format!("*3\r\n$3\r\nSET\r\n$1\r\nv\r\n${}\r\n{value}\r\n", value.len()).as_bytes());
            clients[1].expect(b"+OK\r\n");
            clients[2].send(b"GET v\r\n");
            clients[2].expect(format!("${}\r\n{value}\r\n", value.len()).as_bytes());
            assert_eq!(clients[3].line("SUM"), "$16");
        }
    });
}

#[test]
fn unmodified_redis_tools_work() {
    in_a_network("unmodified_redis_tools_work", || {
        if let Some(tool) = ["redis-cli", "redis-benchmark"].into_iter().find(|tool| find_tool(tool).is_none()) {
            println!("skipped: {tool} is not installed: make setup");
            return;
        }
        let _machine = boot(1);
        let run = |program: &str, arguments: &str| {
            let mut command = Command::new(find_tool(program).expect("looked for above"));
            let output =
                command.args(["-h", "10.77.0.2"]).args(arguments.split(' ')).output().expect("redis-tools start");
            let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{program} {arguments}: {text}");
            assert!(!text.contains("ERR") && !text.contains("WARN"), "{program} {arguments}: {text}");
            text
        };
        assert_eq!(run("redis-cli", "PING"), "PONG\n");
        assert_eq!(run("redis-cli", "-3 CONFIG GET appendonly"), "appendonly no\n");
        run("redis-benchmark", "-t ping,set,get,incr,mset -c 20 -n 2000 -q");
        run("redis-benchmark", "-t ping,set,get,incr -c 64 -n 20000 -P 16 -q");
        assert_eq!(run("redis-cli", "GET counter:__rand_int__"), "22000\n");
    });
}

#[test]
fn the_guest_answers_ping() {
    in_a_network("the_guest_answers_ping", || {
        let _machine = boot(1);
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::RAW, Some(socket2::Protocol::ICMPV4))
            .expect("raw socket");
        socket.set_read_timeout(Some(WAIT_MAX)).expect("timeout");
        // Echo request 7/1 with twelve bytes of payload.
        let mut request = vec![8, 0, 0, 0, 0, 7, 0, 1];
        request.extend(b"are you here");
        let sum: u32 = request.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
        request[2..4].copy_from_slice(&checksum.to_be_bytes());
        socket.send_to(&request, &SocketAddr::from((GUEST, 0)).into()).expect("send");
        let mut packet = [0; 200];
        loop {
            let bytes = (&socket).read(&mut packet).expect("a reply");
            // Behind 20 bytes of IP header; our own request does not come back.
            if packet[20..22] == [0, 0] {
                assert_eq!(&packet[24..bytes], &request[4..]);
                return;
            }
        }
    });
}

#[test]
fn an_idle_guest_dirties_next_to_nothing() {
    in_a_network("an_idle_guest_dirties_next_to_nothing", || {
        for cpus in [1, 2] {
            let mut machine = boot(cpus);
            let mut client = Client::connect();
            client.ask("PING", "+PONG\r\n");
            machine.pause().expect("pause");
            machine.track_dirty(true).expect("track");
            let mut dirty = PageSet::empty(machine.memory().pages());
            // A packet of the exchange above, or one of the host's own, may still come in one or
            // the other epoch.
            let quietest = (0..6).map(|_| {
                dirty.clear();
                machine.resume().expect("resume");
                // An idle stretch is what this test looks at: there is no event to wait for.
                std::thread::sleep(Duration::from_millis(50));
                machine.pause().expect("pause");
                machine.collect_dirty(&mut dirty).expect("collect");
                dirty.iter().collect::<Vec<u64>>()
            });
            let quietest = quietest.min_by_key(Vec::len).expect("six epochs");
            assert!(quietest.len() <= 2, "pages {quietest:x?} in 50 idle milliseconds, {cpus} vCPUs");
        }
    });
}

#[test]
fn pauses_under_load_lose_nothing() {
    in_a_network("pauses_under_load_lose_nothing", || {
        for cpus in [1, 2] {
            let mut machine = boot(cpus);
            let mut control = Client::connect();
            control.ask("DIRTY 300 30000", "+OK\r\n");
            let mut clients: Vec<Client> = (0..8).map(|_| Client::connect()).collect();
            let stop = AtomicBool::new(false);
            let (mut sent, mut pauses, mut most) = (0, 0, 0);
            std::thread::scope(|scope| {
                let load: Vec<_> = clients
                    .iter_mut()
                    .map(|client| {
                        let stop = &stop;
                        scope.spawn(move || {
                            let mut count = 0;
                            while !stop.load(Ordering::Relaxed) {
                                client.line("INCR n");
                                count += 1;
                            }
                            count
                        })
                    })
                    .collect();
                machine.pause().expect("pause");
                machine.track_dirty(true).expect("track");
                let mut dirty = PageSet::empty(machine.memory().pages());
                while pauses < 200 {
                    machine.resume().expect("resume");
                    // An epoch's length; what happens in it is up to the load.
                    std::thread::sleep(Duration::from_millis(5));
                    machine.pause().expect("pause");
                    dirty.clear();
                    machine.collect_dirty(&mut dirty).expect("collect");
                    most = most.max(dirty.count());
                    pauses += 1;
                }
                machine.resume().expect("resume");
                stop.store(true, Ordering::Relaxed);
                sent = load.into_iter().map(|thread| thread.join().expect("client")).sum::<u64>();
            });
            assert!(most >= 50, "the memory writer wrote: {most} pages in an epoch at most");
            control.ask("GET n", &format!("${}\r\n{sent}\r\n", sent.to_string().len()));
            control.ask("DIRTY CHECK", ":0\r\n");
            control.ask("DIRTY 0 0", "+OK\r\n");
            control.send(b"SHUTDOWN\r\n");
            let event = machine.events().recv_timeout(WAIT_MAX);
            assert_eq!(event, Ok(GuestEvent::Shutdown));
        }
    });
}

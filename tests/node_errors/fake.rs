//! The other side of a connection, in the test's own hands: a newcomer that says what it likes, and
//! a primary that does.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use mcd::machine::host_cpu;
use mcd::protocol::machine_shape::MachineShape;
use mcd::protocol::messages::{Activity, Channel, Hello, Message, PROTOCOL_VERSION, RefuseReason, Welcome, features};
use mcd::protocol::types::{EpochId, Generation, GuestName, InstanceId};
use mcd::testbed::rng::Rng;
use mcd::wire::{FrameBatch, FrameKind, FrameReader, PageEncoder, WireError};

use super::process::WAIT_MAX;

/// A raw connection that speaks frames when asked to.
pub struct Peer {
    stream: TcpStream,
    reader: FrameReader<TcpStream>,
}

impl Peer {
    pub fn connect(to: &str) -> Peer {
        let to: SocketAddr = to.parse().expect("an address");
        Peer::over(TcpStream::connect_timeout(&to, WAIT_MAX).expect("a connection"))
    }

    fn over(stream: TcpStream) -> Peer {
        stream.set_read_timeout(Some(WAIT_MAX)).expect("a timeout");
        let reader = FrameReader::new(stream.try_clone().expect("a descriptor"));
        Peer { stream, reader }
    }

    /// Sends bytes. That the other end may have closed by now is for the reading to find out.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    pub fn send(&mut self, message: &Message) {
        self.send_bytes(&frame(message));
    }

    pub fn read(&mut self) -> Result<Message, WireError> {
        self.reader.read()?.message()
    }

    /// The next frame, whatever it is, but for probes.
    pub fn read_frame(&mut self) -> Result<(FrameKind, Vec<u8>), WireError> {
        loop {
            let frame = self.reader.read()?;
            if frame.kind != FrameKind::Probe {
                return Ok((frame.kind, frame.payload.to_vec()));
            }
        }
    }

    /// Reads a refusal: its sentence. Nothing comes after it.
    #[track_caller]
    pub fn refusal(&mut self, expected: RefuseReason) -> String {
        match self.read() {
            Ok(Message::Refuse { reason, detail }) => {
                assert_eq!(reason, expected, "{detail}");
                self.is_closed();
                detail
            }
            other => panic!("no refusal: {other:?}"),
        }
    }

    /// Waits until the other end closes, which it must do without a word more.
    #[track_caller]
    pub fn is_closed(&mut self) {
        match self.reader.read() {
            Err(error) if error.is_disconnect() => {}
            Err(error) => panic!("not closed: {error}"),
            Ok(frame) => panic!("not closed: a frame came: {:?}", frame.kind),
        }
    }

    /// Closes the writing side, and waits for whatever comes until the other end closes too.
    pub fn hang_up(mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        let _ = self.stream.read_to_end(&mut Vec::new());
    }
}

/// The frame of a message.
pub fn frame(message: &Message) -> Vec<u8> {
    let mut batch = FrameBatch::new();
    batch.push_message(message).expect("it fits");
    batch.as_bytes().to_vec()
}

/// The frame of a message, with another version of the wire in its header.
pub fn frame_of_version(message: &Message, version: u16) -> Vec<u8> {
    let mut bytes = frame(message);
    bytes[4..6].copy_from_slice(&version.to_le_bytes());
    bytes
}

/// A hello that a primary of guest `web` on this host welcomes.
pub fn hello(channel: Channel, instance: u128) -> Hello {
    Hello {
        channel,
        version: PROTOCOL_VERSION,
        guest: GuestName::new("web").expect("a name"),
        instance: InstanceId(instance),
        features: features::LZ4,
        staging_bytes_max: 512 << 20,
        cpu: host_cpu(mcd::machine::CpuModel::Host).expect("KVM"),
    }
}

/// Guest memory of the fake primary's guest, in bytes.
pub const MEMORY_BYTES: u64 = 16 << 20;
const PRIMARY: InstanceId = InstanceId(77);

/// What a good primary answers.
pub fn welcome() -> Welcome {
    Welcome {
        instance: PRIMARY,
        generation: Generation(5),
        shape: MachineShape::bare(MEMORY_BYTES, 1, [2, 0, 0, 0, 0, 1]),
        tsc_khz: host_cpu(mcd::machine::CpuModel::Host).expect("KVM").tsc_khz,
        features: features::LZ4,
        interval_us: 20_000,
        heartbeat_interval_us: 200_000,
        heartbeat_timeout_us: 120_000_000,
    }
}

pub fn epoch(number: u64) -> EpochId {
    EpochId { generation: Generation(5), epoch: number }
}

/// A primary that speaks as the test wants.
pub struct FakePrimary {
    data: TcpListener,
    heartbeat: TcpListener,
}

/// A newcomer's two connections, both welcomed.
pub struct Joined {
    pub data: Peer,
    pub heartbeat: Peer,
    pub newcomer: InstanceId,
}

impl FakePrimary {
    pub fn listen([data, heartbeat]: [&str; 2]) -> FakePrimary {
        let bind = |at| TcpListener::bind::<&str>(at).expect("a port");
        FakePrimary { data: bind(data), heartbeat: bind(heartbeat) }
    }

    fn accept(listener: &TcpListener) -> (Peer, Hello) {
        let (stream, _) = listener.accept().expect("a newcomer");
        let mut peer = Peer::over(stream);
        match peer.read().expect("a hello") {
            Message::Hello(hello) => (peer, hello),
            other => panic!("no hello: {other:?}"),
        }
    }

    /// The next newcomer's data connection.
    pub fn accept_data(&self) -> (Peer, Hello) {
        FakePrimary::accept(&self.data)
    }

    /// Its heartbeat connection.
    pub fn accept_heartbeat(&self) -> (Peer, Hello) {
        FakePrimary::accept(&self.heartbeat)
    }

    /// Welcomes the next newcomer on both connections, and waits until its heartbeats say that it
    /// has built its machine.
    pub fn join(&self) -> Joined {
        self.join_with(&welcome())
    }

    /// The same, with other words.
    pub fn join_with(&self, welcome: &Welcome) -> Joined {
        let (mut data, hello) = self.accept_data();
        data.send(&Message::Welcome(welcome.clone()));
        let (mut heartbeat, second) = self.accept_heartbeat();
        assert_eq!((second.instance, second.channel), (hello.instance, Channel::Heartbeat));
        heartbeat.send(&Message::Welcome(welcome.clone()));
        loop {
            match heartbeat.read() {
                Ok(Message::Heartbeat(beat)) if beat.instance == hello.instance => match beat.activity {
                    Activity::Building { .. } => {}
                    _ => break,
                },
                other => panic!("no heartbeat of {:?}: {other:?}", hello.instance),
            }
        }
        Joined { data, heartbeat, newcomer: hello.instance }
    }
}

/// An epoch on the wire, to be spoilt in one of its parts.
pub struct Epoch {
    pub id: EpochId,
    pub completes_resync: bool,
    /// Indices of its pages; all are filled with ones.
    pub pages: Vec<u64>,
    pub state: Vec<u8>,
    /// What is announced beyond the truth.
    pub more_pages: u64,
    pub more_state: u64,
    pub digest_xor: u32,
    pub end_id: EpochId,
}

impl Epoch {
    /// A good one.
    pub fn new(number: u64) -> Epoch {
        let id = epoch(number);
        let state = vec![7; 100];
        Epoch {
            id,
            completes_resync: false,
            pages: vec![1, 5],
            state,
            more_pages: 0,
            more_state: 0,
            digest_xor: 0,
            end_id: id,
        }
    }

    /// Its frames.
    pub fn frames(&self) -> Vec<u8> {
        let mut batch = FrameBatch::new();
        let begin = Message::EpochBegin { id: self.id, completes_resync: self.completes_resync };
        batch.push_message(&begin).expect("it fits");
        let chunk = pages(&self.pages);
        batch.push(FrameKind::Pages, &chunk).expect("it fits");
        batch.push(FrameKind::State, &self.state).expect("it fits");
        let end = Message::EpochEnd {
            id: self.end_id,
            pages: self.pages.len() as u64 + self.more_pages,
            state_bytes: self.state.len() as u64 + self.more_state,
            digest: crc32c::crc32c_append(crc32c::crc32c(&chunk), &self.state) ^ self.digest_xor,
        };
        batch.push_message(&end).expect("it fits");
        batch.as_bytes().to_vec()
    }
}

/// A chunk of pages full of ones.
pub fn pages(indices: &[u64]) -> Vec<u8> {
    let mut chunk = Vec::new();
    let mut encoder = PageEncoder::new(true);
    for index in indices {
        encoder.encode(*index, &[1; 4096], &mut chunk);
    }
    chunk
}

/// A frame of any kind.
pub fn bulk(kind: FrameKind, payload: &[u8]) -> Vec<u8> {
    let mut batch = FrameBatch::new();
    batch.push(kind, payload).expect("it fits");
    batch.as_bytes().to_vec()
}

impl Joined {
    /// Waits for the ack of an epoch.
    #[track_caller]
    pub fn acked(&mut self, id: EpochId) {
        match self.data.read() {
            Ok(Message::Ack { id: acked, .. }) => assert_eq!(acked, id),
            other => panic!("no ack of {id}: {other:?}"),
        }
    }

    /// Waits until the newcomer has closed both connections; it must not have acknowledged
    /// anything.
    #[track_caller]
    pub fn closes(mut self) {
        self.data.is_closed();
        loop {
            match self.heartbeat.read() {
                Ok(Message::Heartbeat(_)) => {}
                Err(error) if error.is_disconnect() => return,
                other => panic!("not closed: {other:?}"),
            }
        }
    }
}

/// Random bytes, the same each time.
pub fn garbage(length: usize) -> Vec<u8> {
    let mut rng = Rng::new(1);
    (0..length).map(|_| rng.next_u64() as u8).collect()
}

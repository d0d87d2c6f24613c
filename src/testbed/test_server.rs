//! A small key-value server inside the test process that can be told to be at fault, to see that
//! the checker notices.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;

use super::client::{Dial, connect};
use super::resp::{Parser, Reply};

/// What the server does wrong, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It answers every SET and DEL of one key as if it did them, and does not.
    LoseWrites,
    /// It undoes a whole batch of acknowledged writes, as a rollback to an older state does.
    RollBack,
    /// It does every INCR of one key twice and answers as if once.
    DoubleIncr,
    /// It answers a GET with another value.
    WrongGet,
    /// It answers twice.
    DoubleReply,
    /// It leaves out an answer that others follow.
    DropReply,
    /// It never answers again.
    Mute,
    /// It closes the connection with requests unanswered.
    Reset,
    /// It speaks something else.
    Garbage,
}

struct State {
    store: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
    fault: Option<Fault>,
    /// Commands left until the fault may happen.
    fuse: AtomicU64,
    done: AtomicBool,
    /// The key a lasting fault is about.
    victim: Mutex<Option<Vec<u8>>>,
}

/// The server. Dropping it ends it.
pub(super) struct TestServer {
    address: SocketAddr,
    over: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl TestServer {
    /// Serves on a loopback port. The fault happens at the first chance after `fuse` commands.
    pub(super) fn start(fault: Option<Fault>, fuse: u64) -> TestServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (store, over) = (Mutex::default(), Arc::new(AtomicBool::new(false)));
        let state = Arc::new(State {
            store,
            fault,
            fuse: AtomicU64::new(fuse),
            done: AtomicBool::new(false),
            victim: Mutex::default(),
        });
        let ended = over.clone();
        let acceptor = std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if ended.load(Relaxed) {
                    return;
                }
                let state = state.clone();
                // Ends when the client closes.
                std::thread::spawn(move || serve(stream, &state));
            }
        });
        TestServer { address, over, acceptor: Some(acceptor) }
    }

    pub(super) fn dial(&self) -> Dial {
        let address = self.address;
        Arc::new(move || connect(address, Duration::from_secs(10)))
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
        let _ = TcpStream::connect(self.address);
        let _ = self.acceptor.take().unwrap().join();
    }
}

fn serve(mut stream: TcpStream, state: &State) {
    let (mut parser, mut buffer, mut before) = (Parser::default(), [0; 65536], None);
    loop {
        let Ok(count @ 1..) = stream.read(&mut buffer) else { return };
        parser.feed(&buffer[..count]);
        let mut out = Vec::new();
        while let Some(Reply::Array(words)) = parser.next_reply().unwrap() {
            let words: Vec<Vec<u8>> =
                words.into_iter().map(|w| if let Reply::Bulk(Some(w)) = w { w } else { panic!("{w:?}") }).collect();
            let more = !parser.rest().is_empty();
            if !answer(&words, more, state, &mut before, &mut out) {
                let _ = stream.write_all(&out);
                let _ = stream.shutdown(Shutdown::Both);
                return;
            }
        }
        if stream.write_all(&out).is_err() {
            return;
        }
    }
}

/// Does one command. False: close the connection.
fn answer(
    words: &[Vec<u8>],
    more: bool,
    state: &State,
    before: &mut Option<HashMap<Vec<u8>, Vec<u8>>>,
    out: &mut Vec<u8>,
) -> bool {
    let mut store = state.store.lock();
    let armed = state.fuse.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_err();
    let verb = words[0].as_slice();
    let fits = match state.fault {
        None => false,
        Some(Fault::LoseWrites) => verb == b"SET" && store.contains_key(&words[1]),
        Some(Fault::DoubleIncr) => verb == b"INCR",
        Some(Fault::WrongGet) => verb == b"GET",
        Some(Fault::DropReply) => more,
        Some(_) => true,
    };
    let fault = if armed && fits && !state.done.load(Relaxed) { state.fault } else { None };
    let mut victim = state.victim.lock();
    if matches!(fault, Some(Fault::LoseWrites | Fault::DoubleIncr)) {
        *victim = Some(words[1].clone());
    }
    let is_victim = |key: &Vec<u8>| victim.as_ref() == Some(key);
    if fault == Some(Fault::RollBack) {
        // Remembers the store at the first chance, goes back to it forty commands later.
        match before.take() {
            None => {
                *before = Some(store.clone());
                state.fuse.store(40, Relaxed);
            }
            Some(old) => {
                *store = old;
                state.done.store(true, Relaxed);
            }
        }
    } else if fault.is_some() {
        state.done.store(true, Relaxed);
    }
    let mut reply = match verb {
        b"SET" => {
            if !is_victim(&words[1]) {
                store.insert(words[1].clone(), words[2].clone());
            }
            b"+OK\r\n".to_vec()
        }
        b"GET" if fault == Some(Fault::WrongGet) => bulk(Some(&b"another".to_vec())),
        b"GET" => bulk(store.get(&words[1])),
        b"MGET" => {
            let values = words[1..].iter().flat_map(|key| bulk(store.get(key)));
            format!("*{}\r\n", words.len() - 1).into_bytes().into_iter().chain(values).collect()
        }
        b"DEL" => {
            let there = words[1..].iter().filter(|key| store.contains_key(*key)).count();
            store.retain(|key, _| {
                !words[1..].contains(key) || (is_victim(key) && state.fault == Some(Fault::LoseWrites))
            });
            format!(":{there}\r\n").into_bytes()
        }
        b"INCR" | b"INCRBY" => {
            let by: i64 = words.get(2).map_or(1, |by| String::from_utf8_lossy(by).parse().unwrap());
            let old: i64 = store.get(&words[1]).map_or(0, |n| String::from_utf8_lossy(n).parse().unwrap());
            let twice = if is_victim(&words[1]) && verb == b"INCR" { 1 } else { 0 };
            store.insert(words[1].clone(), (old + by + twice).to_string().into_bytes());
            format!(":{}\r\n", old + by).into_bytes()
        }
        _ => b"-ERR unknown command\r\n".to_vec(),
    };
    match fault {
        Some(Fault::Reset) => return false,
        Some(Fault::DropReply | Fault::Mute) => return true,
        Some(Fault::DoubleReply) => reply.extend_from_within(..),
        Some(Fault::Garbage) => reply = b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
        _ => {}
    }
    out.extend(reply);
    true
}

fn bulk(value: Option<&Vec<u8>>) -> Vec<u8> {
    match value {
        None => b"$-1\r\n".to_vec(),
        Some(value) => [format!("${}\r\n", value.len()).as_bytes(), value, b"\r\n"].concat(),
    }
}

//! This machine's wall clock, for the hosts: eight bytes for each byte that is sent.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mcd::testbed::namespaces::{CLIENT_IPV4, Namespace};

use crate::error::LabError;

/// How long a host may be silent between two questions.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// Where hosts ask.
pub fn address() -> SocketAddr {
    const PORT: u16 = 1123;
    (CLIENT_IPV4, PORT).into()
}

/// A running time server. Dropping it ends it.
#[derive(Debug)]
pub struct TimeServer {
    network: Arc<Namespace>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl TimeServer {
    /// Starts it in `network`.
    pub fn start(network: &Arc<Namespace>) -> Result<TimeServer, LabError> {
        let listener =
            network.run(|| TcpListener::bind(address()))?.map_err(LabError::io("listen for the hosts' clocks"))?;
        let over = Arc::new(AtomicBool::new(false));
        let theirs = over.clone();
        let thread = std::thread::Builder::new().name("time server".to_owned());
        let serve = move || {
            for stream in listener.incoming().take_while(|_| !theirs.load(SeqCst)) {
                // A host whose power is cut asks no more.
                let _ = stream.and_then(answer);
            }
        };
        let thread = Some(thread.spawn(serve).map_err(LabError::io("start a thread"))?);
        Ok(TimeServer { network: network.clone(), over, thread })
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(WAIT_MAX))?;
    let mut question = [0; 1];
    loop {
        stream.read_exact(&mut question)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
        let now_ns = i64::try_from(now.as_nanos()).map_err(io::Error::other)?;
        stream.write_all(&now_ns.to_le_bytes())?;
    }
}

impl Drop for TimeServer {
    fn drop(&mut self) {
        self.over.store(true, SeqCst);
        // So that it looks. If nobody can connect, it has ended.
        let _ = self.network.run(|| TcpStream::connect(address()));
        if let Some(thread) = self.thread.take() {
            // A panic of it has been printed.
            let _ = thread.join();
        }
    }
}

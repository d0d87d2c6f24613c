//! Connections of unknown peers that say nothing, as many as a node accepts and more, on both of
//! its ports.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use mcd::control::status::State;

use super::environment::{PRIMARY, run};

/// More on each port than a node holds open on both.
const CONNECTIONS: usize = 40;

#[test]
fn a_secondary_joins_although_silent_connections_fill_both_ports() {
    run("silent_connections::a_secondary_joins_although_silent_connections_fill_both_ports", |host| {
        let primary = host.primary();
        let connect = |port: &str| {
            let stream = TcpStream::connect(port).expect("a connection");
            stream.set_nonblocking(true).expect("an option");
            stream
        };
        let mut silent: Vec<TcpStream> =
            PRIMARY.iter().flat_map(|port| (0..CONNECTIONS).map(|_| connect(port))).collect();
        let protected = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Whatever the primary closes is opened again, so that no timeout clears the ports.
            let protected = &protected;
            scope.spawn(move || {
                for at in (0..silent.len()).cycle() {
                    if protected.load(Relaxed) {
                        return;
                    }
                    // A refusal or the end can be read; silence cannot.
                    let closed = match silent[at].peek(&mut [0]) {
                        Ok(_) => true,
                        Err(error) => error.kind() != ErrorKind::WouldBlock,
                    };
                    if closed {
                        silent[at] = connect(PRIMARY[at / CONNECTIONS]);
                    }
                    if at + 1 == silent.len() {
                        std::thread::park_timeout(Duration::from_millis(20));
                    }
                }
            });
            // Ends the other thread also when the wait below panics.
            let _done = SetOnDrop(protected);
            let _secondary = host.secondary(&[]);
            primary.wait_state(State::Protected);
        });
    });
}

/// Sets a flag when it is dropped.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

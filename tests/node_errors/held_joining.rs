//! An unknown peer that knows the guest's name is welcomed and goes no further: it holds the state
//! `Joining` of the primary.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use mcd::control::status::State;
use mcd::protocol::messages::{Channel, Message};

use super::environment::{PRIMARY, run};
use super::fake::{Peer, hello};
use super::silent_connections::SetOnDrop;

#[test]
fn a_secondary_joins_although_an_unknown_peer_holds_joining() {
    run("held_joining::a_secondary_joins_although_an_unknown_peer_holds_joining", |host| {
        let primary = host.primary();
        let protected = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Given up, it comes again at once, so that no timeout alone lets the secondary in. It
            // never opens its heartbeat connection.
            scope.spawn(|| {
                for instance in 1.. {
                    if protected.load(Relaxed) {
                        return;
                    }
                    let mut unknown_peer = Peer::connect(PRIMARY[0]);
                    unknown_peer.send(&Message::Hello(hello(Channel::Data, instance)));
                    while unknown_peer.read().is_ok() {}
                }
            });
            // Ends the other thread also when the wait below panics.
            let _done = SetOnDrop(&protected);
            let secondary = host.secondary(&[]);
            let status = primary.wait_state(State::Protected);
            assert_eq!(status.peer, Some(secondary.status().instance), "{status}");
            secondary.wait_status("protected", |status| status.protected);
        });
    });
}

//! An unknown peer that knows the guest's name is welcomed and goes no further: it holds the state
//! `Joining` of the primary.

use mcd::control::status::State;
use mcd::protocol::messages::{Channel, Message};

use super::environment::{PRIMARY, run};
use super::fake::{Peer, hello};

#[test]
#[ignore = "needs the new engine"]
fn a_secondary_joins_although_an_unknown_peer_holds_joining() {
    run("held_joining::a_secondary_joins_although_an_unknown_peer_holds_joining", |host| {
        let primary = host.primary();
        let mut unknown_peer = Peer::connect(PRIMARY[0]);
        unknown_peer.send(&Message::Hello(hello(Channel::Data, 1)));
        assert!(matches!(unknown_peer.read(), Ok(Message::Welcome(_))));
        // It never opens its heartbeat connection, and never closes this one.
        let secondary = host.secondary(&[]);
        let status = primary.wait_state(State::Protected);
        assert_eq!(status.peer, Some(secondary.status().instance), "{status}");
        secondary.wait_status("protected", |status| status.protected);
        unknown_peer.is_closed();
    });
}

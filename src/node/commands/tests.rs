//! The command table, without a driver or with one that a test plays.

use std::collections::BTreeSet;

use super::*;
use crate::control::ErrorClass;
use crate::control::status::Role;
use crate::node::arbiter_tests::config;
use crate::node::config::{ArbiterConfig, OnPeerLoss};
use crate::node::inbox::{Inbox, Next, inbox};

fn commands() -> (Arc<Commands>, Inbox) {
    let (sender, inbox) = inbox();
    let config = config(ArbiterConfig::None { on_peer_loss: OnPeerLoss::Wait });
    (Commands::new(StatusStore::new(&config, Role::Primary), sender), inbox)
}

fn arguments(value: &Value) -> Arguments {
    value.as_object().cloned().unwrap()
}

fn error_of(commands: &Commands, command: &str, given: &Value) -> QmpError {
    commands.execute(command, &arguments(given)).unwrap_err()
}

#[test]
fn every_command_is_named_once_and_found() {
    let (commands, inbox) = commands();
    drop(inbox);
    assert_eq!(commands.commands().iter().collect::<BTreeSet<_>>().len(), TABLE.len());
    for name in commands.commands() {
        let answer = commands.execute(name, &Arguments::new());
        assert!(answer.map_or_else(|error| error.class, |_| ErrorClass::GenericError) == ErrorClass::GenericError);
    }
    let error = error_of(&commands, "no-such", &json!({}));
    assert_eq!(
        (error.class, error.desc.as_str()),
        (ErrorClass::CommandNotFound, "The command no-such has not been found")
    );
}

#[test]
fn a_parameter_has_to_be_known_and_of_its_kind() {
    let (commands, _inbox) = commands();
    for (command, given, part) in [
        ("stop", json!({"since": 1}), "stop was given a parameter that it does not have"),
        ("mc-query-epochs", json!({"path": "/a"}), "does not have"),
        ("mc-query-epochs", json!({"since": -1}), "'since' must be a number, 0 or more"),
        ("mc-disk-verify", json!({"disk": ""}), "'disk' must be a disk's number"),
        ("mc-disk-verify", json!({"disk": "x".repeat(21)}), "'disk' must be a disk's number"),
        ("announce-self", json!({"rounds": 1001}), "'rounds' must be a number from 0 to 1000"),
        ("announce-self", json!({"initial": -1}), "'initial' must be milliseconds"),
        ("announce-self", json!({"step": 10_001}), "'step' must be milliseconds, at most 10000"),
        ("announce-self", json!({"max": "1"}), "'max' must be milliseconds"),
        ("mc-snapshot", json!({}), "'path' must be a path that begins at the root"),
        ("mc-snapshot", json!({"path": "a"}), "'path' must be a path"),
        ("mc-snapshot", json!({"path": "/a", "stop": 1}), "'stop' must be true or false"),
        ("mc-query-disk-verify", json!({}), "no disk was verified yet"),
    ] {
        let error = error_of(&commands, command, &given);
        assert!(error.class == ErrorClass::GenericError && error.desc.contains(part), "{command}: {error}");
    }
}

#[test]
fn queries_need_no_driver() {
    let (commands, inbox) = commands();
    drop(inbox);
    let query = |command: &str| commands.execute(command, &Arguments::new()).unwrap();
    assert_eq!(query("query-name"), json!({"name": "web"}));
    assert_eq!(query("mc-query")["guest"], "web");
    assert_eq!(query("query-status")["running"], false);
    assert!(query("mc-query-epochs").is_object());
}

#[test]
fn the_driver_answers_a_command() {
    let (commands, inbox) = commands();
    std::thread::scope(|scope| {
        let client = scope.spawn(|| commands.execute("cont", &Arguments::new()));
        let Next::Event(NodeEvent::Command { command: Command::Cont, reply: Some(reply) }) = inbox.next(None) else {
            panic!("another event");
        };
        reply.send(Err("not now".into())).unwrap();
        assert_eq!(client.join().unwrap(), Err(QmpError::generic("not now")));
    });
}

#[test]
fn a_driver_that_is_gone_or_busy_is_an_error_and_no_wait() {
    let (commands, inbox) = commands();
    let full = loop {
        let (reply, _result) = bounded(1);
        let command = NodeEvent::Command { command: Command::Checkpoint, reply: Some(reply) };
        if let Err(error) = commands.inbox.command(command) {
            break error;
        }
    };
    assert_eq!(full, CommandNotTaken::Full);
    assert!(error_of(&commands, "stop", &json!({})).desc.contains("try again later"));
    drop(inbox);
    assert_eq!(error_of(&commands, "stop", &json!({})).desc, "this node is ending");
    assert_eq!(error_of(&commands, "mc-snapshot", &json!({"path": "/a"})).desc, "this node is ending");
}

#[test]
fn a_quit_that_ends_the_node_needs_no_answer() {
    let (commands, inbox) = commands();
    std::thread::scope(|scope| {
        let client = scope.spawn(|| commands.execute("quit", &Arguments::new()));
        drop(inbox.next(None));
        assert_eq!(client.join().unwrap(), Ok(json!({})));
    });
}

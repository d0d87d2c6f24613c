//! The built-in guest in a machine: boots, and goes on in another machine.

use std::net::Ipv4Addr;

use mcd::machine::{CpuModel, GuestNet, Machine};
use mcd::protocol::guest_event::GuestEvent;
use mcd::protocol::machine_shape::MachineShape;

use crate::support::*;

const MEMORY: u64 = 64 << 20;

fn shape(cpus: u8) -> MachineShape {
    MachineShape::bare(MEMORY, cpus, [2, 0, 0, 0, 0, 9])
}

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

fn net() -> GuestNet {
    GuestNet { ipv4: GUEST, prefix_len: 24, gateway: None }
}

/// An ARP request for the guest's address.
fn who_has_guest() -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1]);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend([2, 0, 0, 0, 0, 1, 10, 9, 0, 1]);
    frame.extend([0; 6]);
    frame.extend(GUEST.octets());
    frame.resize(60, 0);
    frame
}

/// How many ARP replies the guest has sent.
fn arp_replies(wires: &Wires) -> usize {
    wires.sent().iter().filter(|f| f.get(12..14) == Some(&[8, 6]) && f.get(20..22) == Some(&[0, 2])).count()
}

fn build(cpus: u8) -> (Machine, std::sync::Arc<Wires>, Console) {
    let (wires, console) = (Wires::new(), Console::default());
    let machine = Machine::new(&shape(cpus), CpuModel::Host, wires.clone(), Vec::new(), Box::new(console.clone()))
        .expect("machine");
    (machine, wires, console)
}

fn boot(cpus: u8) -> (Machine, std::sync::Arc<Wires>, Console) {
    let (mut machine, wires, console) = build(cpus);
    machine.boot_builtin(&net()).expect("boot");
    machine.resume().expect("resume");
    let event = machine.events().recv_timeout(WAIT_MAX);
    let text = String::from_utf8_lossy(&console.0.lock().expect("console")).into_owned();
    assert_eq!(event, Ok(GuestEvent::Booted), "{text}");
    (machine, wires, console)
}

#[test]
fn the_guest_boots_and_answers() {
    if !have_kvm() {
        return;
    }
    for cpus in [1, 2] {
        let (mut machine, wires, _console) = boot(cpus);
        wires.send(&who_has_guest());
        until("an ARP reply", || arp_replies(&wires) == 1);
        machine.pause().expect("pause");
    }
}

#[test]
fn the_guest_goes_on_in_another_machine() {
    if !have_kvm() {
        return;
    }
    let (mut active, mut wires, _console) = boot(2);
    let (mut other, mut other_wires, _other_console) = build(2);
    let mut state = Vec::new();
    for round in 1..=20usize {
        wires.send(&who_has_guest());
        until("an ARP reply", || arp_replies(&wires) == round.div_ceil(2));
        active.pause().expect("pause");
        state.clear();
        active.save(&mut state).expect("save");
        copy_memory(active.memory(), other.memory());
        other.restore(&state).expect("restore");
        other.resume().expect("resume");
        std::mem::swap(&mut active, &mut other);
        std::mem::swap(&mut wires, &mut other_wires);
    }
    let event = active.events().recv_timeout(std::time::Duration::ZERO);
    assert!(event.is_err(), "{event:?}");
}

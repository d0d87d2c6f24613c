//! What the host lacks: taps, devices, ports.

use std::fs;

use super::environment::{Environment, FAILURE, HOST, Mount, PRIMARY, mount, run};
use super::process::Node;

#[test]
fn a_missing_or_occupied_tap_ends_the_node() {
    run("host::a_missing_or_occupied_tap_ends_the_node", |host| {
        let _first = host.primary();
        let control = format!("--control={}", host.path("other.sock").display());
        let other = host.primary_command(&["--listen=127.0.0.1:7501", &control]);
        Node::start(other).fails(HOST, &["tap tap0 is occupied", "name another tap"]);
        host.secondary(&["--tap=tap0"]).fails(HOST, &["tap tap0 is occupied"]);
        host.secondary(&["--tap=nosuch0"]).fails(HOST, &["there is no tap nosuch0", "ip tuntap add"]);
        host.secondary(&["--tap=lo"]).fails(HOST, &["lo is not a tap"]);
    });
}

/// Everything under /dev that a node uses, but for what is left out.
fn dev_without(host: &Environment, left_out: &str) -> Vec<Mount> {
    let dev = host.path("dev");
    fs::create_dir_all(dev.join("net")).expect("a directory");
    let mut mounts = Vec::new();
    for name in ["null", "kvm", "net/tun"].into_iter().filter(|name| *name != left_out) {
        fs::write(dev.join(name), "").expect("a file");
        mounts.push(Mount::Bind(format!("/dev/{name}").into(), dev.join(name)));
    }
    mounts.push(Mount::Bind(dev, "/dev".into()));
    mounts
}

#[track_caller]
fn lacks(host: &Environment, mounts: &[Mount], parts: &[&str]) {
    for mut node in [host.primary_command(&[]), host.secondary_command(&[])] {
        mount(&mut node.0, mounts, None);
        Node::start(node).fails(HOST, parts);
    }
}

#[test]
fn a_missing_kvm_device_ends_the_node() {
    run("host::a_missing_kvm_device_ends_the_node", |host| {
        lacks(host, &dev_without(host, "kvm"), &["/dev/kvm"]);
    });
}

#[test]
fn another_device_at_the_path_of_kvm_ends_the_node() {
    run("host::another_device_at_the_path_of_kvm_ends_the_node", |host| {
        lacks(host, &[Mount::Bind("/dev/null".into(), "/dev/kvm".into())], &["/dev/kvm"]);
    });
}

#[test]
fn a_missing_tun_device_ends_the_node() {
    run("host::a_missing_tun_device_ends_the_node", |host| {
        lacks(host, &dev_without(host, "net/tun"), &["tap", "/dev/net/tun is missing", "modprobe tun"]);
    });
}

#[test]
fn ports_and_control_sockets_in_use_end_the_node() {
    run("host::ports_and_control_sockets_in_use_end_the_node", |host| {
        let taken = std::net::TcpListener::bind(PRIMARY[1]).expect("a port");
        Node::start(host.primary_command(&[])).fails(FAILURE, &["cannot listen on 127.0.0.1:7402", "in use"]);
        drop(taken);
        let _first = host.primary();
        host.secondary(&[&format!("--control={}", host.path("p.sock").display())])
            .fails(FAILURE, &["control socket", "p.sock", "another process answers there"]);
    });
}

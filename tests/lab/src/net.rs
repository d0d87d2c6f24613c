//! The lab's networks: a namespace with two bridges, which stay when a host is cut off.
//!
//! ```text
//!   clients, arbiter      br0 10.77.0.1/24 ──┬── lan-a ── QEMU a eth0 ── br0 ── mcd0, the guest's tap
//!                                            └── lan-b ── QEMU b eth0 ── br0 ── mcd0
//!   the link              wire ──┬── wire-a ── QEMU a eth1 10.78.0.1/30
//!                                └── wire-b ── QEMU b eth1 10.78.0.2/30
//! ```

use mcd::testbed::namespaces::{CLIENT_IPV4, GUEST_PREFIX_LEN, HostName, Namespace, NamespaceError};

/// A host's address on the clients' network, by which it reaches the arbiter.
pub fn lan_address(host: HostName) -> String {
    format!("10.77.0.{}/{GUEST_PREFIX_LEN}", if host == HostName::A { 11 } else { 12 })
}

/// Makes the networks. They end with the value and the processes in it.
pub fn new() -> Result<Namespace, NamespaceError> {
    let lan = Namespace::new("the lab")?;
    let bridge = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0";
    let mut commands = vec![
        format!("link add br0 {bridge}"),
        format!("link add wire {bridge}"),
        format!("address add {CLIENT_IPV4}/{GUEST_PREFIX_LEN} dev br0"),
        "link set br0 up".to_owned(),
        "link set wire up".to_owned(),
    ];
    for host in [HostName::A, HostName::B] {
        for (kind, bridge) in [("lan", "br0"), ("wire", "wire")] {
            commands.push(format!("tuntap add dev {kind}-{host} mode tap vnet_hdr"));
            commands.push(format!("link set {kind}-{host} master {bridge} up"));
        }
    }
    lan.ip(&commands)?;
    Ok(lan)
}

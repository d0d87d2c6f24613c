//! Partitions of the link between the hosts: made, and healed.

use std::io::{self, Write};
use std::process::Stdio;
use std::time::Duration;

use mcd::testbed::namespaces::{HostName, Namespace, Namespaces, find_tool};

use crate::fault_matrix::{Ports, Way};

/// The port of the data connection on every node; the heartbeat's is the next.
const DATA_PORT: u16 = 7401;

/// What of the link is broken.
#[derive(Clone, Copy, Debug, Default)]
pub struct Partitions {
    rules: bool,
    down: bool,
    slow: bool,
}

impl Partitions {
    /// Drops in silence what comes in at the hosts. `primary` tells which host that is.
    pub fn drop_packets(
        &mut self,
        namespaces: &Namespaces,
        primary: HostName,
        ports: Ports,
        way: Way,
    ) -> io::Result<()> {
        self.rules = true;
        // In the receiver's INPUT chain: a DROP in the sender's OUTPUT would tell the sender.
        if way != Way::ToSecondary {
            filter(namespaces, primary, ports)?;
        }
        if way != Way::ToPrimary {
            filter(namespaces, primary.other(), ports)?;
        }
        Ok(())
    }

    /// Takes the wire's carrier away.
    pub fn link_down(&mut self, namespaces: &Namespaces) -> io::Result<()> {
        self.down = true;
        namespaces.host(HostName::A).ip(&["link set wire down"]).map_err(io::Error::other)
    }

    /// Lets the wire carry only 1 MB/s each way.
    pub fn slow_down(&mut self, namespaces: &Namespaces) -> io::Result<()> {
        self.slow = true;
        for host in [HostName::A, HostName::B] {
            // A queue of a quarter of a second, as a cheap switch has it.
            tc(namespaces, host, "qdisc replace dev wire root tbf rate 8mbit burst 16kb limit 256kb")?;
        }
        Ok(())
    }

    /// Heals everything.
    pub fn heal(&mut self, namespaces: &Namespaces) -> io::Result<()> {
        let Partitions { rules, down, slow } = std::mem::take(self);
        if down {
            namespaces.host(HostName::A).ip(&["link set wire up"]).map_err(io::Error::other)?;
        }
        for host in [HostName::A, HostName::B] {
            if rules {
                restore(namespaces.host(host), "*filter\n-F INPUT\nCOMMIT\n")?;
            }
            if slow {
                speed_up(namespaces, host)?;
            }
        }
        Ok(())
    }
}

fn filter(namespaces: &Namespaces, host: HostName, ports: Ports) -> io::Result<()> {
    let (first, last) = match ports {
        Ports::Data => (DATA_PORT, DATA_PORT),
        Ports::Heartbeat => (DATA_PORT + 1, DATA_PORT + 1),
        Ports::Both => (DATA_PORT, DATA_PORT + 1),
    };
    // Either end may be the one that listens.
    let rule = |side| format!("-A INPUT -i wire -p tcp --{side} {first}:{last} -j DROP\n");
    restore(namespaces.host(host), &format!("*filter\n{}{}COMMIT\n", rule("dport"), rule("sport")))
}

/// Changes all rules of a network at one instant.
pub fn restore(net: &Namespace, rules: &str) -> io::Result<()> {
    feed(net, "iptables-restore", &["--noflush"], rules).map(drop)
}

/// Ends [`Partitions::slow_down`]. A queue that is taken away takes along what waits in it, which
/// would be another fault: the loss of a whole flight, for which TCP waits longer than a heartbeat
/// timeout. So it is emptied first.
fn speed_up(namespaces: &Namespaces, host: HostName) -> io::Result<()> {
    const LOOKS_MAX: u32 = 2_000;
    const LOOK: Duration = Duration::from_millis(1);
    tc(namespaces, host, "qdisc change dev wire root tbf rate 10gbit burst 4mb limit 4mb")?;
    for _ in 0..LOOKS_MAX {
        let shown = tc(namespaces, host, "-s qdisc show dev wire")?;
        if shown.contains(" backlog 0b 0p ") {
            return tc(namespaces, host, "qdisc del dev wire root").map(drop);
        }
        std::thread::sleep(LOOK);
    }
    Err(io::Error::other(format!("the queue of host {host}'s wire never became empty")))
}

fn tc(namespaces: &Namespaces, host: HostName, command: &str) -> io::Result<String> {
    let words: Vec<&str> = command.split(' ').collect();
    feed(namespaces.host(host), "tc", &words, "")
}

/// What a tool says, given `input`.
fn feed(net: &Namespace, tool: &str, arguments: &[&str], input: &str) -> io::Result<String> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, format!("`{tool}` is not installed"));
    let mut command = net.command(find_tool(tool).ok_or_else(missing)?);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // If it is gone already, its words say more than our EPIPE.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{tool} on {}: {}", net.name(), said.trim())))
}

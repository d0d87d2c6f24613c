//! The status of a node: the answer to `mc-query`, for both sides of the socket.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::metrics::Quantiles;
use crate::protocol::pages::PAGE_BYTES;

/// What a node is to its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It runs the guest.
    Primary,
    /// It holds the guest's image, or is getting it.
    Secondary,
    /// It lost the guest to the other node and stays silent.
    Fenced,
}

/// What a node is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Primary: it asks the arbiter for its guest, which does not run yet.
    Starting,
    /// Secondary: looking for its primary.
    Connecting,
    /// Either: the secondary is getting the guest's image and cannot take over yet.
    Resync,
    /// Secondary: it holds a whole committed epoch and can take over.
    Standby,
    /// Primary: a secondary can take over.
    Protected,
    /// Primary: it runs the guest without a copy elsewhere.
    Solo,
    /// Either: the peer is silent or gone, the arbiter is being asked.
    Suspecting,
    /// Secondary: it won and is bringing the guest to life.
    Takeover,
    /// It lost the guest to the other node.
    Fenced,
}

macro_rules! display_as_serialized {
    ($name:ident { $($variant:ident = $text:literal),* $(,)? }) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $($name::$variant => $text),* })
            }
        }
    };
}

display_as_serialized!(Role { Primary = "primary", Secondary = "secondary", Fenced = "fenced" });
display_as_serialized!(State {
    Starting = "starting",
    Connecting = "connecting",
    Resync = "resync",
    Standby = "standby",
    Protected = "protected",
    Solo = "solo",
    Suspecting = "suspecting",
    Takeover = "takeover",
    Fenced = "fenced",
});

/// The arbiter as a node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArbiterStatus {
    /// `file`, `etcd`, `command` or `none`.
    pub kind: String,
    /// Whether it answered when it was last asked.
    pub reachable: bool,
    /// Which one it is, or what is wrong with it.
    pub detail: String,
}

/// How many epochs there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochCounts {
    /// Epochs the secondary has acknowledged.
    pub committed: u64,
    /// Epochs that were captured and never committed.
    pub aborted: u64,
}

/// How far a resync is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResyncProgress {
    /// Pages of the guest, with the blocks of its disks.
    pub pages_total: u64,
    /// Those the newcomer does not have yet.
    pub pages_left: u64,
    /// The same in bytes, of memory and of each disk.
    #[serde(default)]
    pub parts: Vec<ResyncPart>,
    /// Bytes in a second over the last seconds.
    #[serde(default)]
    pub rate_bytes_s: Option<u64>,
    /// How long the rest will take at that rate, in seconds.
    #[serde(default)]
    pub left_s: Option<f64>,
}

/// A part of a resync.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncPart {
    /// `memory`, or `disk` and its number.
    pub name: String,
    /// Its bytes.
    pub bytes_total: u64,
    /// Those the newcomer does not have yet.
    pub bytes_left: u64,
}

impl ResyncProgress {
    /// The progress of these parts, each with its pages and how many of them are left: memory, then
    /// the disks.
    pub fn of(parts: &[(u64, u64)], rate_bytes_s: Option<u64>) -> ResyncProgress {
        let sum = |of: fn(&(u64, u64)) -> u64| parts.iter().map(of).fold(0, u64::saturating_add);
        let (pages_total, pages_left) = (sum(|part| part.0), sum(|part| part.1));
        let bytes = |pages: u64| pages.saturating_mul(PAGE_BYTES as u64);
        let named = parts.iter().enumerate().map(|(number, (total, left))| ResyncPart {
            name: number.checked_sub(1).map_or_else(|| "memory".into(), |disk| format!("disk {disk}")),
            bytes_total: bytes(*total),
            bytes_left: bytes(*left),
        });
        // A read-only disk has no part in it.
        let parts = named.filter(|part| part.bytes_total > 0).collect();
        let rate = rate_bytes_s.filter(|rate| *rate > 0);
        let left_s = rate.map(|rate| bytes(pages_left) as f64 / rate as f64);
        ResyncProgress { pages_total, pages_left, parts, rate_bytes_s, left_s }
    }
}

/// The stages of a takeover, in milliseconds each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TakeoverReport {
    /// Why: `closed` (the peer's socket) or `silence` (no heartbeat), or a sentence.
    pub cause: String,
    /// From the last sign of life to the suspicion.
    pub detect_ms: f64,
    /// Until the arbiter had decided.
    pub arbitrate_ms: f64,
    /// Until every committed epoch was in the image.
    pub apply_ms: f64,
    /// Until the machine had its state.
    pub restore_ms: f64,
    /// Until the guest ran.
    pub resume_ms: f64,
    /// From the suspicion to the first packet the guest sent; none yet if absent.
    pub first_packet_ms: Option<f64>,
    /// When the suspicion arose, in microseconds of the host's monotonic clock.
    pub started_monotonic_us: u64,
    /// When the first packet left, in microseconds of the host's monotonic clock.
    pub first_packet_monotonic_us: Option<u64>,
    /// How far the guest's clocks were set forward, so that they count the takeover.
    pub clock_forward_ms: f64,
    /// How far they are behind by it instead.
    pub clock_behind_ms: f64,
}

/// The whole answer to `mc-query`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// What the node is to its guest.
    pub role: Role,
    /// What it is doing.
    pub state: State,
    /// Whether the guest would survive the loss of the node that runs it.
    pub protected: bool,
    /// The guest's name.
    pub guest: String,
    /// This node's instance id.
    pub instance: String,
    /// The generation it is in.
    pub generation: u64,
    /// The newest committed epoch of that generation.
    pub epoch: u64,
    /// Whether the guest's vCPUs run here.
    pub running: bool,
    /// The other node's address, if one is connected.
    pub peer: Option<String>,
    /// Where this node listens for a newcomer's data connection.
    pub listen: String,
    /// The arbiter.
    pub arbiter: ArbiterStatus,
    /// The longest an epoch may last, in milliseconds.
    pub interval_ms: u64,
    /// How long captures stopped the guest, in microseconds.
    pub pause_us: Quantiles,
    /// From the start of the pause to the ack, in microseconds.
    pub commit_us: Quantiles,
    /// Dirty pages in an epoch.
    pub dirty_pages: Quantiles,
    /// How long the oldest packet of an epoch was held, in microseconds.
    pub hold_us: Quantiles,
    /// How many epochs there were.
    pub epochs: EpochCounts,
    /// Bytes sent to secondaries.
    pub wire_bytes: u64,
    /// Packets held now.
    pub held_packets: u64,
    /// Bytes held now.
    pub held_bytes: u64,
    /// Frames of the guest that the tap did not take, since the guest runs here.
    #[serde(default)]
    pub lost_frames: u64,
    /// Bytes written to disks that wait for their commit.
    #[serde(default)]
    pub journal_bytes: u64,
    /// How often a write to a disk had to wait because there was no more room for such.
    #[serde(default)]
    pub journal_full_times: u64,
    /// Bytes of writes to shared disks that are held until their epoch is committed and written.
    #[serde(default)]
    pub held_disk_bytes: u64,
    /// How many newcomers this primary turned away.
    #[serde(default)]
    pub refused_newcomers: u64,
    /// Devices of the guest that runs here at which none of its drivers has looked.
    #[serde(default)]
    pub unused_devices: Vec<String>,
    /// How far a resync is, while there is one.
    pub resync: Option<ResyncProgress>,
    /// How this node became primary, if by takeover.
    pub takeover: Option<TakeoverReport>,
    /// What a person should look at, one sentence each.
    pub alarms: Vec<String>,
}

impl NodeStatus {
    /// The answer to `query-status`, in QEMU's shape and words: a secondary is `inmigrate` (it
    /// receives the guest's state), a fenced node `postmigrate` (the guest runs elsewhere).
    pub fn query_status(&self) -> Value {
        let status = match (self.role, self.running) {
            (_, true) => "running",
            (Role::Primary, false) if self.state == State::Starting => "prelaunch",
            (Role::Primary, false) => "paused",
            (Role::Secondary, false) => "inmigrate",
            (Role::Fenced, false) => "postmigrate",
        };
        json!({"running": self.running, "status": status, "singlestep": false})
    }
}

impl fmt::Display for NodeStatus {
    /// The summary `mcd status` prints: one screen, the answer first.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let running = if self.running { "running" } else { "not running" };
        let shield = if self.protected { "protected" } else { "NOT PROTECTED" };
        writeln!(f, "guest       {}: {shield}", self.guest)?;
        writeln!(f, "node        {} ({}), the guest is {running} here", self.role, self.state)?;
        writeln!(f, "instance    {}, listens on {}", self.instance, self.listen)?;
        writeln!(f, "peer        {}", self.peer.as_deref().unwrap_or("none"))?;
        let reach = if self.arbiter.reachable { "reachable" } else { "OUT OF REACH" };
        writeln!(f, "arbiter     {}: {reach} ({})", self.arbiter.kind, self.arbiter.detail)?;
        let epochs = self.epochs;
        writeln!(f, "generation  {}, epoch {}, interval {} ms", self.generation, self.epoch, self.interval_ms)?;
        writeln!(
            f,
            "epochs      {} committed, {} aborted, {} sent",
            epochs.committed,
            epochs.aborted,
            bytes_text(self.wire_bytes)
        )?;
        if epochs.committed > 0 {
            for (name, quantiles, unit) in [
                ("pause", self.pause_us, "µs"),
                ("commit", self.commit_us, "µs"),
                ("hold", self.hold_us, "µs"),
                ("dirty", self.dirty_pages, "pages"),
            ] {
                let Quantiles { p50, p99, max } = quantiles;
                writeln!(f, "  {name:<9} p50 {p50}, p99 {p99}, max {max} {unit}")?;
            }
        }
        writeln!(f, "held output {} packets, {}", self.held_packets, bytes_text(self.held_bytes))?;
        if self.lost_frames > 0 {
            writeln!(f, "lost output {} frames that the tap did not take", self.lost_frames)?;
        }
        if self.journal_bytes > 0 || self.journal_full_times > 0 {
            let bytes = bytes_text(self.journal_bytes);
            writeln!(f, "disk writes {bytes} wait for a commit; {} had to wait for room", self.journal_full_times)?;
        }
        if self.held_disk_bytes > 0 {
            writeln!(f, "held writes {} to shared disks", bytes_text(self.held_disk_bytes))?;
        }
        if !self.unused_devices.is_empty() {
            writeln!(f, "devices     no driver has looked at: {}", self.unused_devices.join(", "))?;
        }
        if let Some(resync) = &self.resync {
            writeln!(f, "resync      {resync}")?;
        }
        if let Some(takeover) = &self.takeover {
            writeln!(f, "takeover    {takeover}")?;
        }
        for alarm in &self.alarms {
            writeln!(f, "ALARM       {alarm}")?;
        }
        Ok(())
    }
}

impl fmt::Display for ResyncProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |done: u64, total: u64| done.saturating_mul(100).checked_div(total).unwrap_or(100);
        let done = self.pages_total.saturating_sub(self.pages_left);
        write!(f, "{done} of {} pages ({} %)", self.pages_total, percent(done, self.pages_total))?;
        if let Some(rate) = self.rate_bytes_s {
            write!(f, ", {} a second", bytes_text(rate))?;
        }
        if let Some(left_s) = self.left_s {
            write!(f, ", {left_s:.0} s left")?;
        }
        for ResyncPart { name, bytes_total, bytes_left } in &self.parts {
            let done = bytes_total.saturating_sub(*bytes_left);
            let (of, percent) = (bytes_text(*bytes_total), percent(done, *bytes_total));
            write!(f, "\n  {name:<9} {} of {of} ({percent} %)", bytes_text(done))?;
        }
        Ok(())
    }
}

impl fmt::Display for TakeoverReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: detect {:.1}, arbitrate {:.1}, apply {:.1}, restore {:.1}, resume {:.1} ms",
            self.cause, self.detect_ms, self.arbitrate_ms, self.apply_ms, self.restore_ms, self.resume_ms
        )?;
        match self.first_packet_ms {
            Some(ms) => write!(f, ", first packet after {ms:.1} ms")?,
            None => write!(f, ", no packet sent yet")?,
        }
        if self.clock_behind_ms > 0.0 {
            write!(f, "; the guest's clock is behind by {:.1} ms", self.clock_behind_ms)?;
        }
        Ok(())
    }
}

fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = "bytes";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "bytes" { format!("{bytes} bytes") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> NodeStatus {
        NodeStatus {
            role: Role::Primary,
            state: State::Resync,
            protected: false,
            guest: "web".into(),
            instance: "0123".into(),
            generation: 3,
            epoch: 17,
            running: true,
            peer: Some("10.0.0.2:4000".into()),
            listen: "0.0.0.0:7401".into(),
            arbiter: ArbiterStatus { kind: "file".into(), reachable: true, detail: "/srv/arbiter".into() },
            interval_ms: 20,
            pause_us: Quantiles { p50: 100, p99: 200, max: 300 },
            commit_us: Quantiles::default(),
            dirty_pages: Quantiles::default(),
            hold_us: Quantiles::default(),
            epochs: EpochCounts { committed: 18, aborted: 1 },
            wire_bytes: 5 << 20,
            held_packets: 2,
            held_bytes: 128,
            lost_frames: 2,
            journal_bytes: 3 << 20,
            journal_full_times: 4,
            resync: Some(ResyncProgress::of(&[(100, 50), (0, 0), (100, 0)], Some(51_200))),
            held_disk_bytes: 4096,
            refused_newcomers: 3,
            unused_devices: vec!["disk 0".into()],
            takeover: Some(TakeoverReport {
                cause: "closed".into(),
                detect_ms: 0.5,
                arbitrate_ms: 1.0,
                apply_ms: 2.0,
                restore_ms: 3.0,
                resume_ms: 0.25,
                first_packet_ms: None,
                started_monotonic_us: 1,
                first_packet_monotonic_us: None,
                clock_forward_ms: 6.75,
                clock_behind_ms: 0.0,
            }),
            alarms: vec!["the arbiter was slow".into()],
        }
    }

    #[test]
    fn a_status_survives_json() {
        let value = serde_json::to_value(status()).unwrap();
        assert_eq!(value["state"], "resync");
        assert_eq!(value["role"], "primary");
        assert_eq!(serde_json::from_value::<NodeStatus>(value).unwrap(), status());
    }

    #[test]
    fn names_are_the_same_for_people_and_programs() {
        for state in [
            State::Starting,
            State::Connecting,
            State::Resync,
            State::Standby,
            State::Protected,
            State::Solo,
            State::Suspecting,
            State::Takeover,
            State::Fenced,
        ] {
            assert_eq!(serde_json::to_value(state).unwrap(), state.to_string());
        }
        for role in [Role::Primary, Role::Secondary, Role::Fenced] {
            assert_eq!(serde_json::to_value(role).unwrap(), role.to_string());
        }
    }

    #[test]
    fn query_status_has_qemus_words() {
        let mut node = status();
        assert_eq!(node.query_status(), json!({"running": true, "status": "running", "singlestep": false}));
        node.running = false;
        for (role, word) in [(Role::Primary, "paused"), (Role::Secondary, "inmigrate"), (Role::Fenced, "postmigrate")] {
            node.role = role;
            assert_eq!(node.query_status()["status"], word);
        }
        (node.role, node.state) = (Role::Primary, State::Starting);
        assert_eq!(node.query_status()["status"], "prelaunch");
    }

    #[test]
    fn the_summary_says_what_matters() {
        let text = status().to_string();
        for part in [
            "web: NOT PROTECTED",
            "p50 100, p99 200, max 300 µs",
            "150 of 200 pages (75 %), 50.0 KiB a second, 4 s left\n",
            "  memory    200.0 KiB of 400.0 KiB (50 %)\n",
            "  disk 1    400.0 KiB of 400.0 KiB (100 %)\n",
            "5.0 MiB",
            "writes 3.0 MiB wait for a commit; 4 had to",
            "ALARM",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }
}

//! What the guest's machine reports of the guest, in words that people read.

use std::fmt;

/// Something that the guest did, or that happened to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GuestEvent {
    /// It is up and serving.
    Booted,
    /// It switched itself off.
    Shutdown,
    /// It asked for a reset, or faulted in a way that resets a CPU.
    Reset,
    /// It panicked.
    Panicked,
    /// A vCPU cannot go on.
    VcpuFailed {
        /// The vCPU.
        cpu: u16,
        /// Why, in words.
        reason: String,
    },
    /// It broke the rules of a device, which does nothing until the guest resets it.
    DeviceBroken {
        /// The device's kind.
        device: &'static str,
        /// How, the last time, in words.
        reason: String,
        /// How often devices of this kind have been broken.
        count: u64,
    },
}

/// A sentence whose subject, the guest, is left out where it can be: it follows "the guest".
impl fmt::Display for GuestEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuestEvent::Booted => write!(f, "is up"),
            GuestEvent::Shutdown => write!(f, "switched itself off"),
            GuestEvent::Reset => write!(f, "asked for a reset"),
            GuestEvent::Panicked => write!(f, "panicked; its console has the reason"),
            GuestEvent::VcpuFailed { cpu, reason } => write!(f, "cannot go on, because vCPU {cpu} failed: {reason}"),
            GuestEvent::DeviceBroken { device, reason, count } => {
                let times = if *count > 1 { format!(", {count} times by now") } else { String::new() };
                write!(f, "broke the rules of device {device}{times}: {reason}; it does nothing until it is reset")
            }
        }
    }
}

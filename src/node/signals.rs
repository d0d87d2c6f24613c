//! SIGINT and SIGTERM: the same as the `quit` command.

use crossbeam::channel::Sender;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::events::NodeEvent;
use crate::protocol::primary::Command;

/// Turns signals into commands from now on. A second one is a second `quit`, which no longer waits
/// for the arbiter.
///
/// # Errors
/// If the handlers or the thread cannot be had.
pub fn listen(events: Sender<NodeEvent>) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    std::thread::Builder::new().name("mcd-signals".into()).spawn(move || {
        for signal in signals.forever() {
            tracing::info!(signal, "asked to end");
            if events.send(NodeEvent::Command { command: Command::Quit, reply: None }).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

//! SIGINT and SIGTERM: the same as the `quit` command.

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::inbox::InboxSender;

/// Turns signals into commands from now on. A second one is a second `quit`, which no longer waits
/// for the arbiter.
///
/// # Errors
/// If the handlers or the thread cannot be had.
pub(crate) fn listen(events: InboxSender) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    std::thread::Builder::new().name("mcd-signals".into()).spawn(move || {
        for signal in signals.forever() {
            tracing::info!(signal, "this node is asked to end");
            events.quit();
        }
    })?;
    Ok(())
}

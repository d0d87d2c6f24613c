//! The log on stderr. No thread of a node waits for whoever reads it: see [`queue`].

mod queue;

use std::io::{self, IsTerminal};
use std::time::Duration;

use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry;
use tracing_subscriber::util::SubscriberInitExt;

use self::queue::LogQueue;
use super::args::{LogArgs, LogFormat};

/// How long the end of the process waits for the last lines to be written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Logging goes on for the life of the process; dropping this waits, not for ever, until what was
/// logged so far is written.
#[must_use]
pub(super) struct LogGuard {
    queue: LogQueue,
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        self.queue.flush(FLUSH_TIMEOUT);
    }
}

/// Starts logging; `level` if the flags name none.
pub(super) fn start(args: &LogArgs, level: Level) -> LogGuard {
    let filter = args.log.as_deref().and_then(|text| text.parse::<Targets>().ok());
    let filter = filter.unwrap_or_else(|| Targets::new().with_default(LevelFilter::from_level(level)));
    let subscriber = registry().with(filter);
    let queue = LogQueue::default();
    let report_dropped =
        |lines| tracing::warn!(lines, "log lines were dropped: stderr was not read as fast as they came");
    let writer = match queue.start_writer(io::stderr(), report_dropped) {
        Ok(()) => BoxMakeWriter::new(queue.clone()),
        // A host without threads for this has none for a node either, which will say so here.
        Err(_) => BoxMakeWriter::new(io::stderr),
    };
    let started = match args.log_format {
        LogFormat::Human => {
            let colors = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            subscriber.with(fmt::layer().with_writer(writer).with_target(false).with_ansi(colors)).try_init()
        }
        LogFormat::Json => subscriber.with(fmt::layer().json().flatten_event(true).with_writer(writer)).try_init(),
    };
    // It fails only if this process logs already, and then there is nothing to do.
    drop(started);
    LogGuard { queue }
}

//! The log on stderr.

use std::io::{self, IsTerminal};

use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry;
use tracing_subscriber::util::SubscriberInitExt;

use super::args::{LogArgs, LogFormat};

/// Starts logging; `level` if the flags name none.
pub(super) fn start(args: &LogArgs, level: Level) {
    let filter = args.log.as_deref().and_then(|text| text.parse::<Targets>().ok());
    let filter = filter.unwrap_or_else(|| Targets::new().with_default(LevelFilter::from_level(level)));
    let subscriber = registry().with(filter);
    let started = match args.log_format {
        LogFormat::Human => {
            let colors = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            subscriber.with(fmt::layer().with_writer(io::stderr).with_target(false).with_ansi(colors)).try_init()
        }
        LogFormat::Json => subscriber.with(fmt::layer().json().flatten_event(true).with_writer(io::stderr)).try_init(),
    };
    // It fails only if this process logs already, and then there is nothing to do.
    drop(started);
}

//! `mcd console`: a guest's serial console on this terminal.

use std::io::{self, Write};

use super::args::ConsoleArgs;
use super::config::{console_beside, default_control};
use super::exit::Failure;
use crate::control::console::client::{VisitEnd, visit};

/// Joins the console until the person leaves or the node ends.
pub(super) fn run(args: &ConsoleArgs) -> Result<(), Failure> {
    let path = match (&args.socket, &args.guest) {
        (Some(path), _) => path.clone(),
        (None, Some(guest)) => console_beside(&default_control(guest)?),
        (None, None) => return Err(Failure::usage("whose console? give --guest NAME or --socket PATH; see --help")),
    };
    let end = visit(&path).map_err(|error| {
        let why = match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                "no node has its console there; start it with --console socket".to_owned()
            }
            _ => error.to_string(),
        };
        Failure::run(format!("console {}: {why}", path.display()))
    })?;
    let words = match end {
        VisitEnd::Left => "left the console; the guest goes on",
        VisitEnd::Closed => "the node closed the console: it ended, or too many are connected",
    };
    // Nobody is left to tell if this fails.
    let _ = writeln!(io::stderr(), "\n[mcd: {words}]");
    Ok(())
}

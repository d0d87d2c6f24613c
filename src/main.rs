//! `mcd`: arguments in, exit code out. Everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    mcd::cli::main(&std::env::args_os().collect::<Vec<_>>())
}

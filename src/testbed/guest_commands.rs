//! Single commands to the guest, on connections of their own, outside the load and its model.

use std::io;
use std::time::Duration;

use super::client::Dial;
use super::guest_client::GuestClient;

fn ask_once(dial: &Dial, command: &str) -> io::Result<String> {
    const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
    GuestClient::over(dial()?, ANSWER_TIMEOUT)?.ask(command)
}

/// Whether the guest answers a PING.
pub fn answers_ping(dial: &Dial) -> bool {
    ask_once(dial, "PING").is_ok_and(|answer| answer == "+PONG")
}

/// Makes the guest write `per_second` pages per second, over and over the same `pages`.
///
/// # Errors
/// If the guest is out of reach, or refuses.
pub fn start_dirty_load(dial: &Dial, pages: u32, per_second: u32) -> io::Result<()> {
    let answer = ask_once(dial, &format!("DIRTY {pages} {per_second}"))?;
    match answer.strip_prefix('-') {
        Some(error) => Err(io::Error::other(error.to_owned())),
        None => Ok(()),
    }
}

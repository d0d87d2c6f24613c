//! Single questions to the guest, outside the load and its model.

use std::io::{self, Read, Write};
use std::time::Duration;

use super::client::Dial;
use super::resp::{Parser, Reply, encode};

/// One command on a connection of its own, outside the model.
fn ask_once(dial: &Dial, words: &[&str]) -> io::Result<Reply> {
    let mut stream = dial()?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut out = Vec::new();
    encode(&mut out, words);
    stream.write_all(&out)?;
    let (mut parser, mut buffer) = (Parser::default(), [0; 4096]);
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        parser.feed(buffer.get(..count).unwrap_or_default());
        if let Some(reply) = parser.next_reply().map_err(io::Error::other)? {
            return Ok(reply);
        }
    }
}

/// Whether the guest answers a PING.
pub fn answers_ping(dial: &Dial) -> bool {
    ask_once(dial, &["PING"]).is_ok_and(|reply| reply == Reply::Simple(b"PONG".to_vec()))
}

/// Makes the guest write `per_second` pages per second, over and over the same `pages`.
pub fn ask_dirty(dial: &Dial, pages: u32, per_second: u32) -> io::Result<()> {
    match ask_once(dial, &["DIRTY", &pages.to_string(), &per_second.to_string()])? {
        Reply::Error(text) => Err(io::Error::other(String::from_utf8_lossy(&text).into_owned())),
        _ => Ok(()),
    }
}

//! A record as text, one field a line, the last line a check sum over the lines before it:
//!
//! ```text
//! mcd-record 1
//! guest web-1
//! generation 8
//! state paired
//! owner 000102030405060708090a0b0c0d0e0f
//! peer f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff
//! crc32c 1a2b3c4d
//! ```
//!
//! A record has exactly one text, so whatever differs from it by a single byte is damaged.

use crate::protocol::record::{Record, RecordState};
use crate::protocol::types::{Generation, GuestName, InstanceId};

/// More bytes than any record's text has.
pub(super) const TEXT_BYTES_MAX: usize = 1024;

/// The first line: what the file is, and the version of its format.
const FIRST_LINE: &str = "mcd-record 1";

const STATES: [(&str, RecordState); 3] =
    [("paired", RecordState::Paired), ("solo", RecordState::Solo), ("stopped", RecordState::Stopped)];

/// Written in the place of a peer where there is none.
const NO_PEER: &str = "none";

/// The text of `record`.
pub(super) fn write(guest: &GuestName, record: &Record) -> String {
    let state = STATES.iter().find(|(_, state)| *state == record.state).map_or("", |(name, _)| name);
    let peer = record.peer.map_or_else(|| NO_PEER.to_owned(), |peer| peer.to_string());
    let body = format!(
        "{FIRST_LINE}\nguest {guest}\ngeneration {}\nstate {state}\nowner {}\npeer {peer}\n",
        record.generation.0, record.owner
    );
    let sum = crc32c::crc32c(body.as_bytes());
    format!("{body}crc32c {sum:08x}\n")
}

/// The record of `guest` in `bytes`, or what is wrong with them.
pub(super) fn read(guest: &GuestName, bytes: &[u8]) -> Result<Record, &'static str> {
    if bytes.is_empty() {
        return Err("it is empty");
    }
    if bytes.len() > TEXT_BYTES_MAX {
        return Err("it is too long");
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not text")?;
    let mut lines = text.lines();
    match lines.next() {
        Some(FIRST_LINE) => {}
        Some(other) if other.starts_with("mcd-record ") => return Err("it has another version of the format"),
        _ => return Err("it does not begin as a record does"),
    }
    let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
    let named = field("guest").ok_or("it does not say whose it is")?;
    let generation = field("generation").and_then(|text| text.parse().ok()).ok_or("its generation makes no sense")?;
    let state = field("state").and_then(state_of).ok_or("its state makes no sense")?;
    let owner = field("owner").and_then(InstanceId::parse).ok_or("its owner makes no sense")?;
    let peer = field("peer").and_then(peer_of).ok_or("its peer makes no sense")?;
    field("crc32c").ok_or("it has no check sum")?;
    if named != guest.as_str() {
        return Err("it is another guest's");
    }
    if peer.is_some() != (state == RecordState::Paired) {
        return Err("its peer does not go with its state");
    }
    let record = Record { generation: Generation(generation), state, owner, peer };
    // The one right text of this record; this checks the sum and all that the lines above let pass.
    if write(guest, &record) == text { Ok(record) } else { Err("its check sum is wrong") }
}

fn state_of(text: &str) -> Option<RecordState> {
    STATES.iter().find(|(name, _)| *name == text).map(|(_, state)| *state)
}

fn peer_of(text: &str) -> Option<Option<InstanceId>> {
    if text == NO_PEER { Some(None) } else { InstanceId::parse(text).map(Some) }
}

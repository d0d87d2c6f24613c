//! Reading commands: RESP arrays of bulk strings, and inline commands as a person types them.
//!
//! The parser keeps its place in a command that has arrived in part, so that a large one is looked
//! at once, not once per packet.

use alloc::vec::Vec;

use crate::bytes::{OutOfMemory, push};

/// Longest bulk string of a command, in bytes.
pub const BULK_BYTES_MAX: usize = 1 << 20;
/// Most arguments of a command, its name included.
pub const ARGUMENTS_MAX: usize = 16_384;
/// Longest header line of an array or a bulk string: a number needs no more.
const HEADER_BYTES_MAX: usize = 32;
/// Longest inline command, in bytes.
pub const LINE_BYTES_MAX: usize = 64 << 10;
/// Longest command, in bytes.
pub const COMMAND_BYTES_MAX: usize = 4 << 20;

/// Why a client cannot be understood. The connection ends after saying so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// The number behind `*` is no number or out of range.
    ArrayLength,
    /// An array's element does not start with `$`, but with this.
    ExpectedBulk(u8),
    /// The number behind `$` is no number or out of range.
    BulkLength,
    /// A bulk string is not followed by CR LF.
    BulkEnd,
    /// A header line does not end.
    LineLength,
    /// An inline command has an open quote.
    Quotes,
    /// The whole command is longer than [`COMMAND_BYTES_MAX`].
    CommandLength,
    /// There is not enough memory to read the command.
    Memory,
}

impl From<OutOfMemory> for ProtocolError {
    fn from(_: OutOfMemory) -> ProtocolError {
        ProtocolError::Memory
    }
}

impl ProtocolError {
    /// The error as the client reads it, without a marker for [`ProtocolError::ExpectedBulk`]'s
    /// byte.
    pub fn text(self) -> &'static str {
        match self {
            ProtocolError::ArrayLength => "ERR Protocol error: invalid multibulk length",
            ProtocolError::ExpectedBulk(_) => "ERR Protocol error: expected '$'",
            ProtocolError::BulkLength => "ERR Protocol error: invalid bulk length",
            ProtocolError::BulkEnd => "ERR Protocol error: bulk string is not followed by CR LF",
            ProtocolError::LineLength => "ERR Protocol error: too big inline request",
            ProtocolError::Quotes => "ERR Protocol error: unbalanced quotes in request",
            ProtocolError::CommandLength => "ERR Protocol error: too big command",
            ProtocolError::Memory => "OOM command not allowed: not enough memory to read it",
        }
    }
}

/// What a look at the input gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The command is not complete.
    NeedMore,
    /// One command is complete: its arguments are at hand, and it was so many bytes long. It may
    /// have no argument at all.
    Ready(usize),
}

#[derive(Clone, Copy)]
struct Span {
    start: usize,
    bytes: usize,
}

/// Reads one command after the other from a buffer that grows at its end.
#[derive(Default)]
pub struct Parser {
    /// Bytes of the current command that are understood.
    at: usize,
    /// Bulk strings still to come; `None` before the array's header.
    bulks_left: Option<usize>,
    /// Length of the bulk string whose header is read.
    bulk_bytes: Option<usize>,
    /// Where a search for a line's end goes on.
    line_scanned: usize,
    arguments: Vec<Span>,
    /// Arguments of an inline command, unquoted; empty for an array.
    unquoted: Vec<u8>,
    inline: bool,
}

impl Parser {
    /// A parser at the start of a command.
    pub fn new() -> Parser {
        Parser::default()
    }

    /// Looks at `input`, which begins where the current command began. After [`Progress::Ready`],
    /// use [`Parser::argument`], then [`Parser::next_command`], and leave the command's bytes out
    /// of the next `input`. Until then it gives the same again.
    ///
    /// # Errors
    /// [`ProtocolError`] if the client cannot be understood; the parser is of no use then.
    pub fn advance(&mut self, input: &[u8]) -> Result<Progress, ProtocolError> {
        if self.bulks_left.is_none() {
            match input.first() {
                None => return Ok(Progress::NeedMore),
                Some(b'*') => {
                    let Some(line) = self.line(input)? else { return Ok(Progress::NeedMore) };
                    let count = number(line).ok_or(ProtocolError::ArrayLength)?;
                    if count > ARGUMENTS_MAX as i64 {
                        return Err(ProtocolError::ArrayLength);
                    }
                    // An array of no elements, or of less than none, is no command.
                    self.bulks_left = Some(usize::try_from(count).unwrap_or(0));
                }
                Some(_) => return self.advance_inline(input),
            }
        }
        while let Some(left @ 1..) = self.bulks_left {
            if !self.advance_bulk(input)? {
                return Ok(Progress::NeedMore);
            }
            self.bulks_left = Some(left - 1);
        }
        Ok(Progress::Ready(self.at))
    }

    /// How many arguments the complete command has, its name included.
    pub fn argument_count(&self) -> usize {
        self.arguments.len()
    }

    /// Argument `index` of the complete command in `input`, empty if there is none.
    pub fn argument<'a>(&'a self, index: usize, input: &'a [u8]) -> &'a [u8] {
        let source = if self.inline { &self.unquoted } else { input };
        self.arguments.get(index).and_then(|span| source.get(span.start..span.start + span.bytes)).unwrap_or(&[])
    }

    /// Gets ready for the next command.
    pub fn next_command(&mut self) {
        self.at = 0;
        self.bulks_left = None;
        self.bulk_bytes = None;
        self.line_scanned = 0;
        self.inline = false;
        self.arguments.clear();
        self.unquoted.clear();
        // One command with thousands of arguments is no reason to keep so much.
        self.arguments.shrink_to(64);
        self.unquoted.shrink_to(1024);
    }

    /// Reads one bulk string. False if more input is needed.
    fn advance_bulk(&mut self, input: &[u8]) -> Result<bool, ProtocolError> {
        let bytes = match self.bulk_bytes {
            Some(bytes) => bytes,
            None => {
                match input.get(self.at) {
                    None => return Ok(false),
                    Some(b'$') => {}
                    Some(other) => return Err(ProtocolError::ExpectedBulk(*other)),
                }
                let Some(line) = self.line(input)? else { return Ok(false) };
                let bytes = number(line)
                    .and_then(|n| usize::try_from(n).ok())
                    .filter(|n| *n <= BULK_BYTES_MAX)
                    .ok_or(ProtocolError::BulkLength)?;
                if self.at + bytes > COMMAND_BYTES_MAX {
                    return Err(ProtocolError::CommandLength);
                }
                self.bulk_bytes = Some(bytes);
                bytes
            }
        };
        let end = self.at + bytes;
        match input.get(end..end + 2) {
            None => return Ok(false),
            Some(b"\r\n") => {}
            Some(_) => return Err(ProtocolError::BulkEnd),
        }
        push(&mut self.arguments, Span { start: self.at, bytes })?;
        self.at = end + 2;
        self.line_scanned = self.at;
        self.bulk_bytes = None;
        Ok(true)
    }

    /// The line at `self.at` without its first byte and its CR LF; moves behind it.
    fn line<'a>(&mut self, input: &'a [u8]) -> Result<Option<&'a [u8]>, ProtocolError> {
        let from = self.line_scanned.max(self.at);
        let Some(length) = input.get(from..).and_then(|rest| rest.iter().position(|byte| *byte == b'\n')) else {
            self.line_scanned = input.len();
            let unended = input.len().saturating_sub(self.at) > HEADER_BYTES_MAX;
            return if unended { Err(ProtocolError::LineLength) } else { Ok(None) };
        };
        let end = from + length;
        if end - self.at > HEADER_BYTES_MAX {
            return Err(ProtocolError::LineLength);
        }
        let line = input.get(self.at + 1..end).unwrap_or(&[]);
        self.at = end + 1;
        self.line_scanned = self.at;
        Ok(Some(line.strip_suffix(b"\r").unwrap_or(line)))
    }

    fn advance_inline(&mut self, input: &[u8]) -> Result<Progress, ProtocolError> {
        let from = self.line_scanned;
        let Some(length) = input.get(from..).and_then(|rest| rest.iter().position(|byte| *byte == b'\n')) else {
            self.line_scanned = input.len();
            return if input.len() > LINE_BYTES_MAX { Err(ProtocolError::LineLength) } else { Ok(Progress::NeedMore) };
        };
        let end = from + length;
        if end > LINE_BYTES_MAX {
            return Err(ProtocolError::LineLength);
        }
        let line = input.get(..end).unwrap_or(&[]);
        self.inline = true;
        self.split_line(line.strip_suffix(b"\r").unwrap_or(line))?;
        self.at = end + 1;
        self.bulks_left = Some(0);
        Ok(Progress::Ready(self.at))
    }

    /// Splits an inline command at spaces; "double" quotes know escapes, 'single' ones only \'.
    fn split_line(&mut self, line: &[u8]) -> Result<(), ProtocolError> {
        self.unquoted.try_reserve(line.len()).map_err(|_| ProtocolError::Memory)?;
        let mut rest = line;
        loop {
            while let [first, tail @ ..] = rest
                && first.is_ascii_whitespace()
            {
                rest = tail;
            }
            if rest.is_empty() {
                return Ok(());
            }
            let start = self.unquoted.len();
            rest = self.split_argument(rest)?;
            push(&mut self.arguments, Span { start, bytes: self.unquoted.len() - start })?;
            if self.arguments.len() > ARGUMENTS_MAX {
                return Err(ProtocolError::ArrayLength);
            }
        }
    }

    /// Unquotes one argument at the start of `rest`; gives what follows it.
    fn split_argument<'a>(&mut self, mut rest: &'a [u8]) -> Result<&'a [u8], ProtocolError> {
        let mut quote = None;
        loop {
            let (byte, tail): (u8, &[u8]) = match (quote, rest) {
                (None, []) => return Ok(rest),
                (Some(_), []) => return Err(ProtocolError::Quotes),
                (None, [first, ..]) if first.is_ascii_whitespace() => return Ok(rest),
                (None, [first @ (b'"' | b'\''), tail @ ..]) => {
                    quote = Some(*first);
                    rest = tail;
                    continue;
                }
                (Some(open), [first, tail @ ..]) if open == *first => {
                    // A closing quote ends the argument.
                    return match tail {
                        [next, ..] if !next.is_ascii_whitespace() => Err(ProtocolError::Quotes),
                        _ => Ok(tail),
                    };
                }
                (Some(b'"'), [b'\\', b'x', high, low, tail @ ..])
                    if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
                {
                    (hex(*high) << 4 | hex(*low), tail)
                }
                (Some(b'"'), [b'\\', escaped, tail @ ..]) => (unescape(*escaped), tail),
                (Some(b'\''), [b'\\', b'\'', tail @ ..]) => (b'\'', tail),
                (_, [first, tail @ ..]) => (*first, tail),
            };
            push(&mut self.unquoted, byte)?;
            rest = tail;
        }
    }
}

fn unescape(byte: u8) -> u8 {
    match byte {
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'b' => 8,
        b'a' => 7,
        other => other,
    }
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => digit.wrapping_sub(b'A').wrapping_add(10) & 15,
    }
}

/// A header's number. Redis takes leading zeros here, so we do.
fn number(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, text),
    };
    if digits.is_empty() || digits.len() > 18 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let value = digits.iter().fold(0i64, |value, digit| value * 10 + i64::from(digit - b'0'));
    Some(if negative { -value } else { value })
}

#[cfg(test)]
#[path = "resp_tests.rs"]
mod tests;

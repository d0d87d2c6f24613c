//! Writing replies, in RESP2 or RESP3.

use alloc::vec::Vec;

use crate::bytes::{Decimal, append};

/// The dialect a client asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dialect {
    /// RESP2: what every client speaks.
    #[default]
    Resp2,
    /// RESP3: nulls and maps of their own, after `HELLO 3`.
    Resp3,
}

/// Appends replies to a buffer.
///
/// If memory runs out the buffer ends in the middle of a reply: [`ReplyWriter::is_broken`] says so,
/// and the connection cannot go on.
pub struct ReplyWriter<'a> {
    out: &'a mut Vec<u8>,
    dialect: Dialect,
    broken: bool,
}

impl<'a> ReplyWriter<'a> {
    /// A writer that appends to `out`.
    pub fn new(out: &'a mut Vec<u8>, dialect: Dialect) -> ReplyWriter<'a> {
        ReplyWriter { out, dialect, broken: false }
    }

    /// Whether a reply is incomplete for want of memory.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Changes the dialect of what follows.
    pub fn set_dialect(&mut self, dialect: Dialect) {
        self.dialect = dialect;
    }

    /// `+text`
    pub fn simple(&mut self, text: &str) {
        self.parts(&[b"+", text.as_bytes(), b"\r\n"]);
    }

    /// `+OK`
    pub fn ok(&mut self) {
        self.simple("OK");
    }

    /// `-text`; a line break in it becomes a space.
    pub fn error(&mut self, text: &str) {
        self.error_parts(&[text.as_bytes()]);
    }

    /// An error put together from parts, which may quote what the client sent.
    pub fn error_parts(&mut self, parts: &[&[u8]]) {
        self.parts(&[b"-"]);
        for part in parts {
            let start = self.out.len();
            self.parts(&[part]);
            for byte in self.out.iter_mut().skip(start) {
                if *byte < b' ' {
                    *byte = b' ';
                }
            }
        }
        self.parts(&[b"\r\n"]);
    }

    /// `:value`
    pub fn integer(&mut self, value: i64) {
        self.parts(&[b":", Decimal::new(value).as_bytes(), b"\r\n"]);
    }

    /// `:value`, at most the largest integer.
    pub fn count(&mut self, value: u64) {
        self.integer(i64::try_from(value).unwrap_or(i64::MAX));
    }

    /// A bulk string.
    pub fn bulk(&mut self, bytes: &[u8]) {
        self.header(b"$", bytes.len());
        self.parts(&[bytes, b"\r\n"]);
    }

    /// The value that is not there.
    pub fn null(&mut self) {
        match self.dialect {
            Dialect::Resp2 => self.parts(&[b"$-1\r\n"]),
            Dialect::Resp3 => self.parts(&[b"_\r\n"]),
        }
    }

    /// The start of an array; `count` replies follow.
    pub fn array(&mut self, count: usize) {
        self.header(b"*", count);
    }

    /// The start of a map; `pairs` times a key and a value follow.
    pub fn map(&mut self, pairs: usize) {
        match self.dialect {
            Dialect::Resp2 => self.header(b"*", pairs * 2),
            Dialect::Resp3 => self.header(b"%", pairs),
        }
    }

    fn header(&mut self, kind: &[u8], count: usize) {
        self.parts(&[kind, Decimal::new(count as i64).as_bytes(), b"\r\n"]);
    }

    fn parts(&mut self, parts: &[&[u8]]) {
        for part in parts {
            if !self.broken && append(self.out, part).is_err() {
                self.broken = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(dialect: Dialect, write: impl FnOnce(&mut ReplyWriter)) -> String {
        let mut out = Vec::new();
        write(&mut ReplyWriter::new(&mut out, dialect));
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn replies_have_their_forms() {
        let text = written(Dialect::Resp2, |reply| {
            reply.ok();
            reply.integer(-5);
            reply.bulk(b"a\r\nb");
            reply.null();
            reply.map(1);
            reply.error_parts(&[b"ERR unknown '", b"a\r\nb", b"'"]);
        });
        assert_eq!(text, "+OK\r\n:-5\r\n$4\r\na\r\nb\r\n$-1\r\n*2\r\n-ERR unknown 'a  b'\r\n");
        let text = written(Dialect::Resp3, |reply| {
            reply.null();
            reply.map(1);
        });
        assert_eq!(text, "_\r\n%1\r\n");
    }
}

//! The client's side of RESP, the protocol of the guest's key-value server: commands out, replies
//! in.

use std::fmt;

/// Longest string in a reply that is taken, in bytes: far above anything the load asks for.
const BULK_BYTES_MAX: usize = 1 << 20;
/// Longest line of a reply, in bytes.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Most elements of an array.
const ARRAY_LEN_MAX: usize = 4096;
/// Deepest nesting of arrays.
const DEPTH_MAX: usize = 4;

/// One reply.
#[derive(Clone, PartialEq, Eq)]
pub enum Reply {
    /// `+OK`
    Simple(Vec<u8>),
    /// `-ERR …`
    Error(Vec<u8>),
    /// `:1`
    Integer(i64),
    /// A string, or nil.
    Bulk(Option<Vec<u8>>),
    /// Several replies.
    Array(Vec<Reply>),
}

impl Reply {
    /// `+OK`
    pub fn ok() -> Reply {
        Reply::Simple(b"OK".to_vec())
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reply::Simple(text) => write!(f, "+{}", Excerpt(text)),
            Reply::Error(text) => write!(f, "-{}", Excerpt(text)),
            Reply::Integer(number) => write!(f, ":{number}"),
            Reply::Bulk(None) => f.write_str("nil"),
            Reply::Bulk(Some(text)) => write!(f, "\"{}\"", Excerpt(text)),
            Reply::Array(items) => f.debug_list().entries(items).finish(),
        }
    }
}

/// Bytes as a person can read them, cut where they get long.
pub struct Excerpt<'a>(pub &'a [u8]);

impl fmt::Display for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const BYTES_MAX: usize = 60;
        match self.0.get(..BYTES_MAX) {
            Some(head) if self.0.len() > BYTES_MAX => {
                write!(f, "{}… ({} bytes)", head.escape_ascii(), self.0.len())
            }
            _ => write!(f, "{}", self.0.escape_ascii()),
        }
    }
}

/// The other side does not speak RESP.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a RESP reply: {0}")]
pub struct NotResp(String);

fn not_resp(what: impl Into<String>) -> NotResp {
    NotResp(what.into())
}

/// Appends a command to `out`.
pub fn encode(out: &mut Vec<u8>, words: &[impl AsRef<[u8]>]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words.iter().map(AsRef::as_ref) {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

/// Collects received bytes and takes whole replies out of them.
#[derive(Debug, Default)]
pub struct Parser {
    bytes: Vec<u8>,
    taken: usize,
}

impl Parser {
    /// Adds what was received.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.taken);
        self.taken = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next reply, or `None` while it is not whole yet.
    pub fn next_reply(&mut self) -> Result<Option<Reply>, NotResp> {
        let mut cursor = Cursor { bytes: self.bytes.get(self.taken..).unwrap_or_default() };
        let before = cursor.bytes.len();
        let reply = cursor.reply(0)?;
        if reply.is_some() {
            self.taken += before - cursor.bytes.len();
        }
        Ok(reply)
    }

    /// What was received and not taken.
    pub fn rest(&self) -> &[u8] {
        self.bytes.get(self.taken..).unwrap_or_default()
    }
}

struct Cursor<'a> {
    bytes: &'a [u8],
}

impl Cursor<'_> {
    fn line(&mut self) -> Result<Option<&[u8]>, NotResp> {
        match self.bytes.windows(2).position(|pair| pair == b"\r\n") {
            Some(end) if end <= LINE_BYTES_MAX => {
                let (line, rest) = self.bytes.split_at(end);
                self.bytes = rest.get(2..).unwrap_or_default();
                Ok(Some(line))
            }
            None if self.bytes.len() <= LINE_BYTES_MAX => Ok(None),
            _ => Err(not_resp(format!("a line of more than {LINE_BYTES_MAX} bytes"))),
        }
    }

    fn reply(&mut self, depth: usize) -> Result<Option<Reply>, NotResp> {
        let Some(line) = self.line()? else { return Ok(None) };
        let Some((&kind, text)) = line.split_first() else { return Err(not_resp("an empty line")) };
        match kind {
            b'+' => Ok(Some(Reply::Simple(text.to_vec()))),
            b'-' => Ok(Some(Reply::Error(text.to_vec()))),
            b':' => Ok(Some(Reply::Integer(integer(text)?))),
            b'$' => {
                let len = integer(text)?;
                self.bulk(len)
            }
            b'*' => {
                let len = integer(text)?;
                self.array(len, depth)
            }
            _ => Err(not_resp(format!("it begins with \"{}\"", Excerpt(line)))),
        }
    }

    fn bulk(&mut self, len: i64) -> Result<Option<Reply>, NotResp> {
        if len == -1 {
            return Ok(Some(Reply::Bulk(None)));
        }
        let len = length(len, BULK_BYTES_MAX)?;
        let Some((text, rest)) = self.bytes.split_at_checked(len) else { return Ok(None) };
        let Some((end, rest)) = rest.split_at_checked(2) else { return Ok(None) };
        if end != b"\r\n" {
            return Err(not_resp(format!("a string of {len} bytes does not end where it should")));
        }
        self.bytes = rest;
        Ok(Some(Reply::Bulk(Some(text.to_vec()))))
    }

    fn array(&mut self, len: i64, depth: usize) -> Result<Option<Reply>, NotResp> {
        if depth >= DEPTH_MAX {
            return Err(not_resp("arrays nested too deep"));
        }
        let mut items = Vec::new();
        for _ in 0..length(len, ARRAY_LEN_MAX)? {
            match self.reply(depth + 1)? {
                Some(item) => items.push(item),
                None => return Ok(None),
            }
        }
        Ok(Some(Reply::Array(items)))
    }
}

fn integer(text: &[u8]) -> Result<i64, NotResp> {
    let number = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    number.ok_or_else(|| not_resp(format!("\"{}\" where a number belongs", Excerpt(text))))
}

fn length(len: i64, max: usize) -> Result<usize, NotResp> {
    match usize::try_from(len) {
        Ok(len) if len <= max => Ok(len),
        _ => Err(not_resp(format!("a length of {len}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] = b"+OK\r\n-ERR no\r\n:-7\r\n$3\r\na\r\n\r\n$-1\r\n*2\r\n$1\r\nx\r\n:1\r\n";

    fn whole() -> Vec<Reply> {
        vec![
            Reply::ok(),
            Reply::Error(b"ERR no".to_vec()),
            Reply::Integer(-7),
            Reply::Bulk(Some(b"a\r\n".to_vec())),
            Reply::Bulk(None),
            Reply::Array(vec![Reply::Bulk(Some(b"x".to_vec())), Reply::Integer(1)]),
        ]
    }

    #[test]
    fn replies_are_taken_whatever_the_cuts() {
        for step in 1..=STREAM.len() {
            let (mut parser, mut replies) = (Parser::default(), Vec::new());
            for piece in STREAM.chunks(step) {
                parser.feed(piece);
                while let Some(reply) = parser.next_reply().unwrap() {
                    replies.push(reply);
                }
            }
            assert_eq!(replies, whole(), "in steps of {step}");
            assert_eq!(parser.rest(), b"");
        }
    }

    #[test]
    fn what_is_no_reply_is_an_error_and_nothing_large_is_believed() {
        for bad in [
            "hello\r\n",
            "\r\n",
            ":x\r\n",
            "$-2\r\n",
            "$99999999999\r\n",
            "*99999\r\n",
            "$1\r\nabc",
            "*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n",
        ] {
            let mut parser = Parser::default();
            parser.feed(bad.as_bytes());
            parser.next_reply().expect_err(bad);
        }
        let mut parser = Parser::default();
        parser.feed(&vec![b'+'; LINE_BYTES_MAX + 1]);
        parser.next_reply().unwrap_err();
    }

    #[test]
    fn commands_are_arrays_of_strings() {
        let mut out = Vec::new();
        encode(&mut out, &["SET", "k", ""]);
        assert_eq!(out, b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$0\r\n\r\n");
    }
}

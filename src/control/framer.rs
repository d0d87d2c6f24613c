//! Cuts a stream of bytes into JSON values, without trusting it.
//!
//! Like QEMU's parser, it does not care for lines: a value may span several, and several may come
//! in one read. Each byte is looked at once. It knows just enough JSON to find where a value ends;
//! whether it is valid is the parser's business.

use super::COMMAND_DEPTH_MAX;

/// What the stream held.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// The bytes of one object or array, braces balanced.
    Value(Vec<u8>),
    /// Something else; the reason. The rest of its line is skipped.
    Bad(BadFrame),
}

/// Why a piece of the stream was thrown away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadFrame {
    #[error("JSON parse error, a command is an object that starts with '{{'; the rest of the line is skipped")]
    Stray,
    #[error("JSON parse error, a string is not closed at the end of its line")]
    OpenString,
    #[error("JSON parse error, the input was reset by byte 0xFF")]
    Reset,
    #[error("JSON nesting limit of {COMMAND_DEPTH_MAX} exceeded; the rest of the line is skipped")]
    TooDeep,
    #[error("JSON size limit of {bytes_max} bytes exceeded; the rest of the line is skipped")]
    TooLarge { bytes_max: usize },
}

/// Where in the stream we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Between,
    Value,
    String,
    Escape,
    SkipLine,
}

/// The scanner: its memory is bounded, whatever comes.
#[derive(Debug)]
pub(super) struct Framer {
    state: State,
    depth: usize,
    value: Vec<u8>,
    bytes_max: usize,
}

impl Framer {
    /// A scanner that keeps no value longer than `bytes_max`.
    pub(super) fn new(bytes_max: usize) -> Framer {
        Framer { state: State::Between, depth: 0, value: Vec::new(), bytes_max }
    }

    /// Takes bytes up to the end of the next frame: how many it took, and the frame if there
    /// is one; with no frame it took them all.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> (usize, Option<Frame>) {
        for (at, &byte) in bytes.iter().enumerate() {
            if let Some(frame) = self.step(byte) {
                return (at + 1, Some(frame));
            }
        }
        (bytes.len(), None)
    }

    fn step(&mut self, byte: u8) -> Option<Frame> {
        // No UTF-8 text holds this byte: clients send it to get rid of whatever half command is on
        // the way.
        if byte == 0xFF {
            return Some(self.bad(BadFrame::Reset, State::Between));
        }
        match self.state {
            State::Between => match byte {
                b' ' | b'\t' | b'\r' | b'\n' => None,
                b'{' | b'[' => {
                    self.state = State::Value;
                    self.open(byte)
                }
                _ => Some(self.bad(BadFrame::Stray, State::SkipLine)),
            },
            State::Value => match byte {
                b'{' | b'[' => self.open(byte),
                b'}' | b']' => self.close(byte),
                b'"' => self.keep(byte, State::String),
                _ => self.keep(byte, State::Value),
            },
            State::String => match byte {
                b'"' => self.keep(byte, State::Value),
                b'\\' => self.keep(byte, State::Escape),
                b'\n' => Some(self.bad(BadFrame::OpenString, State::Between)),
                _ => self.keep(byte, State::String),
            },
            State::Escape => self.keep(byte, State::String),
            State::SkipLine => {
                if byte == b'\n' {
                    self.state = State::Between;
                }
                None
            }
        }
    }

    fn open(&mut self, byte: u8) -> Option<Frame> {
        self.depth += 1;
        if self.depth > COMMAND_DEPTH_MAX {
            return Some(self.bad(BadFrame::TooDeep, State::SkipLine));
        }
        self.keep(byte, State::Value)
    }

    fn close(&mut self, byte: u8) -> Option<Frame> {
        self.depth = self.depth.saturating_sub(1);
        let refused = self.keep(byte, State::Value);
        if refused.is_some() || self.depth > 0 {
            return refused;
        }
        self.state = State::Between;
        Some(Frame::Value(std::mem::take(&mut self.value)))
    }

    fn keep(&mut self, byte: u8, next: State) -> Option<Frame> {
        if self.value.len() >= self.bytes_max {
            return Some(self.bad(BadFrame::TooLarge { bytes_max: self.bytes_max }, State::SkipLine));
        }
        self.value.push(byte);
        self.state = next;
        None
    }

    fn bad(&mut self, reason: BadFrame, next: State) -> Frame {
        self.state = next;
        self.depth = 0;
        self.value = Vec::new();
        Frame::Bad(reason)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::any;

    use super::*;

    const BYTES_MAX: usize = 1 << 20;

    fn frames(input: &[u8]) -> Vec<Frame> {
        let mut framer = Framer::new(BYTES_MAX);
        let mut rest = input;
        let mut found = Vec::new();
        while !rest.is_empty() {
            let (taken, frame) = framer.feed(rest);
            found.extend(frame);
            rest = &rest[taken..];
        }
        found
    }

    fn value(text: &str) -> Frame {
        Frame::Value(text.as_bytes().to_vec())
    }

    #[test]
    fn several_values_in_one_read_and_one_value_in_several() {
        assert_eq!(frames(b"{} [1]\r\n{\"a\":{}}"), [value("{}"), value("[1]"), value("{\"a\":{}}")]);
        let mut framer = Framer::new(BYTES_MAX);
        let text = br#"{"a": "}\"{\\", "b": [{}]}"#;
        for byte in &text[..text.len() - 1] {
            assert_eq!(framer.feed(&[*byte]), (1, None));
        }
        assert_eq!(framer.feed(b"}").1, Some(Frame::Value(text.to_vec())));
    }

    #[test]
    fn after_rubbish_the_next_line_counts() {
        assert_eq!(frames(b"rubbish {}\n{}"), [Frame::Bad(BadFrame::Stray), value("{}")]);
        assert_eq!(frames(b"{\"open\n{}"), [Frame::Bad(BadFrame::OpenString), value("{}")]);
        assert_eq!(frames(b"}{}\n{}"), [Frame::Bad(BadFrame::Stray), value("{}")]);
        assert_eq!(frames(b"{\"half\": \xFF{}"), [Frame::Bad(BadFrame::Reset), value("{}")]);
    }

    #[test]
    fn braces_that_do_not_match_end_the_value_and_are_left_to_the_parser() {
        assert_eq!(frames(b"{]{}"), [value("{]"), value("{}")]);
    }

    #[test]
    fn depth_is_bounded() {
        let deepest = [vec![b'['; COMMAND_DEPTH_MAX], vec![b']'; COMMAND_DEPTH_MAX]].concat();
        assert_eq!(frames(&deepest), [Frame::Value(deepest.clone())]);
        assert!(serde_json::from_slice::<serde_json::Value>(&deepest).is_ok());
        let deeper = [vec![b'['; 100_000], b"\n{}".to_vec()].concat();
        assert_eq!(frames(&deeper), [Frame::Bad(BadFrame::TooDeep), value("{}")]);
    }

    #[test]
    fn size_is_bounded() {
        let mut framer = Framer::new(BYTES_MAX);
        let chunk = vec![b'x'; 1 << 16];
        framer.feed(b"{\"");
        let mut bad = 0;
        for _ in 0..100 {
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                let (taken, frame) = framer.feed(rest);
                bad += usize::from(frame == Some(Frame::Bad(BadFrame::TooLarge { bytes_max: BYTES_MAX })));
                rest = &rest[taken..];
            }
            assert!(framer.value.capacity() <= 2 * BYTES_MAX);
        }
        assert_eq!(bad, 1);
        assert_eq!(framer.feed(b"\n{}").1, Some(value("{}")));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_taken_and_bounded(bytes in vec(any::<u8>(), 0..2000)) {
            let kept: usize = frames(&bytes).iter().map(|f| if let Frame::Value(v) = f { v.len() } else { 0 }).sum();
            proptest::prop_assert!(kept <= bytes.len());
        }
    }
}

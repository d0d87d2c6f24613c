//! Names of 128 bits, drawn at random so that none is given twice: the only kind of name that mcd
//! makes up.

use std::fmt;

/// A name of 128 bits. People read it as 32 hexadecimal digits, the wire and files have it
/// little-endian.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub u128);

impl Id {
    /// Its bytes on the wire and in files.
    pub const BYTES: usize = 16;

    /// Reads the 32 hexadecimal digits that `Display` writes.
    pub fn parse(text: &str) -> Option<Id> {
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        u128::from_str_radix(text, 16).ok().map(Id)
    }

    /// As the wire and files have it.
    pub fn to_bytes(self) -> [u8; Id::BYTES] {
        self.0.to_le_bytes()
    }

    /// The reverse of [`to_bytes`](Id::to_bytes).
    pub fn from_bytes(bytes: [u8; Id::BYTES]) -> Id {
        Id(u128::from_le_bytes(bytes))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Its first eight digits: enough to tell two from each other in a sentence.
impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0 >> 96)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_text_and_bytes() {
        let id = Id(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
        assert_eq!(id.to_string(), "0123456789abcdef0011223344556677");
        assert_eq!(Id::parse(&id.to_string()), Some(id));
        assert_eq!((id.to_bytes()[0], Id::from_bytes(id.to_bytes())), (0x77, id));
        assert_eq!(format!("{id:?}"), "01234567");
        assert_eq!(Id::parse("12"), None);
        assert_eq!(Id::parse(&"g".repeat(32)), None);
        assert_eq!(Id::parse("+1234567890123456789012345678901"), None);
    }
}

//! Byte buffers that say so when memory runs out, where `Vec` would end the guest.

use alloc::boxed::Box;
use alloc::vec::Vec;

/// There is not enough memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory;

/// Appends `bytes` to `to`, or changes nothing.
///
/// # Errors
/// [`OutOfMemory`].
pub fn append(to: &mut Vec<u8>, bytes: &[u8]) -> Result<(), OutOfMemory> {
    to.try_reserve(bytes.len()).map_err(|_| OutOfMemory)?;
    to.extend_from_slice(bytes);
    Ok(())
}

/// Appends `item` to `to`, or changes nothing.
///
/// # Errors
/// [`OutOfMemory`].
pub fn push<T>(to: &mut Vec<T>, item: T) -> Result<(), OutOfMemory> {
    to.try_reserve(1).map_err(|_| OutOfMemory)?;
    to.push(item);
    Ok(())
}

/// A copy of `bytes` of exactly their length.
///
/// # Errors
/// [`OutOfMemory`].
pub fn boxed(bytes: &[u8]) -> Result<Box<[u8]>, OutOfMemory> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(bytes.len()).map_err(|_| OutOfMemory)?;
    copy.extend_from_slice(bytes);
    Ok(copy.into_boxed_slice())
}

/// `count` zero bytes.
///
/// # Errors
/// [`OutOfMemory`].
pub fn zeroed(count: usize) -> Result<Vec<u8>, OutOfMemory> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(count).map_err(|_| OutOfMemory)?;
    bytes.resize(count, 0);
    Ok(bytes)
}

/// `text` as a decimal number the way RESP clients write one: an optional minus, no leading zero,
/// nothing else.
pub fn parse_integer(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, text),
    };
    match digits {
        [b'0'] => return (!negative).then_some(0),
        [b'1'..=b'9', ..] if digits.len() <= 19 => {}
        _ => return None,
    }
    let mut value: i64 = 0;
    for digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        let digit = i64::from(digit - b'0');
        value = value.checked_mul(10)?;
        value = if negative { value.checked_sub(digit)? } else { value.checked_add(digit)? };
    }
    Some(value)
}

/// A decimal number in bytes, without allocation.
#[derive(Clone, Copy)]
pub struct Decimal {
    digits: [u8; 20],
    start: usize,
}

impl Decimal {
    /// `value` in decimal.
    pub fn new(value: i64) -> Decimal {
        let mut decimal = Decimal { digits: [b'0'; 20], start: 20 };
        let mut rest = value.unsigned_abs();
        loop {
            decimal.start -= 1;
            decimal.digits[decimal.start] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        if value < 0 {
            decimal.start -= 1;
            decimal.digits[decimal.start] = b'-';
        }
        decimal
    }

    /// Its digits.
    pub fn as_bytes(&self) -> &[u8] {
        &self.digits[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn integers_are_strict() {
        for (text, value) in
            [("0", 0), ("-1", -1), ("9223372036854775807", i64::MAX), ("-9223372036854775808", i64::MIN)]
        {
            assert_eq!(parse_integer(text.as_bytes()), Some(value));
        }
        for text in ["", "-", "-0", "00", "01", "+1", " 1", "1 ", "1x", "9223372036854775808", "-9223372036854775809"] {
            assert_eq!(parse_integer(text.as_bytes()), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn decimals_are_read_back(value: i64) {
            let decimal = Decimal::new(value);
            prop_assert_eq!(decimal.as_bytes().to_vec(), value.to_string().into_bytes());
            prop_assert_eq!(parse_integer(decimal.as_bytes()), Some(value));
        }

        #[test]
        fn any_text_is_a_number_exactly_if_it_is_printed_so(text in "[-+0-9 x]{0,22}") {
            let expected = text.parse::<i64>().ok().filter(|value| value.to_string() == text);
            prop_assert_eq!(parse_integer(text.as_bytes()), expected);
        }
    }
}

//! The byte form of a chunk of guest pages: records one after another, each
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | page index |
//! | 8 | 1 | kind ([`PageKind`]) |
//! | 9 | 2 | bytes that follow |
//! | 11 | … | the page in its kind's form |
//!
//! A kind that builds on the page as it was (a delta) fits in: [`PageRecord::expand`] is given the
//! page's old content to write over.

use super::error::PageError;
use super::frame::FrameKind;
use crate::protocol::mutant;
use crate::protocol::pages::PAGE_BYTES;
use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

/// Bytes in front of each page's bytes.
pub const RECORD_HEADER_BYTES: usize = 11;

/// Most bytes a record takes.
pub const RECORD_BYTES_MAX: usize = RECORD_HEADER_BYTES + PAGE_BYTES;

/// A compressed page must save at least an eighth, or it goes raw: less is not worth the time to
/// expand it.
const LZ4_BYTES_MAX: usize = PAGE_BYTES - PAGE_BYTES / 8;

/// How a page's bytes are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageKind {
    /// All bytes are zero; none follow.
    Zero = 0,
    /// The bytes as they are.
    Raw = 1,
    /// One lz4 block, without a length in front.
    Lz4 = 2,
}

/// True if every byte of the page is zero.
pub fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    // Word by word inside a cache line, so that the compiler uses wide registers, and out at the
    // first line that is not zero.
    page.as_chunks::<64>().0.iter().all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

/// True if a chunk of `bytes` bytes has room for any further page.
pub fn has_room(bytes: usize) -> bool {
    bytes + RECORD_BYTES_MAX <= FrameKind::Pages.bytes_max()
}

/// Writes pages in the shortest of the forms allowed. Allocates nothing after it was made, beside
/// what the chunk itself needs.
pub struct PageEncoder {
    /// The compressor's table and its output, or none where the peer takes no lz4.
    lz4: Option<(CompressTable, Vec<u8>)>,
}

impl PageEncoder {
    /// An encoder; `lz4` as both nodes agreed in the hello.
    pub fn new(lz4: bool) -> PageEncoder {
        let room = || vec![0; get_maximum_output_size(PAGE_BYTES)];
        PageEncoder { lz4: lz4.then(|| (CompressTable::small(), room())) }
    }

    /// Appends the record of page `index` to `chunk` and returns the form it took. At most
    /// [`RECORD_BYTES_MAX`] bytes are added.
    pub fn encode(&mut self, index: u64, page: &[u8; PAGE_BYTES], chunk: &mut Vec<u8>) -> PageKind {
        let (kind, bytes): (PageKind, &[u8]) = if is_zero(page) {
            if mutant::is("zero-page-skipped") {
                return PageKind::Zero;
            }
            (PageKind::Zero, &[])
        } else if let Some(bytes) = self.compress(page) {
            (PageKind::Lz4, bytes)
        } else {
            (PageKind::Raw, page)
        };
        chunk.extend_from_slice(&index.to_le_bytes());
        chunk.push(kind as u8);
        chunk.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
        chunk.extend_from_slice(bytes);
        kind
    }

    fn compress(&mut self, page: &[u8; PAGE_BYTES]) -> Option<&[u8]> {
        let (table, output) = self.lz4.as_mut()?;
        let length = compress_into_with_table(page, output, table).ok()?;
        output.get(..length).filter(|bytes| bytes.len() <= LZ4_BYTES_MAX)
    }
}

/// Reads the records of a chunk, one by one. After an error there is no more.
#[derive(Clone, Debug)]
pub struct PageDecoder<'a> {
    rest: &'a [u8],
    pages: u64,
}

impl<'a> PageDecoder<'a> {
    /// A decoder over `chunk`, for a guest of `pages` pages.
    pub fn new(chunk: &'a [u8], pages: u64) -> PageDecoder<'a> {
        PageDecoder { rest: chunk, pages }
    }

    fn record(&mut self) -> Result<PageRecord<'a>, PageError> {
        let (head, rest) = self.rest.split_first_chunk::<RECORD_HEADER_BYTES>().ok_or(PageError::Truncated)?;
        let [i0, i1, i2, i3, i4, i5, i6, i7, kind, l0, l1] = *head;
        let index = u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]);
        if index >= self.pages {
            return Err(PageError::OutOfRange { index, pages: self.pages });
        }
        let length = usize::from(u16::from_le_bytes([l0, l1]));
        let content = match (kind, length) {
            (0, 0) => PageKind::Zero,
            (1, PAGE_BYTES) => PageKind::Raw,
            (2, 1..=LZ4_BYTES_MAX) => PageKind::Lz4,
            (0..=2, bytes) => return Err(PageError::BadLength { index, kind, bytes }),
            _ => return Err(PageError::UnknownKind { index, kind }),
        };
        let (bytes, rest) = rest.split_at_checked(length).ok_or(PageError::Truncated)?;
        self.rest = rest;
        Ok(PageRecord { index, kind: content, bytes })
    }
}

impl<'a> Iterator for PageDecoder<'a> {
    type Item = Result<PageRecord<'a>, PageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let record = self.record();
        if record.is_err() {
            self.rest = &[];
        }
        Some(record)
    }
}

/// One page of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRecord<'a> {
    /// The page's index, below the guest's number of pages.
    pub index: u64,
    /// The form of its bytes.
    pub kind: PageKind,
    bytes: &'a [u8],
}

impl<'a> PageRecord<'a> {
    /// The page's bytes without a copy, if they came raw.
    pub fn raw(&self) -> Option<&'a [u8; PAGE_BYTES]> {
        self.bytes.first_chunk().filter(|_| self.kind == PageKind::Raw)
    }

    /// Writes the page over `page`, all of it and nothing more.
    ///
    /// # Errors
    /// [`PageError::BadLz4`] if compressed bytes do not make one whole page; `page` is then spoilt.
    pub fn expand(&self, page: &mut [u8; PAGE_BYTES]) -> Result<(), PageError> {
        match self.kind {
            PageKind::Zero => page.fill(0),
            PageKind::Raw => page.copy_from_slice(self.bytes),
            PageKind::Lz4 => match decompress_into(self.bytes, page) {
                Ok(PAGE_BYTES) => {}
                _ => return Err(PageError::BadLz4 { index: self.index }),
            },
        }
        Ok(())
    }
}

//! The byte form of sums of blocks: the index of the first block (8 bytes), then the sums, 32 bytes each. No sum at all says that the image is not
//! worth a comparison.

use super::error::WireError;
use crate::protocol::sums::{BlockSum, SUM_BLOCKS_MAX, SUM_BYTES};

/// Most bytes of a payload.
pub const BYTES_MAX: usize = 8 + SUM_BLOCKS_MAX as usize * SUM_BYTES;

/// The payload of a frame with the sums of the blocks from `first` on.
pub fn encode_sums(first: u64, sums: &[BlockSum]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(8 + sums.len() * SUM_BYTES);
    payload.extend_from_slice(&first.to_le_bytes());
    payload.extend_from_slice(sums.as_flattened());
    payload
}

/// The first block's index, and the sums.
///
/// # Errors
/// [`WireError::Malformed`] if it is not an index and whole sums.
pub fn decode_sums(payload: &[u8]) -> Result<(u64, Vec<BlockSum>), WireError> {
    let malformed = WireError::Malformed { what: "run of sums: it ends inside one" };
    let Some((first, rest)) = payload.split_first_chunk() else { return Err(malformed) };
    match rest.as_chunks::<SUM_BYTES>() {
        (sums, []) => Ok((u64::from_le_bytes(*first), sums.to_vec())),
        _ => Err(malformed),
    }
}

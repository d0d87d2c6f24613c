//! The byte form of hashes of blocks: the index of the first block (8 bytes), then the hashes, 32
//! bytes each. No hash at all says that the image is not worth a comparison.

use super::error::WireError;
use crate::protocol::block_hashes::{BlockHash, HASH_BLOCKS_MAX, HASH_BYTES};

/// Most bytes of a payload.
pub const BYTES_MAX: usize = 8 + HASH_BLOCKS_MAX as usize * HASH_BYTES;

/// The payload of a frame with the hashes of the blocks from `first` on.
pub fn encode_hashes(first: u64, hashes: &[BlockHash]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(8 + hashes.len() * HASH_BYTES);
    payload.extend_from_slice(&first.to_le_bytes());
    payload.extend_from_slice(hashes.as_flattened());
    payload
}

/// The first block's index, and the hashes.
///
/// # Errors
/// [`WireError::Malformed`] if it is not an index and whole hashes.
pub fn decode_hashes(payload: &[u8]) -> Result<(u64, Vec<BlockHash>), WireError> {
    let malformed = WireError::Malformed { what: "run of hashes: it ends inside one" };
    let Some((first, rest)) = payload.split_first_chunk() else { return Err(malformed) };
    match rest.as_chunks::<HASH_BYTES>() {
        (hashes, []) => Ok((u64::from_le_bytes(*first), hashes.to_vec())),
        _ => Err(malformed),
    }
}

//! The hashes of blocks, by which two images of a disk are compared.

use std::ops::Range;
use std::sync::LazyLock;

use super::journal::Block;
use crate::protocol::block_hashes::BlockHash;
use crate::protocol::pages::PAGE_BYTES;

/// A block that was never written: much of any disk, so its hash is made once.
const ZEROES: Block = [0; PAGE_BYTES];
static SUM_OF_ZEROES: LazyLock<BlockHash> = LazyLock::new(|| blake3::hash(&ZEROES).into());

/// The BLAKE3 hash of a block. Part of the protocol: both nodes must have one and the
/// same.
pub fn hash_of(block: &Block) -> BlockHash {
    if *block == ZEROES { *SUM_OF_ZEROES } else { blake3::hash(block).into() }
}

/// The hashes of the blocks with the indexes `run`, which `read` reads.
///
/// # Errors
/// Those of `read`.
pub fn hash_run<E>(
    run: Range<u64>,
    mut read: impl FnMut(u64, &mut Block) -> Result<(), E>,
) -> Result<Vec<BlockHash>, E> {
    let mut block = [0; PAGE_BYTES];
    run.map(|index| read(index, &mut block).map(|()| hash_of(&block))).collect()
}

//! Floor 3: the data path, in order: dirty pages → capture → encode and send → stage → apply; and
//! the output that waits for it.

pub mod apply;
pub mod block_hashes;
pub mod capture;
pub mod capture_pool;
pub mod copy_before_write;
pub mod dirty_pages;
pub mod disk;
pub mod epoch_buffers;
pub mod expected_pages;
pub mod image;
pub mod journal;
pub mod output;
pub mod packing;
pub mod receiver;
pub mod sender;
pub mod shared_journal;
pub mod shared_writer;
pub mod snapshot;
pub mod stage;
pub mod stamp;

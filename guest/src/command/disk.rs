//! `DISK`: reads and writes of the disk, for tests of it.

use super::{Arguments, NOT_AN_INTEGER};
use crate::bytes::parse_integer;
use crate::disk::{Content, DiskError, PER_SECOND_MAX};
use crate::reply::ReplyWriter;
use crate::server::Host;

/// `DISK INFO` describes the disk. `DISK WRITE <block> <seed>` writes a block and answers when it
/// outlives a loss of power; `DISK READ <block>` answers with the seed, 0 for a block of zeros.
/// `DISK RUN <blocks> <per-second>` starts a background writer of the first blocks, with seeds of
/// its own; 0 ends it.
pub(super) fn disk<H: Host>(arguments: Arguments<'_>, host: &mut H, reply: &mut ReplyWriter<'_>) {
    let number = |index| parse_integer(arguments.get(index)).and_then(|n| u64::try_from(n).ok());
    let is = |word, count| arguments.is(1, word) && arguments.count() == count;
    if is("INFO", 2) {
        return info(host, reply);
    }
    let (two, three) = (number(2), number(3));
    let done = match (two, three) {
        (Some(block), None) if is("READ", 3) => return read(block, host, reply),
        (Some(block), Some(seed @ 1..)) if is("WRITE", 4) => {
            host.disk_write(block, seed).and_then(|()| host.disk_flush())
        }
        (Some(blocks), Some(per_second @ 0..=PER_SECOND_MAX)) if is("RUN", 4) => run(blocks, per_second, host),
        _ if is("READ", 3) || is("WRITE", 4) || is("RUN", 4) => return reply.error(NOT_AN_INTEGER),
        _ => {
            let usage =
                "ERR use DISK INFO, DISK WRITE <block> <seed>, DISK READ <block> or DISK RUN <blocks> <per-second>";
            return reply.error(usage);
        }
    };
    match done {
        Ok(()) => reply.ok(),
        Err(error) => refuse(error, reply),
    }
}

fn info<H: Host>(host: &mut H, reply: &mut ReplyWriter<'_>) {
    let blocks = host.disk_blocks();
    let run = *host.disk_run();
    let fields = [
        ("blocks", blocks),
        ("run_blocks", run.blocks),
        ("run_per_second", run.per_second),
        ("run_written", run.written),
        ("run_failed", run.failed),
    ];
    reply.map(fields.len());
    for (name, value) in fields {
        reply.bulk(name.as_bytes());
        reply.count(value);
    }
}

fn read<H: Host>(block: u64, host: &mut H, reply: &mut ReplyWriter<'_>) {
    match host.disk_read(block) {
        Ok(Content::Zeros) => reply.count(0),
        Ok(Content::Seed(seed)) => reply.count(seed),
        Ok(Content::Strange) => reply.error("TORN the block is not what was ever written there"),
        Err(error) => refuse(error, reply),
    }
}

fn run<H: Host>(blocks: u64, per_second: u64, host: &mut H) -> Result<(), DiskError> {
    match host.disk_blocks() {
        0 => Err(DiskError::None),
        there if blocks > there => Err(DiskError::Beyond),
        _ => {
            let now_us = host.now_us();
            host.disk_run().ask(blocks, per_second, now_us);
            Ok(())
        }
    }
}

fn refuse(error: DiskError, reply: &mut ReplyWriter<'_>) {
    reply.error(match error {
        DiskError::None => "ERR there is no disk that can be written",
        DiskError::Beyond => "ERR there is no such block on the disk",
        DiskError::Failed => "IOERR the disk failed",
    });
}

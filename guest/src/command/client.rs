//! The commands by which clients get to know the server: HELLO, CLIENT, CONFIG, COMMAND and INFO.

use alloc::vec::Vec;
use core::fmt::{self, Write};

use super::{Arguments, Context, OUT_OF_MEMORY, Session, Spec, TABLE};
use crate::bytes::{Decimal, OutOfMemory, append, parse_integer};
use crate::reply::{Dialect, ReplyWriter};
use crate::resp::BULK_BYTES_MAX;
use crate::server::Host;

/// Longest name a client may give itself, in bytes.
const NAME_BYTES_MAX: usize = 256;
/// What we say we are compatible with: the Redis version whose replies these commands follow.
const REDIS_VERSION: &str = "7.0.15";

/// Text into bytes; fails where memory does.
struct Text(Vec<u8>);

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        append(&mut self.0, text.as_bytes()).map_err(|_| fmt::Error)
    }
}

pub(super) fn info<H: Host>(context: &mut Context<'_, H>, reply: &mut ReplyWriter<'_>) {
    let mut text = Text(Vec::new());
    match write_info(&mut text, context) {
        Ok(()) => reply.bulk(&text.0),
        Err(fmt::Error) => reply.error(OUT_OF_MEMORY),
    }
}

fn write_info<H: Host>(text: &mut Text, context: &Context<'_, H>) -> fmt::Result {
    let (host, statistics) = (&context.host, context.statistics);
    let memory = host.memory();
    let now_us = host.now_us();
    write!(text, "# Server\r\nredis_version:{REDIS_VERSION}\r\nredis_mode:standalone\r\n")?;
    write!(text, "server_name:mcd-guest\r\nmcd_guest_version:{}\r\n", env!("CARGO_PKG_VERSION"))?;
    write!(
        text,
        "tcp_port:6379\r\nuptime_in_seconds:{}\r\n",
        now_us.saturating_sub(statistics.started_us) / 1_000_000
    )?;
    write!(text, "cpus:{}\r\nmemory_pages:{}\r\n\r\n", host.cpus(), host.memory_pages())?;
    write!(text, "# Clients\r\nconnected_clients:{}\r\n\r\n", statistics.connected)?;
    write!(text, "# Memory\r\nused_memory:{}\r\nfree_memory:{}\r\n\r\n", memory.used_bytes, memory.free_bytes)?;
    write!(text, "# Stats\r\ntotal_connections_received:{}\r\n", statistics.connections)?;
    write!(text, "total_commands_processed:{}\r\n\r\n", statistics.commands)?;
    let dirty = host.dirty_status();
    write!(text, "# Dirty\r\ndirty_pages:{}\r\ndirty_per_second:{}\r\n", dirty.pages, dirty.per_second)?;
    write!(text, "dirty_written:{}\r\n\r\n", dirty.written)?;
    write!(text, "# Replication\r\nrole:master\r\nconnected_slaves:0\r\n\r\n# Keyspace\r\n")?;
    if !context.store.is_empty() {
        write!(text, "db0:keys={},expires=0,avg_ttl=0\r\n", context.store.len())?;
    }
    Ok(())
}

pub(super) fn command_table(arguments: Arguments<'_>, reply: &mut ReplyWriter<'_>) {
    let describe = |spec: &Spec, reply: &mut ReplyWriter<'_>| {
        reply.array(6);
        reply.bulk(spec.name.as_bytes());
        reply.integer(spec.arity.into());
        reply.array(1);
        reply.simple(spec.flag);
        for number in [spec.keys.0, spec.keys.1, spec.keys.2] {
            reply.integer(number.into());
        }
    };
    if arguments.count() == 1 {
        reply.array(TABLE.len());
        TABLE.iter().for_each(|spec| describe(spec, reply));
    } else if arguments.is(1, "COUNT") {
        reply.count(TABLE.len() as u64);
    } else if arguments.is(1, "DOCS") {
        // No documentation is kept here; clients take that for "none of these".
        reply.map(0);
    } else if arguments.is(1, "LIST") {
        reply.array(TABLE.len());
        TABLE.iter().for_each(|spec| reply.bulk(spec.name.as_bytes()));
    } else if arguments.is(1, "INFO") {
        reply.array(arguments.count() - 2);
        for name in arguments.from(2) {
            match TABLE.iter().find(|spec| name.eq_ignore_ascii_case(spec.name.as_bytes())) {
                Some(spec) => describe(spec, reply),
                None => reply.null(),
            }
        }
    } else {
        unknown_subcommand("COMMAND", arguments, reply);
    }
}

fn unknown_subcommand(command: &str, arguments: Arguments<'_>, reply: &mut ReplyWriter<'_>) {
    let name = arguments.get(1);
    let name = name.get(..128).unwrap_or(name);
    reply.error_parts(&[b"ERR unknown subcommand '", name, b"' of ", command.as_bytes()]);
}

pub(super) fn config<H: Host>(arguments: Arguments<'_>, host: &H, reply: &mut ReplyWriter<'_>) {
    if !arguments.is(1, "GET") {
        return unknown_subcommand("CONFIG", arguments, reply);
    }
    let memory = host.memory();
    let bulk_max = Decimal::new(BULK_BYTES_MAX as i64);
    let memory_max = Decimal::new((memory.used_bytes + memory.free_bytes) as i64);
    let settings: [(&str, &[u8]); 6] = [
        ("save", b""),
        ("appendonly", b"no"),
        ("databases", b"1"),
        ("maxmemory", memory_max.as_bytes()),
        ("maxmemory-policy", b"noeviction"),
        ("proto-max-bulk-len", bulk_max.as_bytes()),
    ];
    let asked = |name: &str| arguments.from(2).any(|p| p == b"*" || p.eq_ignore_ascii_case(name.as_bytes()));
    reply.map(settings.iter().filter(|(name, _)| asked(name)).count());
    for (name, value) in settings.iter().filter(|(name, _)| asked(name)) {
        reply.bulk(name.as_bytes());
        reply.bulk(value);
    }
}

pub(super) fn client(arguments: Arguments<'_>, session: &mut Session, reply: &mut ReplyWriter<'_>) {
    if arguments.is(1, "SETINFO") && arguments.count() == 4 {
        reply.ok();
    } else if arguments.is(1, "SETNAME") && arguments.count() == 3 {
        match set_name(session, arguments.get(2)) {
            Ok(()) => reply.ok(),
            Err(text) => reply.error(text),
        }
    } else if arguments.is(1, "GETNAME") && arguments.count() == 2 {
        if session.name.is_empty() { reply.null() } else { reply.bulk(&session.name) }
    } else if arguments.is(1, "ID") && arguments.count() == 2 {
        reply.count(session.id);
    } else {
        unknown_subcommand("CLIENT", arguments, reply);
    }
}

fn set_name(session: &mut Session, name: &[u8]) -> Result<(), &'static str> {
    if name.len() > NAME_BYTES_MAX || !name.iter().all(|byte| (b'!'..=b'~').contains(byte)) {
        return Err("ERR Client names cannot contain spaces, newlines or special characters.");
    }
    session.name.clear();
    append(&mut session.name, name).map_err(|OutOfMemory| OUT_OF_MEMORY)
}

pub(super) fn hello(arguments: Arguments<'_>, session: &mut Session, reply: &mut ReplyWriter<'_>) {
    let dialect = match arguments.get(1) {
        _ if arguments.count() == 1 => session.dialect,
        b"2" => Dialect::Resp2,
        b"3" => Dialect::Resp3,
        other if parse_integer(other).is_none() => {
            return reply.error("ERR Protocol version is not an integer or out of range");
        }
        _ => return reply.error("NOPROTO unsupported protocol version"),
    };
    let mut index = 2;
    while index < arguments.count() {
        let left = arguments.count() - index - 1;
        if arguments.is(index, "AUTH") && left >= 2 {
            // The default user has no password, so any is right; there is no other user.
            if arguments.get(index + 1) != b"default" {
                return reply.error("WRONGPASS invalid username-password pair or user is disabled.");
            }
            index += 3;
        } else if arguments.is(index, "SETNAME") && left >= 1 {
            if let Err(text) = set_name(session, arguments.get(index + 1)) {
                return reply.error(text);
            }
            index += 2;
        } else {
            return reply.error("ERR Syntax error in HELLO option");
        }
    }
    session.dialect = dialect;
    reply.set_dialect(dialect);
    reply.map(7);
    for (name, text) in [("server", "redis"), ("version", REDIS_VERSION)] {
        reply.bulk(name.as_bytes());
        reply.bulk(text.as_bytes());
    }
    reply.bulk(b"proto");
    reply.integer(if dialect == Dialect::Resp3 { 3 } else { 2 });
    reply.bulk(b"id");
    reply.count(session.id);
    for (name, text) in [("mode", "standalone"), ("role", "master")] {
        reply.bulk(name.as_bytes());
        reply.bulk(text.as_bytes());
    }
    reply.bulk(b"modules");
    reply.array(0);
}

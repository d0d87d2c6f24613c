//! The commands: what they are called, what they take and what they do.

use alloc::vec::Vec;
use core::fmt::{self, Write};

use crate::bytes::{OutOfMemory, append, parse_integer};
use crate::dirty::PER_SECOND_MAX;
use crate::reply::{Dialect, ReplyWriter};
use crate::resp::{BULK_BYTES_MAX, Parser};
use crate::server::{DirtyRefusal, Host, Statistics};
use crate::store::{CounterError, Store};
use crate::sum::Checksum;

/// Longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 64 << 10;
/// Longest name a client may give itself, in bytes.
const NAME_BYTES_MAX: usize = 256;
/// Heap that clients' data never gets, so that connections and replies go on when the store is full.
const RESERVED_BYTES: u64 = 4 << 20;
/// What we say we are compatible with: the Redis version whose replies these commands follow.
const REDIS_VERSION: &str = "7.0.15";

const OUT_OF_MEMORY: &str = "OOM command not allowed when used memory > 'maxmemory'.";
const SYNTAX: &str = "ERR syntax error";
const NOT_AN_INTEGER: &str = "ERR value is not an integer or out of range";

/// What a client's connection remembers between commands.
#[derive(Default)]
pub struct Session {
    /// The connection's number.
    pub id: u64,
    /// The dialect of its replies.
    pub dialect: Dialect,
    /// What the client calls itself.
    pub name: Vec<u8>,
}

/// What becomes of the connection after a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The reply is written; go on.
    Done,
    /// The reply is written; close behind it.
    Close,
    /// The reply comes when the checksum is complete.
    Sum(Checksum),
    /// The reply comes when the memory writer has taken the plan.
    Dirty,
}

/// The arguments of one command, its name first.
#[derive(Clone, Copy)]
pub struct Arguments<'a> {
    parser: &'a Parser,
    input: &'a [u8],
}

impl<'a> Arguments<'a> {
    /// The arguments of the command that `parser` has found complete in `input`.
    pub fn new(parser: &'a Parser, input: &'a [u8]) -> Arguments<'a> {
        Arguments { parser, input }
    }

    fn count(&self) -> usize {
        self.parser.argument_count()
    }

    fn get(&self, index: usize) -> &'a [u8] {
        self.parser.argument(index, self.input)
    }

    fn is(&self, index: usize, word: &str) -> bool {
        self.get(index).eq_ignore_ascii_case(word.as_bytes())
    }

    fn from(self, start: usize) -> impl Iterator<Item = &'a [u8]> {
        (start..self.count()).map(move |index| self.get(index))
    }
}

/// Everything a command may work on.
pub struct Context<'a, H: Host> {
    /// The data.
    pub store: &'a mut Store,
    /// The machine.
    pub host: &'a mut H,
    /// The client.
    pub session: &'a mut Session,
    /// What the server has counted.
    pub statistics: &'a Statistics,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Command {
    Auth,
    Client,
    CommandTable,
    Config,
    DbSize,
    Decr,
    DecrBy,
    Del,
    Digest,
    Dirty,
    Echo,
    Exists,
    FlushAll,
    Get,
    Hello,
    Incr,
    IncrBy,
    Info,
    MGet,
    MSet,
    Ping,
    Quit,
    Select,
    Set,
    Shutdown,
    Sum,
    Time,
}

/// One line of the command table, as `COMMAND` shows it.
struct Spec {
    name: &'static str,
    command: Command,
    /// Arguments with the name; at least so many if negative.
    arity: i8,
    flag: &'static str,
    /// First key, last key, step between keys.
    keys: (i8, i8, i8),
}

const fn spec(name: &'static str, command: Command, arity: i8, flag: &'static str, keys: (i8, i8, i8)) -> Spec {
    Spec { name, command, arity, flag, keys }
}

const NO_KEYS: (i8, i8, i8) = (0, 0, 0);

/// The commands, those asked for most often first.
const TABLE: &[Spec] = &[
    spec("get", Command::Get, 2, "readonly", (1, 1, 1)),
    spec("set", Command::Set, -3, "write", (1, 1, 1)),
    spec("incr", Command::Incr, 2, "write", (1, 1, 1)),
    spec("ping", Command::Ping, -1, "fast", NO_KEYS),
    spec("del", Command::Del, -2, "write", (1, -1, 1)),
    spec("mget", Command::MGet, -2, "readonly", (1, -1, 1)),
    spec("mset", Command::MSet, -3, "write", (1, -1, 2)),
    spec("incrby", Command::IncrBy, 3, "write", (1, 1, 1)),
    spec("decr", Command::Decr, 2, "write", (1, 1, 1)),
    spec("decrby", Command::DecrBy, 3, "write", (1, 1, 1)),
    spec("exists", Command::Exists, -2, "readonly", (1, -1, 1)),
    spec("echo", Command::Echo, 2, "fast", NO_KEYS),
    spec("dbsize", Command::DbSize, 1, "readonly", NO_KEYS),
    spec("flushall", Command::FlushAll, -1, "write", NO_KEYS),
    spec("flushdb", Command::FlushAll, -1, "write", NO_KEYS),
    spec("digest", Command::Digest, 1, "readonly", NO_KEYS),
    spec("dirty", Command::Dirty, -1, "admin", NO_KEYS),
    spec("sum", Command::Sum, 1, "admin", NO_KEYS),
    spec("info", Command::Info, -1, "fast", NO_KEYS),
    spec("time", Command::Time, 1, "fast", NO_KEYS),
    spec("command", Command::CommandTable, -1, "fast", NO_KEYS),
    spec("config", Command::Config, -2, "admin", NO_KEYS),
    spec("client", Command::Client, -2, "fast", NO_KEYS),
    spec("hello", Command::Hello, -1, "fast", NO_KEYS),
    spec("auth", Command::Auth, -2, "fast", NO_KEYS),
    spec("select", Command::Select, 2, "fast", NO_KEYS),
    spec("quit", Command::Quit, -1, "fast", NO_KEYS),
    spec("shutdown", Command::Shutdown, -1, "admin", NO_KEYS),
];

/// Runs one command and writes its reply, unless the outcome says that it comes later.
pub fn execute<H: Host>(
    arguments: Arguments<'_>,
    context: &mut Context<'_, H>,
    reply: &mut ReplyWriter<'_>,
) -> Outcome {
    let name = arguments.get(0);
    let Some(spec) = TABLE.iter().find(|spec| name.eq_ignore_ascii_case(spec.name.as_bytes())) else {
        let name = name.get(..128).unwrap_or(name);
        reply.error_parts(&[b"ERR unknown command '", name, b"'"]);
        return Outcome::Done;
    };
    let wanted = usize::from(spec.arity.unsigned_abs());
    let fits = if spec.arity < 0 { arguments.count() >= wanted } else { arguments.count() == wanted };
    if !fits {
        reply.error_parts(&[b"ERR wrong number of arguments for '", spec.name.as_bytes(), b"' command"]);
        return Outcome::Done;
    }
    if has_long_key(arguments, spec) {
        reply.error("ERR key is too long (65536 bytes at most)");
        return Outcome::Done;
    }
    run(spec.command, arguments, context, reply)
}

fn has_long_key(arguments: Arguments<'_>, spec: &Spec) -> bool {
    let (first, last, step) = spec.keys;
    let (Ok(first @ 1..), Ok(step @ 1..)) = (usize::try_from(first), usize::try_from(step)) else { return false };
    let end = if last < 0 { arguments.count() } else { first + 1 };
    (first..end).step_by(step).any(|index| arguments.get(index).len() > KEY_BYTES_MAX)
}

fn run<H: Host>(
    command: Command,
    arguments: Arguments<'_>,
    context: &mut Context<'_, H>,
    reply: &mut ReplyWriter<'_>,
) -> Outcome {
    let count = arguments.count();
    let key = arguments.get(1);
    match command {
        Command::Get => value(context.store, key, reply),
        Command::Set => set(arguments, context, reply),
        Command::Incr => add(key, Some(1), context, reply),
        Command::Decr => add(key, Some(-1), context, reply),
        Command::IncrBy => add(key, parse_integer(arguments.get(2)), context, reply),
        Command::DecrBy => add(key, parse_integer(arguments.get(2)).and_then(i64::checked_neg), context, reply),
        Command::MGet => {
            reply.array(count - 1);
            arguments.from(1).for_each(|key| value(context.store, key, reply));
        }
        Command::MSet => set_many(arguments, context, reply),
        Command::Del => reply.count(arguments.from(1).filter(|key| context.store.remove(key)).count() as u64),
        Command::Exists => {
            reply.count(arguments.from(1).filter(|key| context.store.get(key).is_some()).count() as u64);
        }
        Command::DbSize => reply.count(context.store.len() as u64),
        Command::FlushAll => {
            context.store.clear();
            reply.ok();
        }
        Command::Digest => hexadecimal(context.store.digest(), reply),
        Command::Ping if count == 1 => reply.simple("PONG"),
        Command::Ping if count > 2 => reply.error("ERR wrong number of arguments for 'ping' command"),
        Command::Ping | Command::Echo => reply.bulk(key),
        Command::Time => time(context.host.now_us(), reply),
        Command::Info => info(context, reply),
        Command::CommandTable => command_table(arguments, reply),
        Command::Config => config(arguments, context.host, reply),
        Command::Client => client(arguments, context.session, reply),
        Command::Hello => hello(arguments, context.session, reply),
        Command::Auth => reply.error(
            "ERR AUTH <password> called without any password configured for the default user. \
             Are you sure your configuration is correct?",
        ),
        Command::Select => match parse_integer(key) {
            Some(0) => reply.ok(),
            Some(_) => reply.error("ERR DB index is out of range"),
            None => reply.error("ERR invalid DB index"),
        },
        Command::Quit => {
            reply.ok();
            return Outcome::Close;
        }
        Command::Shutdown => {
            context.host.shut_down();
            return Outcome::Close;
        }
        Command::Sum => return Outcome::Sum(Checksum::default()),
        Command::Dirty => return dirty(arguments, context.host, reply),
    }
    Outcome::Done
}

fn value(store: &Store, key: &[u8], reply: &mut ReplyWriter<'_>) {
    match store.get(key) {
        Some(value) => value.with_bytes(|bytes| reply.bulk(bytes)),
        None => reply.null(),
    }
}

/// Whether the heap has room for `bytes` more of clients' data.
fn has_room<H: Host>(host: &H, bytes: usize) -> bool {
    host.memory().free_bytes >= RESERVED_BYTES + bytes as u64
}

fn set<H: Host>(arguments: Arguments<'_>, context: &mut Context<'_, H>, reply: &mut ReplyWriter<'_>) {
    let (key, bytes) = (arguments.get(1), arguments.get(2));
    let (mut only_new, mut only_old, mut give_old) = (false, false, false);
    for index in 3..arguments.count() {
        if arguments.is(index, "NX") {
            only_new = true;
        } else if arguments.is(index, "XX") {
            only_old = true;
        } else if arguments.is(index, "GET") {
            give_old = true;
        } else if ["EX", "PX", "EXAT", "PXAT"].iter().any(|word| arguments.is(index, word)) {
            return reply.error("ERR expiry is not supported: this store keeps what it is given");
        } else if !arguments.is(index, "KEEPTTL") {
            return reply.error(SYNTAX);
        }
    }
    if only_new && only_old {
        return reply.error(SYNTAX);
    }
    let old = context.store.get(key);
    let refused = if old.is_some() { only_new } else { only_old };
    if !refused && !has_room(context.host, key.len() + bytes.len()) {
        return reply.error(OUT_OF_MEMORY);
    }
    if refused {
        match old {
            Some(old) if give_old => old.with_bytes(|bytes| reply.bulk(bytes)),
            _ => reply.null(),
        }
        return;
    }
    if !give_old {
        return match context.store.set(key, bytes) {
            Ok(()) => reply.ok(),
            Err(OutOfMemory) => reply.error(OUT_OF_MEMORY),
        };
    }
    match context.store.replace(key, bytes) {
        Ok(Some(old)) => old.with_bytes(|bytes| reply.bulk(bytes)),
        Ok(None) => reply.null(),
        Err(OutOfMemory) => reply.error(OUT_OF_MEMORY),
    }
}

fn set_many<H: Host>(arguments: Arguments<'_>, context: &mut Context<'_, H>, reply: &mut ReplyWriter<'_>) {
    if arguments.count() % 2 == 0 {
        return reply.error("ERR wrong number of arguments for 'mset' command");
    }
    // Twice the bytes and some per key: all or nothing, as far as can be told beforehand.
    let bytes: usize = arguments.from(1).map(|argument| argument.len() * 2 + 64).sum();
    if !has_room(context.host, bytes) {
        return reply.error(OUT_OF_MEMORY);
    }
    for index in (1..arguments.count()).step_by(2) {
        if context.store.set(arguments.get(index), arguments.get(index + 1)).is_err() {
            return reply.error(OUT_OF_MEMORY);
        }
    }
    reply.ok();
}

fn add<H: Host>(key: &[u8], amount: Option<i64>, context: &mut Context<'_, H>, reply: &mut ReplyWriter<'_>) {
    let Some(amount) = amount else { return reply.error(NOT_AN_INTEGER) };
    if !has_room(context.host, key.len()) && context.store.get(key).is_none() {
        return reply.error(OUT_OF_MEMORY);
    }
    match context.store.add(key, amount) {
        Ok(sum) => reply.integer(sum),
        Err(CounterError::NotAnInteger) => reply.error(NOT_AN_INTEGER),
        Err(CounterError::Overflow) => reply.error("ERR increment or decrement would overflow"),
        Err(CounterError::Memory) => reply.error(OUT_OF_MEMORY),
    }
}

/// `DIRTY <pages> <per-second>` asks for a load, `DIRTY` says what is done of it, `DIRTY CHECK` how many pages are not as written.
fn dirty<H: Host>(arguments: Arguments<'_>, host: &mut H, reply: &mut ReplyWriter<'_>) -> Outcome {
    match arguments.count() {
        1 => {
            let status = host.dirty_status();
            reply.map(3);
            for (name, value) in
                [("pages", status.pages), ("per_second", status.per_second), ("written", status.written)]
            {
                reply.bulk(name.as_bytes());
                reply.count(value);
            }
        }
        2 if arguments.is(1, "CHECK") => match host.dirty_wrong_pages() {
            Some(wrong) => reply.count(wrong),
            None => reply.error("BUSY another DIRTY is taking effect, try again"),
        },
        3 => {
            let number = |index| parse_integer(arguments.get(index)).and_then(|n| u64::try_from(n).ok());
            let (Some(pages), Some(per_second @ 0..=PER_SECOND_MAX)) = (number(1), number(2)) else {
                reply.error(NOT_AN_INTEGER);
                return Outcome::Done;
            };
            match host.dirty_ask(pages, per_second) {
                Ok(()) => return Outcome::Dirty,
                Err(DirtyRefusal::Busy) => reply.error("BUSY another DIRTY is taking effect, try again"),
                Err(DirtyRefusal::Memory) => reply.error("OOM not enough memory for so many pages"),
            }
        }
        _ => reply.error("ERR use DIRTY <pages> <per-second>, DIRTY CHECK or DIRTY"),
    }
    Outcome::Done
}

/// `value` as a bulk string of 16 hexadecimal digits.
pub fn hexadecimal(value: u64, reply: &mut ReplyWriter<'_>) {
    let mut digits = [0u8; 16];
    for (index, digit) in digits.iter_mut().enumerate() {
        let nibble = (value >> (60 - 4 * index)) as u8 & 15;
        *digit = if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 };
    }
    reply.bulk(&digits);
}

fn time(now_us: u64, reply: &mut ReplyWriter<'_>) {
    reply.array(2);
    for part in [now_us / 1_000_000, now_us % 1_000_000] {
        reply.bulk(crate::bytes::Decimal::new(part as i64).as_bytes());
    }
}

/// Text into bytes; fails where memory does.
struct Text(Vec<u8>);

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        append(&mut self.0, text.as_bytes()).map_err(|_| fmt::Error)
    }
}

fn info<H: Host>(context: &mut Context<'_, H>, reply: &mut ReplyWriter<'_>) {
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

fn command_table(arguments: Arguments<'_>, reply: &mut ReplyWriter<'_>) {
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

fn config<H: Host>(arguments: Arguments<'_>, host: &H, reply: &mut ReplyWriter<'_>) {
    if !arguments.is(1, "GET") {
        return unknown_subcommand("CONFIG", arguments, reply);
    }
    let memory = host.memory();
    let bulk_max = crate::bytes::Decimal::new(BULK_BYTES_MAX as i64);
    let memory_max = crate::bytes::Decimal::new((memory.used_bytes + memory.free_bytes) as i64);
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

fn client(arguments: Arguments<'_>, session: &mut Session, reply: &mut ReplyWriter<'_>) {
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

fn hello(arguments: Arguments<'_>, session: &mut Session, reply: &mut ReplyWriter<'_>) {
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

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;

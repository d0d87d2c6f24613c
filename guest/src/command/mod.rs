//! The commands: what they are called, what they take and what they do.

mod client;
mod disk;

use alloc::vec::Vec;

use crate::bytes::{Decimal, OutOfMemory, parse_integer};
use crate::dirty::PER_SECOND_MAX;
use crate::reply::{Dialect, ReplyWriter};
use crate::resp::Parser;
use crate::server::{DirtyRefusal, Host, Statistics};
use crate::store::{CounterError, Store};
use crate::sum::Checksum;

/// Longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 64 << 10;
/// Heap that clients' data never gets, so that connections and replies go on when the store is
/// full.
const RESERVED_BYTES: u64 = 4 << 20;

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
    Commands,
    Config,
    DbSize,
    Decr,
    DecrBy,
    Del,
    Digest,
    Dirty,
    Disk,
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
    spec("disk", Command::Disk, -2, "admin", NO_KEYS),
    spec("sum", Command::Sum, 1, "admin", NO_KEYS),
    spec("info", Command::Info, -1, "fast", NO_KEYS),
    spec("time", Command::Time, 1, "fast", NO_KEYS),
    spec("command", Command::Commands, -1, "fast", NO_KEYS),
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
        Command::Info => client::info(context, reply),
        Command::Commands => client::command_table(arguments, reply),
        Command::Config => client::config(arguments, context.host, reply),
        Command::Client => client::client(arguments, context.session, reply),
        Command::Hello => client::hello(arguments, context.session, reply),
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
        Command::Disk => disk::disk(arguments, context.host, reply),
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
fn has_room<H: Host>(context: &mut Context<'_, H>, bytes: usize) -> bool {
    let fits = |host: &H| host.memory().free_bytes >= RESERVED_BYTES + bytes as u64;
    // What was flushed and is not freed yet may be enough.
    fits(context.host) || (context.store.tidy_all() && fits(context.host))
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
    let exists = (only_new || only_old) && context.store.get(key).is_some();
    let refused = if exists { only_new } else { only_old };
    if refused {
        return if give_old { value(context.store, key, reply) } else { reply.null() };
    }
    if !has_room(context, key.len() + bytes.len()) {
        return reply.error(OUT_OF_MEMORY);
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
    if arguments.count().is_multiple_of(2) {
        return reply.error("ERR wrong number of arguments for 'mset' command");
    }
    // Twice the bytes and some per key: all or nothing, as far as can be told beforehand.
    let bytes: usize = arguments.from(1).map(|argument| argument.len() * 2 + 64).sum();
    if !has_room(context, bytes) {
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
    if !has_room(context, key.len()) && context.store.get(key).is_none() {
        return reply.error(OUT_OF_MEMORY);
    }
    match context.store.add(key, amount) {
        Ok(sum) => reply.integer(sum),
        Err(CounterError::NotAnInteger) => reply.error(NOT_AN_INTEGER),
        Err(CounterError::Overflow) => reply.error("ERR increment or decrement would overflow"),
        Err(CounterError::Memory) => reply.error(OUT_OF_MEMORY),
    }
}

/// `DIRTY <pages> <per-second>` asks for a load, `DIRTY` says what is done of it, `DIRTY CHECK` how
/// many pages are not as written.
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
        reply.bulk(Decimal::new(part as i64).as_bytes());
    }
}

#[cfg(test)]
mod tests;

use proptest::prelude::*;

use super::*;
use crate::resp::Progress;
use crate::test_support::TestHost;

/// One client of a store.
struct Client {
    store: Store,
    host: TestHost,
    session: Session,
    statistics: Statistics,
}

impl Client {
    fn new() -> Client {
        let session = Session { id: 9, ..Session::default() };
        Client { store: Store::new(5), host: TestHost::new(), session, statistics: Statistics::default() }
    }

    /// Runs one command, as bytes; its reply and outcome.
    fn run(&mut self, input: &[u8]) -> (Vec<u8>, Outcome) {
        let mut parser = Parser::new();
        assert_eq!(parser.advance(input), Ok(Progress::Ready(input.len())));
        let mut out = Vec::new();
        let mut reply = ReplyWriter::new(&mut out, self.session.dialect);
        let mut context = Context {
            store: &mut self.store,
            host: &mut self.host,
            session: &mut self.session,
            statistics: &self.statistics,
        };
        let outcome = execute(Arguments::new(&parser, input), &mut context, &mut reply);
        (out, outcome)
    }

    /// The reply to an inline command.
    fn ask(&mut self, line: &str) -> String {
        let (reply, _) = self.run(format!("{line}\r\n").as_bytes());
        String::from_utf8(reply).expect("text")
    }

    fn check(&mut self, cases: &[(&str, &str)]) {
        for (line, reply) in cases {
            assert_eq!(self.ask(line), reply.replace('|', "\r\n"), "{line}");
        }
    }
}

#[test]
fn data_commands_answer_as_redis_does() {
    Client::new().check(&[
        ("PING", "+PONG|"),
        ("ping hello", "$5|hello|"),
        ("PING a b", "-ERR wrong number of arguments for 'ping' command|"),
        ("ECHO x", "$1|x|"),
        ("ECHO", "-ERR wrong number of arguments for 'echo' command|"),
        ("GET a", "$-1|"),
        ("SET a 1", "+OK|"),
        ("GET a", "$1|1|"),
        ("SET a \"\"", "+OK|"),
        ("GET a", "$0||"),
        ("SET a 5 NX", "$-1|"),
        ("SET b 5 XX", "$-1|"),
        ("SET b 5 NX", "+OK|"),
        ("SET b 6 XX GET", "$1|5|"),
        ("SET b 7 NX GET", "$1|6|"),
        ("SET c 1 GET", "$-1|"),
        ("SET c 2 KEEPTTL", "+OK|"),
        ("SET c 2 NX XX", "-ERR syntax error|"),
        ("SET c 2 FOO", "-ERR syntax error|"),
        ("SET c 2 EX 5", "-ERR expiry is not supported: this store keeps what it is given|"),
        ("INCR n", ":1|"),
        ("INCRBY n 9", ":10|"),
        ("DECR n", ":9|"),
        ("DECRBY n 10", ":-1|"),
        ("GET n", "$2|-1|"),
        ("INCRBY n x", "-ERR value is not an integer or out of range|"),
        ("SET n 9223372036854775807", "+OK|"),
        ("INCR n", "-ERR increment or decrement would overflow|"),
        ("DECRBY n -9223372036854775808", "-ERR value is not an integer or out of range|"),
        ("SET t text", "+OK|"),
        ("INCR t", "-ERR value is not an integer or out of range|"),
        ("MSET x 1 y 2", "+OK|"),
        ("MSET x 1 y", "-ERR wrong number of arguments for 'mset' command|"),
        ("MGET x nope y", "*3|$1|1|$-1|$1|2|"),
        ("EXISTS x y nope x", ":3|"),
        ("DEL x y nope", ":2|"),
        ("DBSIZE", ":5|"),
        ("FLUSHALL", "+OK|"),
        ("DBSIZE", ":0|"),
        ("NOSUCH x", "-ERR unknown command 'NOSUCH'|"),
        ("GET", "-ERR wrong number of arguments for 'get' command|"),
    ]);
}

#[test]
fn disks_are_written_and_read() {
    let mut client = Client::new();
    let usage = "-ERR use DISK INFO, DISK WRITE <block> <seed>, DISK READ <block> or DISK RUN <blocks> <per-second>|";
    client.check(&[
        ("DISK READ 3", ":0|"),
        ("DISK WRITE 3 77", "+OK|"),
        ("disk read 3", ":77|"),
        ("DISK READ 2", ":0|"),
        ("DISK WRITE 8 77", "-ERR there is no such block on the disk|"),
        ("DISK READ 8", "-ERR there is no such block on the disk|"),
        ("DISK WRITE 3 0", "-ERR value is not an integer or out of range|"),
        ("DISK WRITE 3", usage),
        ("DISK READ x", "-ERR value is not an integer or out of range|"),
        ("DISK WHAT", usage),
        ("DISK", "-ERR wrong number of arguments for 'disk' command|"),
        ("DISK RUN 9 5", "-ERR there is no such block on the disk|"),
        ("DISK RUN 2 5", "+OK|"),
        ("DISK INFO", "*10|$6|blocks|:8|$10|run_blocks|:2|$14|run_per_second|:5|$11|run_written|:0|$10|run_failed|:0|"),
    ]);
    assert_eq!(client.host.unflushed, 0, "a write that was acknowledged was flushed");
}

#[test]
fn clients_start_up_cleanly() {
    let mut client = Client::new();
    client.check(&[
        ("CONFIG GET save", "*2|$4|save|$0||"),
        ("CONFIG GET appendonly", "*2|$10|appendonly|$2|no|"),
        ("CONFIG GET nothing", "*0|"),
        ("CONFIG SET save x", "-ERR unknown subcommand 'SET' of CONFIG|"),
        ("COMMAND DOCS", "*0|"),
        ("COMMAND INFO get nope", "*2|*6|$3|get|:2|*1|+readonly|:1|:1|:1|$-1|"),
        ("CLIENT SETINFO LIB-NAME x", "+OK|"),
        ("CLIENT GETNAME", "$-1|"),
        ("CLIENT SETNAME me", "+OK|"),
        ("CLIENT GETNAME", "$2|me|"),
        ("CLIENT SETNAME \"a b\"", "-ERR Client names cannot contain spaces, newlines or special characters.|"),
        ("CLIENT ID", ":9|"),
        ("SELECT 0", "+OK|"),
        ("SELECT 1", "-ERR DB index is out of range|"),
        ("HELLO 4", "-NOPROTO unsupported protocol version|"),
        ("HELLO x", "-ERR Protocol version is not an integer or out of range|"),
        ("HELLO 3 AUTH you x", "-WRONGPASS invalid username-password pair or user is disabled.|"),
        ("HELLO 3 WHAT", "-ERR Syntax error in HELLO option|"),
        ("TIME", "*2|$1|1|$1|0|"),
    ]);
    assert!(client.ask("HELLO").starts_with("*14\r\n$6\r\nserver"));
    assert!(client.ask("HELLO 3 AUTH default x SETNAME you").starts_with("%7\r\n$6\r\nserver"));
    client.check(&[("GET a", "_|"), ("CONFIG GET save", "%1|$4|save|$0||"), ("CLIENT GETNAME", "$3|you|")]);
    assert!(client.ask("INFO").contains("redis_version:"));
    assert_eq!(client.ask("COMMAND COUNT"), format!(":{}\r\n", TABLE.len()));
}

#[test]
fn a_full_store_says_so_and_still_answers() {
    let mut client = Client::new();
    client.check(&[("SET a 1", "+OK|")]);
    client.host.free_bytes = RESERVED_BYTES;
    let full = format!("-{OUT_OF_MEMORY}|");
    client.check(&[
        ("SET a 2", &full),
        ("SET a 2 GET", &full),
        ("MSET b 1", &full),
        ("INCR c", &full),
        ("GET a", "$1|1|"),
        ("INCR a", ":2|"),
        ("DEL a", ":1|"),
    ]);
}

#[test]
fn keys_have_a_longest_length() {
    let mut client = Client::new();
    let long = "k".repeat(KEY_BYTES_MAX + 1);
    for (name, rest) in [("GET", ""), ("SET", "$1\r\nv\r\n"), ("DEL", "")] {
        let count = if rest.is_empty() { 2 } else { 3 };
        let input = format!("*{count}\r\n$3\r\n{name}\r\n${}\r\n{long}\r\n{rest}", long.len());
        let (reply, _) = client.run(input.as_bytes());
        assert!(reply.starts_with(b"-ERR key is too long"), "{name}");
    }
}

#[test]
fn some_replies_come_later() {
    let mut client = Client::new();
    assert!(matches!(client.run(b"SUM\r\n"), (reply, Outcome::Sum(_)) if reply.is_empty()));
    assert!(matches!(client.run(b"DIRTY 10 1000\r\n"), (reply, Outcome::Dirty) if reply.is_empty()));
    client.check(&[
        ("DIRTY 10 1000", "-BUSY another DIRTY is taking effect, try again|"),
        ("DIRTY x 1", "-ERR value is not an integer or out of range|"),
        ("DIRTY 1 10000001", "-ERR value is not an integer or out of range|"),
        ("DIRTY a", "-ERR use DIRTY <pages> <per-second>, DIRTY CHECK or DIRTY|"),
        ("DIRTY CHECK", ":0|"),
        ("DIRTY", "*6|$5|pages|:10|$10|per_second|:1000|$7|written|:0|"),
        ("DIRTY 100000 1", "-OOM not enough memory for so many pages|"),
    ]);
    assert!(matches!(client.run(b"QUIT\r\n"), (reply, Outcome::Close) if reply == b"+OK\r\n"));
    assert!(matches!(client.run(b"SHUTDOWN NOSAVE\r\n"), (reply, Outcome::Close) if reply.is_empty()));
    assert!(client.host.is_shut_down);
}

proptest! {
    /// Whatever a client sends, it gets one reply of the right form.
    #[test]
    fn any_arguments_get_one_reply(
        command in 0..TABLE.len(),
        arguments in prop::collection::vec(
            "[ -~\r\n]{0,8}|EX|NX|XX|GET|AUTH|default|INFO|CHECK|READ|WRITE|RUN|-?[0-9]{1,19}",
            0..5,
        ),
    ) {
        let mut client = Client::new();
        let mut input = format!("*{}\r\n", arguments.len() + 1);
        for argument in std::iter::once(TABLE[command].name).chain(arguments.iter().map(String::as_str)) {
            input.push_str(&format!("${}\r\n{argument}\r\n", argument.len()));
        }
        let (reply, outcome) = client.run(input.as_bytes());
        let late = matches!(outcome, Outcome::Sum(_) | Outcome::Dirty) || client.host.is_shut_down;
        prop_assert_eq!(reply_bytes(&reply), if late { None } else { Some(reply.len()) });
    }
}

/// Length of the one reply at the start of `bytes`.
fn reply_bytes(bytes: &[u8]) -> Option<usize> {
    let line = bytes.windows(2).position(|pair| pair == b"\r\n")?;
    let number = || std::str::from_utf8(&bytes[1..line]).ok()?.parse::<i64>().ok();
    let children = |count: i64| (0..count).try_fold(line + 2, |at, _| Some(at + reply_bytes(bytes.get(at..)?)?));
    match bytes[0] {
        b'+' | b'-' | b'_' => Some(line + 2),
        b':' => number().map(|_| line + 2),
        b'$' => match number()? {
            -1 => Some(line + 2),
            length => {
                let end = line + 2 + usize::try_from(length).ok()?;
                (bytes.get(end..end + 2)? == b"\r\n").then_some(end + 2)
            }
        },
        b'*' => children(number()?),
        b'%' => children(number()? * 2),
        _ => None,
    }
}

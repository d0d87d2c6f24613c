use proptest::prelude::*;

use super::*;

type Command = Vec<Vec<u8>>;

/// Feeds `input` in pieces that end at `cuts`, as the network might.
fn read(input: &[u8], cuts: &[usize]) -> Result<Vec<Command>, ProtocolError> {
    let mut parser = Parser::new();
    let (mut buffer, mut commands, mut fed) = (Vec::new(), Vec::new(), 0);
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
    ends.push(input.len());
    ends.sort_unstable();
    for end in ends {
        buffer.extend_from_slice(&input[fed..end]);
        fed = end;
        while let Progress::Ready(bytes) = parser.advance(&buffer)? {
            assert_eq!(parser.advance(&buffer), Ok(Progress::Ready(bytes)), "ready stays ready");
            commands.push((0..parser.argument_count()).map(|i| parser.argument(i, &buffer).to_vec()).collect());
            parser.next_command();
            buffer.drain(..bytes);
        }
    }
    Ok(commands)
}

fn encode(commands: &[Command]) -> Vec<u8> {
    let mut out = Vec::new();
    for command in commands {
        out.extend_from_slice(format!("*{}\r\n", command.len()).as_bytes());
        for argument in command {
            out.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
            out.extend_from_slice(argument);
            out.extend_from_slice(b"\r\n");
        }
    }
    out
}

fn one(text: &str) -> Command {
    let commands = read(text.as_bytes(), &[]).expect("understood");
    assert_eq!(commands.len(), 1, "{text:?}");
    commands.into_iter().next().expect("one")
}

#[test]
fn inline_commands_are_split_and_unquoted() {
    assert_eq!(one("PING\r\n"), [b"PING".to_vec()]);
    assert_eq!(one("  set  a  b \n"), [b"set".to_vec(), b"a".to_vec(), b"b".to_vec()]);
    assert_eq!(
        one("set \"a b\\x41\\n\\\"\" 'c\\'d\\n'\r\n"),
        [b"set".to_vec(), b"a bA\n\"".to_vec(), b"c'd\\n".to_vec()]
    );
    assert_eq!(one("set \"\" x\r\n"), [b"set".to_vec(), b"".to_vec(), b"x".to_vec()]);
    assert!(one("\r\n").is_empty());
    for text in ["set \"a\r\n", "set 'a\r\n", "set \"a\"b c\r\n"] {
        assert_eq!(read(text.as_bytes(), &[]), Err(ProtocolError::Quotes), "{text:?}");
    }
}

#[test]
fn malformed_arrays_are_refused() {
    let cases: [(&str, ProtocolError); 13] = [
        ("*x\r\n", ProtocolError::ArrayLength),
        ("*\r\n", ProtocolError::ArrayLength),
        ("*1000000\r\n", ProtocolError::ArrayLength),
        ("*99999999999999999999\r\n", ProtocolError::ArrayLength),
        ("*1\r\n:5\r\n", ProtocolError::ExpectedBulk(b':')),
        ("*1\r\n\r\n", ProtocolError::ExpectedBulk(b'\r')),
        ("*1\r\n$-1\r\n", ProtocolError::BulkLength),
        ("*1\r\n$x\r\n", ProtocolError::BulkLength),
        ("*1\r\n$1048577\r\n", ProtocolError::BulkLength),
        ("*1\r\n$9999999999999999999999\r\n", ProtocolError::BulkLength),
        ("*1\r\n$2\r\nabcd\r\n", ProtocolError::BulkEnd),
        ("*1\r\n$00000000000000000000000000000000000000", ProtocolError::LineLength),
        ("*00000000000000000000000000000000000000001", ProtocolError::LineLength),
    ];
    for (text, error) in cases {
        assert_eq!(read(text.as_bytes(), &[]), Err(error), "{text:?}");
    }
    assert_eq!(read(&[b'x'; LINE_BYTES_MAX + 1], &[]), Err(ProtocolError::LineLength));
}

#[test]
fn a_command_has_a_longest_length() {
    let argument = vec![b'v'; BULK_BYTES_MAX];
    assert_eq!(read(&encode(&[vec![argument.clone(); 3]]), &[]).expect("fits").len(), 1);
    assert_eq!(read(&encode(&[vec![argument; 4]]), &[]), Err(ProtocolError::CommandLength));
}

#[test]
fn empty_arrays_are_no_command() {
    assert_eq!(read(b"*0\r\n*-1\r\nPING\r\n", &[]), Ok(vec![vec![], vec![], vec![b"PING".to_vec()]]));
}

proptest! {
    #[test]
    fn any_commands_arrive_in_any_pieces(
        commands in prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..6), 0..8),
        cuts in prop::collection::vec(any::<usize>(), 0..20),
    ) {
        prop_assert_eq!(read(&encode(&commands), &cuts), Ok(commands));
    }

    #[test]
    fn garbage_gives_the_same_in_any_pieces(
        input in prop::collection::vec(
            prop_oneof![any::<u8>(), Just(b'\r'), Just(b'\n'), Just(b'*'), Just(b'$'), Just(b'1'), Just(b'"')],
            0..200,
        ),
        cuts in prop::collection::vec(any::<usize>(), 0..20),
    ) {
        prop_assert_eq!(read(&input, &cuts), read(&input, &[]));
    }

    #[test]
    fn a_flipped_byte_never_panics(
        commands in prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..10), 1..4), 1..4),
        place in any::<usize>(),
        byte: u8,
    ) {
        let mut input = encode(&commands);
        let place = place % input.len();
        input[place] = byte;
        let _ = read(&input, &[]);
    }
}

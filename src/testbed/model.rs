//! What the server must hold and answer, as far as one connection's own keys go.

use super::resp::{self, Excerpt, Reply};
use super::rng::Rng;

/// Keys with strings per connection.
const STRINGS: usize = 64;
/// Keys with numbers per connection.
const COUNTERS: usize = 16;
/// Most keys in one MGET or DEL.
const KEYS_MAX: u64 = 6;

/// A key of this connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Number of a key with a string.
    Text(usize),
    /// Number of a key with a number.
    Counter(usize),
}

/// A command of the load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// `SET key value`
    Set(Key, Vec<u8>),
    /// `GET key`
    Get(Key),
    /// `INCR key`
    Incr(Key),
    /// `INCRBY key by`
    IncrBy(Key, i64),
    /// `MGET key …`
    MGet(Vec<Key>),
    /// `DEL key …`, each key once
    Del(Vec<Key>),
}

impl Command {
    /// Whether it changes anything.
    pub fn is_write(&self) -> bool {
        !matches!(self, Command::Get(_) | Command::MGet(_))
    }

    /// The keys it names.
    pub fn keys(&self) -> &[Key] {
        match self {
            Command::Set(key, _) | Command::Get(key) | Command::Incr(key) | Command::IncrBy(key, _) => {
                std::slice::from_ref(key)
            }
            Command::MGet(keys) | Command::Del(keys) => keys,
        }
    }
}

/// The keys of one connection and what they must hold.
#[derive(Debug)]
pub struct Model {
    prefix: String,
    texts: Vec<Option<Vec<u8>>>,
    counters: Vec<Option<i64>>,
    /// Keys of writes whose reply never came: they may hold the old or the new.
    uncertain: Vec<Key>,
    writes: u64,
    /// Replies taken so far, and a hash over them all, in order.
    chain: Chain,
}

/// A number and a hash that stand for all replies of a connection, in order. Every value written
/// carries them, so that a value read back proves what its writer had been told before: state that
/// was rolled back shows, wherever it came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Chain {
    replies: u64,
    hash: u64,
}

impl Chain {
    fn add(&mut self, reply: &Reply) {
        const PRIME: u64 = 0x0100_0000_01b3;
        self.replies += 1;
        for byte in self.replies.to_le_bytes().into_iter().chain(format!("{reply:?}").into_bytes()) {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(PRIME).rotate_left(5);
        }
    }
}

impl Model {
    /// A model of keys that begin with `prefix`, none of which exists.
    pub fn new(prefix: impl Into<String>) -> Model {
        Model {
            prefix: prefix.into(),
            texts: vec![None; STRINGS],
            counters: vec![None; COUNTERS],
            uncertain: Vec::new(),
            writes: 0,
            chain: Chain::default(),
        }
    }

    /// Every key there may be.
    pub fn keys(&self) -> impl Iterator<Item = Key> + use<> {
        (0..STRINGS).map(Key::Text).chain((0..COUNTERS).map(Key::Counter))
    }

    /// The name of `key` on the server.
    pub fn name(&self, key: Key) -> String {
        match key {
            Key::Text(number) => format!("{}:text:{number}", self.prefix),
            Key::Counter(number) => format!("{}:counter:{number}", self.prefix),
        }
    }

    /// A random command.
    pub fn draw(&mut self, rng: &mut Rng) -> Command {
        let text = Key::Text(rng.index(STRINGS));
        let counter = Key::Counter(rng.index(COUNTERS));
        match rng.below(100) {
            0..30 => Command::Set(text, self.draw_value(rng)),
            30..55 => Command::Get(if rng.chance(70) { text } else { counter }),
            55..75 => Command::Incr(counter),
            75..83 => Command::IncrBy(counter, rng.below(2001) as i64 - 1000),
            83..95 => Command::MGet((0..=rng.below(KEYS_MAX)).map(|_| Key::Text(rng.index(STRINGS))).collect()),
            _ => {
                // Neighbours, so that no key is named twice.
                let first = rng.index(STRINGS);
                let mut keys: Vec<Key> = (0..=rng.index(3)).map(|n| Key::Text((first + n) % STRINGS)).collect();
                if rng.chance(20) {
                    keys.push(counter);
                }
                Command::Del(keys)
            }
        }
    }

    /// Links the next reply to all before it; later values carry that.
    pub fn heard(&mut self, reply: &Reply) {
        self.chain.add(reply);
    }

    /// A value no other write ever has, of very different lengths.
    fn draw_value(&mut self, rng: &mut Rng) -> Vec<u8> {
        self.writes += 1;
        let Chain { replies, hash } = self.chain;
        let mut value = format!("{}#{} {replies}~{hash:016x} ", self.prefix, self.writes).into_bytes();
        let more = if rng.chance(3) { rng.index(4000) } else { rng.index(200) };
        let more = value.len() + more;
        while value.len() < more {
            value.extend_from_slice(&rng.next_u64().to_le_bytes());
        }
        value.truncate(more);
        value
    }

    /// Applies `command` and tells the one right reply to it.
    pub fn apply(&mut self, command: &Command) -> Reply {
        match command {
            Command::Set(key, value) => {
                match *key {
                    Key::Text(number) => put(&mut self.texts, number, Some(value.clone())),
                    Key::Counter(number) => {
                        let value = std::str::from_utf8(value).ok().and_then(|value| value.parse().ok());
                        put(&mut self.counters, number, value);
                    }
                }
                Reply::ok()
            }
            Command::Get(key) => Reply::Bulk(self.value(*key)),
            Command::Incr(key) => self.add(*key, 1),
            Command::IncrBy(key, by) => self.add(*key, *by),
            Command::MGet(keys) => Reply::Array(keys.iter().map(|key| Reply::Bulk(self.value(*key))).collect()),
            Command::Del(keys) => {
                let there = keys.iter().filter(|key| self.value(**key).is_some()).count();
                for key in keys {
                    match *key {
                        Key::Text(number) => put(&mut self.texts, number, None),
                        Key::Counter(number) => put(&mut self.counters, number, None),
                    }
                }
                Reply::Integer(there as i64)
            }
        }
    }

    fn add(&mut self, key: Key, by: i64) -> Reply {
        let Key::Counter(number) = key else {
            return Reply::Error(b"ERR value is not an integer or out of range".to_vec());
        };
        let sum = self.counters.get(number).copied().flatten().unwrap_or(0).wrapping_add(by);
        put(&mut self.counters, number, Some(sum));
        Reply::Integer(sum)
    }

    /// What `key` must hold.
    pub fn value(&self, key: Key) -> Option<Vec<u8>> {
        match key {
            Key::Text(number) => self.texts.get(number).cloned().flatten(),
            Key::Counter(number) => self.counters.get(number).copied().flatten().map(|n| n.to_string().into_bytes()),
        }
    }

    /// Notes that the reply to `command` will never come.
    pub fn doubt(&mut self, command: &Command) {
        if command.is_write() {
            self.uncertain.extend_from_slice(command.keys());
        }
    }

    /// Whether the model knows what `key` must hold.
    pub fn is_certain(&self, key: Key) -> bool {
        !self.uncertain.contains(&key)
    }

    fn words(&self, command: &Command) -> Vec<Vec<u8>> {
        let verb: &[u8] = match command {
            Command::Set(..) => b"SET",
            Command::Get(_) => b"GET",
            Command::Incr(_) => b"INCR",
            Command::IncrBy(..) => b"INCRBY",
            Command::MGet(_) => b"MGET",
            Command::Del(_) => b"DEL",
        };
        let names = command.keys().iter().map(|key| self.name(*key).into_bytes());
        let argument = match command {
            Command::Set(_, value) => Some(value.clone()),
            Command::IncrBy(_, by) => Some(by.to_string().into_bytes()),
            _ => None,
        };
        std::iter::once(verb.to_vec()).chain(names).chain(argument).collect()
    }

    /// Appends `command` to `out` as the server reads it.
    pub fn encode(&self, command: &Command, out: &mut Vec<u8>) {
        resp::encode(out, &self.words(command));
    }

    /// `command` as a person reads it.
    pub fn describe(&self, command: &Command) -> String {
        let words: Vec<String> = self.words(command).iter().map(|word| Excerpt(word).to_string()).collect();
        words.join(" ")
    }
}

fn put<T>(list: &mut [Option<T>], number: usize, value: Option<T>) {
    if let Some(place) = list.get_mut(number) {
        *place = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_answers_as_redis_does() {
        let mut model = Model::new("c0");
        let (text, counter) = (Key::Text(3), Key::Counter(5));
        assert_eq!(model.apply(&Command::Get(text)), Reply::Bulk(None));
        assert_eq!(model.apply(&Command::Set(text, b"v".to_vec())), Reply::ok());
        assert_eq!(model.apply(&Command::Incr(counter)), Reply::Integer(1));
        assert_eq!(model.apply(&Command::IncrBy(counter, -5)), Reply::Integer(-4));
        assert_eq!(
            model.apply(&Command::MGet(vec![text, counter, Key::Text(0)])),
            Reply::Array(vec![Reply::Bulk(Some(b"v".to_vec())), Reply::Bulk(Some(b"-4".to_vec())), Reply::Bulk(None)])
        );
        assert_eq!(model.apply(&Command::Del(vec![text, Key::Text(4), counter])), Reply::Integer(2));
        assert_eq!(model.apply(&Command::Get(counter)), Reply::Bulk(None));
    }

    #[test]
    fn a_seed_gives_the_same_commands_and_no_value_comes_twice() {
        let draw = |seed| {
            let (mut model, mut rng) = (Model::new("c1"), Rng::new(seed));
            (0..500).map(|_| model.draw(&mut rng)).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        let mut values: Vec<_> = draw(7)
            .into_iter()
            .filter_map(|c| if let Command::Set(_, value) = c { Some(value) } else { None })
            .collect();
        let count = values.len();
        assert!(count > 100);
        values.sort();
        values.dedup();
        assert_eq!(values.len(), count);
    }

    #[test]
    fn values_carry_what_was_heard_before() {
        let write = |heard: &[&[u8]]| {
            let mut model = Model::new("c3");
            heard.iter().for_each(|text| model.heard(&Reply::Bulk(Some(text.to_vec()))));
            model.draw_value(&mut Rng::new(1))
        };
        assert_eq!(write(&[b"a", b"b"]), write(&[b"a", b"b"]));
        assert_ne!(write(&[b"a", b"b"]), write(&[b"b", b"a"]));
        assert_ne!(write(&[b"ab"]), write(&[b"a", b"b"]));
    }

    #[test]
    fn commands_are_described_in_one_line() {
        let model = Model::new("c2");
        assert_eq!(model.describe(&Command::IncrBy(Key::Counter(1), -4)), "INCRBY c2:counter:1 -4");
        assert_eq!(model.describe(&Command::Set(Key::Text(1), b"x\r\ny".to_vec())), r"SET c2:text:1 x\r\ny");
        assert_eq!(model.describe(&Command::MGet(vec![Key::Text(1), Key::Text(2)])), "MGET c2:text:1 c2:text:2");
    }
}

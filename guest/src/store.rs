//! The key-value store: a linear hash table.
//!
//! It grows by splitting one bucket at a time, so no command ever waits for a whole table to be
//! copied (and a checkpoint never sees a whole table dirtied), and every piece of memory is asked
//! for in a way that can fail.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::mem;

use crate::bytes::{Decimal, OutOfMemory, boxed, parse_integer, push};

/// Buckets a table starts with; a power of two.
const BUCKETS_AT_START: usize = 512;
/// Buckets in one segment of the table; [`BUCKETS_AT_START`] or a divisor of it.
const SEGMENT_BUCKETS: usize = 512;
/// Entries per bucket, on average, above which a bucket is split.
const LOAD_MAX: usize = 2;
/// Buckets of a flushed table that [`Store::tidy`] frees at once.
const TIDY_BUCKETS: usize = 512;

/// What a key holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A counter that `INCR` made; its text is its decimal form.
    Integer(i64),
    /// Any bytes.
    Bytes(Box<[u8]>),
}

impl Value {
    /// Calls `f` with the value's bytes.
    pub fn with_bytes<R>(&self, f: impl FnOnce(&[u8]) -> R) -> R {
        match self {
            Value::Integer(value) => f(Decimal::new(*value).as_bytes()),
            Value::Bytes(bytes) => f(bytes),
        }
    }

    fn as_integer(&self) -> Option<i64> {
        match self {
            Value::Integer(value) => Some(*value),
            Value::Bytes(bytes) => parse_integer(bytes),
        }
    }
}

/// Why a counter was not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CounterError {
    /// The value is no integer.
    NotAnInteger,
    /// The sum does not fit.
    Overflow,
    /// There is not enough memory.
    Memory,
}

struct Entry {
    hash: u64,
    key: Box<[u8]>,
    value: Value,
}

type Bucket = Vec<Entry>;
type Segment = Box<[Bucket]>;

/// Keys and their values.
pub struct Store {
    segments: Vec<Segment>,
    /// Buckets in use: [`BUCKETS_AT_START`] at first, one more with each split.
    buckets: usize,
    entries: usize,
    seed: u64,
    /// Flushed segments whose entries are still to be freed.
    garbage: Vec<Segment>,
}

impl Store {
    /// An empty store; `seed` keeps clients from guessing which keys collide.
    pub fn new(seed: u64) -> Store {
        Store { segments: Vec::new(), buckets: 0, entries: 0, seed, garbage: Vec::new() }
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// What `key` holds.
    pub fn get(&self, key: &[u8]) -> Option<&Value> {
        let hash = self.hash(key);
        let bucket = self.bucket(self.place(hash)?)?;
        bucket.iter().find(|entry| entry.hash == hash && *entry.key == *key).map(|entry| &entry.value)
    }

    /// Makes `key` hold `bytes`.
    ///
    /// # Errors
    /// [`OutOfMemory`]; the key holds what it held.
    pub fn set(&mut self, key: &[u8], bytes: &[u8]) -> Result<(), OutOfMemory> {
        let hash = self.hash(key);
        if let Some(value) = self.find_mut(key, hash) {
            match value {
                // The same length again, as counters and benchmarks do: no need to move it.
                Value::Bytes(old) if old.len() == bytes.len() => old.copy_from_slice(bytes),
                _ => *value = Value::Bytes(boxed(bytes)?),
            }
            return Ok(());
        }
        let value = Value::Bytes(boxed(bytes)?);
        self.insert(key, hash, value)
    }

    /// Makes `key` hold `bytes` and gives what it held.
    ///
    /// # Errors
    /// [`OutOfMemory`]; the key holds what it held.
    pub fn replace(&mut self, key: &[u8], bytes: &[u8]) -> Result<Option<Value>, OutOfMemory> {
        let hash = self.hash(key);
        let new = Value::Bytes(boxed(bytes)?);
        match self.find_mut(key, hash) {
            Some(value) => Ok(Some(mem::replace(value, new))),
            None => self.insert(key, hash, new).map(|()| None),
        }
    }

    /// Adds `amount` to the counter `key`, which starts at 0.
    ///
    /// # Errors
    /// [`CounterError`]; the key holds what it held.
    pub fn add(&mut self, key: &[u8], amount: i64) -> Result<i64, CounterError> {
        let hash = self.hash(key);
        if let Some(value) = self.find_mut(key, hash) {
            let old = value.as_integer().ok_or(CounterError::NotAnInteger)?;
            let sum = old.checked_add(amount).ok_or(CounterError::Overflow)?;
            *value = Value::Integer(sum);
            return Ok(sum);
        }
        self.insert(key, hash, Value::Integer(amount)).map_err(|_| CounterError::Memory)?;
        Ok(amount)
    }

    /// Removes `key`. Whether it was there.
    pub fn remove(&mut self, key: &[u8]) -> bool {
        let hash = self.hash(key);
        let Some(bucket) = self.place(hash).and_then(|place| self.bucket_mut(place)) else { return false };
        let Some(index) = bucket.iter().position(|entry| entry.hash == hash && *entry.key == *key) else {
            return false;
        };
        bucket.swap_remove(index);
        if bucket.is_empty() {
            *bucket = Vec::new();
        }
        self.entries -= 1;
        true
    }

    /// Forgets every key. Their memory comes back as [`Store::tidy`] is called.
    pub fn clear(&mut self) {
        self.tidy_all();
        self.garbage = mem::take(&mut self.segments);
        self.buckets = 0;
        self.entries = 0;
    }

    /// Frees some of what [`Store::clear`] left. Whether there is more.
    pub fn tidy(&mut self) -> bool {
        for _ in 0..TIDY_BUCKETS.div_ceil(SEGMENT_BUCKETS) {
            drop(self.garbage.pop());
        }
        if self.garbage.is_empty() {
            self.garbage = Vec::new();
        }
        !self.garbage.is_empty()
    }

    /// Frees all of what [`Store::clear`] left. Whether there was anything.
    pub fn tidy_all(&mut self) -> bool {
        let had_garbage = !self.garbage.is_empty();
        while self.tidy() {}
        had_garbage
    }

    /// A number that depends on every key and value, but neither on their order nor on the store's
    /// history.
    pub fn digest(&self) -> u64 {
        let mut sum = 0u64;
        for entry in self.segments.iter().flatten().flatten() {
            let key = hash_bytes(0, &entry.key);
            sum = sum.wrapping_add(entry.value.with_bytes(|bytes| hash_bytes(key, bytes)));
        }
        sum
    }

    fn hash(&self, key: &[u8]) -> u64 {
        hash_bytes(self.seed, key)
    }

    /// The bucket for `hash`; none in a table that has no bucket yet.
    fn place(&self, hash: u64) -> Option<usize> {
        // With 2^k <= buckets < 2^(k+1), buckets below `buckets - 2^k` are split already: those use
        // one bit more.
        let low = 1usize << self.buckets.checked_ilog2()?;
        let wide = hash as usize & (low * 2 - 1);
        Some(if wide < self.buckets { wide } else { wide & (low - 1) })
    }

    fn bucket(&self, place: usize) -> Option<&Bucket> {
        self.segments.get(place / SEGMENT_BUCKETS)?.get(place % SEGMENT_BUCKETS)
    }

    fn bucket_mut(&mut self, place: usize) -> Option<&mut Bucket> {
        self.segments.get_mut(place / SEGMENT_BUCKETS)?.get_mut(place % SEGMENT_BUCKETS)
    }

    fn find_mut(&mut self, key: &[u8], hash: u64) -> Option<&mut Value> {
        let place = self.place(hash)?;
        let bucket = self.bucket_mut(place)?;
        bucket.iter_mut().find(|entry| entry.hash == hash && *entry.key == *key).map(|entry| &mut entry.value)
    }

    /// Adds a key that is not there.
    fn insert(&mut self, key: &[u8], hash: u64, value: Value) -> Result<(), OutOfMemory> {
        if self.buckets == 0 {
            while self.segments.len() * SEGMENT_BUCKETS < BUCKETS_AT_START {
                self.add_segment()?;
            }
            self.buckets = BUCKETS_AT_START;
        }
        let entry = Entry { hash, key: boxed(key)?, value };
        let place = self.place(hash).ok_or(OutOfMemory)?;
        let bucket = self.bucket_mut(place).ok_or(OutOfMemory)?;
        bucket.try_reserve_exact(1).map_err(|_| OutOfMemory)?;
        bucket.push(entry);
        self.entries += 1;
        if self.entries > self.buckets * LOAD_MAX {
            // A split that finds no memory is made up for by a later one; the table only gets
            // slower.
            let _ = self.split();
        }
        Ok(())
    }

    /// Adds one bucket and moves to it what belongs there, all from one other bucket.
    fn split(&mut self) -> Result<(), OutOfMemory> {
        let new = self.buckets;
        let low = 1usize << new.checked_ilog2().ok_or(OutOfMemory)?;
        if new / SEGMENT_BUCKETS >= self.segments.len() {
            self.add_segment()?;
        }
        let old_bucket = self.bucket_mut(new - low).ok_or(OutOfMemory)?;
        let stays = |entry: &Entry| entry.hash as usize & (low * 2 - 1) != new;
        let staying = old_bucket.iter().filter(|entry| stays(entry)).count();
        let (mut kept, mut moved) = (Vec::new(), Vec::new());
        kept.try_reserve_exact(staying).map_err(|_| OutOfMemory)?;
        moved.try_reserve_exact(old_bucket.len() - staying).map_err(|_| OutOfMemory)?;
        for entry in old_bucket.drain(..) {
            if stays(&entry) { kept.push(entry) } else { moved.push(entry) }
        }
        *old_bucket = kept;
        *self.bucket_mut(new).ok_or(OutOfMemory)? = moved;
        self.buckets += 1;
        Ok(())
    }

    fn add_segment(&mut self) -> Result<(), OutOfMemory> {
        let mut segment = Vec::new();
        segment.try_reserve_exact(SEGMENT_BUCKETS).map_err(|_| OutOfMemory)?;
        segment.resize_with(SEGMENT_BUCKETS, Vec::new);
        push(&mut self.segments, segment.into_boxed_slice())
    }
}

/// A 64-bit hash: eight bytes at a time, multiplied and folded.
fn hash_bytes(seed: u64, bytes: &[u8]) -> u64 {
    const FIRST: u64 = 0x9E37_79B9_7F4A_7C15;
    const SECOND: u64 = 0xD6E8_FEB8_6659_FD93;
    let fold = |a: u64, b: u64| {
        let product = u128::from(a) * u128::from(b);
        product as u64 ^ (product >> 64) as u64
    };
    let mut state = seed ^ FIRST ^ (bytes.len() as u64).wrapping_mul(SECOND);
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let word = chunk.try_into().map_or(0, u64::from_le_bytes);
        state = fold(state ^ word, FIRST).wrapping_add(SECOND);
    }
    let mut tail = [0; 8];
    for (to, from) in tail.iter_mut().zip(chunks.remainder()) {
        *to = *from;
    }
    state = fold(state ^ u64::from_le_bytes(tail), FIRST);
    fold(state ^ SECOND, SECOND)
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;

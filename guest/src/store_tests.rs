use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn text(store: &Store, key: &[u8]) -> Option<Vec<u8>> {
    store.get(key).map(|value| value.with_bytes(<[u8]>::to_vec))
}

#[derive(Clone, Debug)]
enum Step {
    Set(u16, Vec<u8>),
    Add(u16, i64),
    Remove(u16),
    Clear,
    Tidy,
}

fn step() -> impl Strategy<Value = Step> {
    let key = 0u16..200;
    prop_oneof![
        6 => (key.clone(), prop::collection::vec(any::<u8>(), 0..12)).prop_map(|(k, v)| Step::Set(k, v)),
        2 => (key.clone(), any::<i64>()).prop_map(|(k, v)| Step::Set(k, v.to_string().into_bytes())),
        4 => (key.clone(), any::<i64>()).prop_map(|(k, v)| Step::Add(k, v)),
        3 => key.prop_map(Step::Remove),
        1 => Just(Step::Clear),
        1 => Just(Step::Tidy),
    ]
}

proptest! {
    #[test]
    fn behaves_like_a_map(steps in prop::collection::vec(step(), 0..400)) {
        let mut store = Store::new(7);
        let mut model: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
        for step in steps {
            match step {
                Step::Set(key, value) => {
                    store.set(&key.to_le_bytes(), &value).expect("memory");
                    model.insert(key.to_le_bytes().to_vec(), value);
                }
                Step::Add(key, amount) => {
                    let key = key.to_le_bytes();
                    let old = model.get(&key[..]).map_or(Some(0), |v| parse_integer(v));
                    let expected = match old {
                        None => Err(CounterError::NotAnInteger),
                        Some(old) => old.checked_add(amount).ok_or(CounterError::Overflow),
                    };
                    prop_assert_eq!(store.add(&key, amount), expected);
                    if let Ok(sum) = expected {
                        model.insert(key.to_vec(), sum.to_string().into_bytes());
                    }
                }
                Step::Remove(key) => {
                    let key = key.to_le_bytes();
                    prop_assert_eq!(store.remove(&key), model.remove(&key[..]).is_some());
                }
                Step::Clear => {
                    store.clear();
                    model.clear();
                }
                Step::Tidy => {
                    store.tidy();
                }
            }
            prop_assert_eq!(store.len(), model.len());
        }
        for (key, value) in &model {
            let found = text(&store, key);
            prop_assert_eq!(found.as_ref(), Some(value));
        }
    }
}

#[test]
fn many_keys_survive_many_splits() {
    let mut store = Store::new(1);
    for number in 0..50_000u32 {
        store.set(&number.to_le_bytes(), &number.to_be_bytes()).expect("memory");
    }
    assert!(store.buckets > 20_000, "{}", store.buckets);
    for number in 0..50_000u32 {
        assert_eq!(text(&store, &number.to_le_bytes()), Some(number.to_be_bytes().to_vec()));
    }
    let longest = store.segments.iter().flatten().map(Vec::len).max();
    assert!(longest < Some(20), "{longest:?}");
    store.clear();
    assert!(store.is_empty());
    assert!(store.get(&1u32.to_le_bytes()).is_none());
    store.set(b"a", b"b").expect("memory");
    while store.tidy() {}
    assert_eq!(text(&store, b"a"), Some(b"b".to_vec()));
}

#[test]
fn the_digest_knows_content_only() {
    let (mut one, mut other) = (Store::new(1), Store::new(2));
    for number in 0..3000u32 {
        one.set(&number.to_le_bytes(), b"x").expect("memory");
        other.set(&(2999 - number).to_le_bytes(), b"x").expect("memory");
    }
    one.set(b"n", b"5").expect("memory");
    other.add(b"n", 5).expect("counter");
    assert_eq!(one.digest(), other.digest());
    other.set(&7u32.to_le_bytes(), b"y").expect("memory");
    assert_ne!(one.digest(), other.digest());
}

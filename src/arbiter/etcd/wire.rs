//! What etcd's JSON gateway is asked, and what it answers. Keys and values are base64, numbers are
//! strings, and what is false, zero or empty is left out.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::{Value, json};

/// A question: where to post what.
pub(super) struct Call {
    pub(super) path: &'static str,
    pub(super) body: Vec<u8>,
}

/// An answer that is understood.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// The transaction put the new value.
    Swapped,
    /// The value of the key, or none: read, or found instead of the expected one.
    Value(Option<Vec<u8>>),
}

impl Call {
    /// Reads `key` as the whole cluster knows it (linearizable is what etcd does unless asked
    /// otherwise).
    pub(super) fn range(key: &str) -> Call {
        Call::new("/v3/kv/range", &json!({ "key": BASE64.encode(key) }))
    }

    /// Puts `new` if the value is `expected` (none: if there is no such key), and else reads the
    /// value, in one step.
    pub(super) fn swap(key: &str, expected: Option<&str>, new: &str) -> Call {
        let key = BASE64.encode(key);
        let compare = match expected {
            Some(value) => json!({ "key": key, "target": "VALUE", "result": "EQUAL", "value": BASE64.encode(value) }),
            None => json!({ "key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0" }),
        };
        let put = json!({ "request_put": { "key": key, "value": BASE64.encode(new) } });
        let get = json!({ "request_range": { "key": key } });
        Call::new("/v3/kv/txn", &json!({ "compare": [compare], "success": [put], "failure": [get] }))
    }

    /// Asks for a token.
    pub(super) fn authenticate(user: &str, password: &str) -> Call {
        Call::new("/v3/auth/authenticate", &json!({ "name": user, "password": password }))
    }

    fn new(path: &'static str, body: &Value) -> Call {
        Call { path, body: body.to_string().into_bytes() }
    }
}

#[derive(Deserialize)]
struct KeyValue {
    #[serde(default)]
    value: String,
}

#[derive(Deserialize)]
struct Range {
    #[serde(default)]
    kvs: Vec<KeyValue>,
}

#[derive(Deserialize)]
struct Response {
    #[serde(alias = "responseRange")]
    response_range: Option<Range>,
}

/// The answers to a range, a transaction and an authentication, which share no field but this one
/// that all must have.
#[derive(Deserialize)]
struct Answer {
    header: Option<Value>,
    #[serde(default)]
    kvs: Vec<KeyValue>,
    #[serde(default)]
    succeeded: bool,
    responses: Option<Vec<Response>>,
    token: Option<String>,
}

/// Understands the answer to [`Call::range`] or [`Call::swap`]. `None` if it is none: then nothing
/// is known.
pub(super) fn reply(call: &Call, body: &[u8]) -> Option<Reply> {
    let answer = answer(body)?;
    if call.path == "/v3/kv/range" {
        return value(answer.kvs).map(Reply::Value);
    }
    if answer.succeeded {
        return Some(Reply::Swapped);
    }
    // A swap that failed always shows what it found; an answer that does not is not believed.
    let range = answer.responses?.into_iter().next()?.response_range?;
    value(range.kvs).map(Reply::Value)
}

/// The token in the answer to [`Call::authenticate`].
pub(super) fn token(body: &[u8]) -> Option<String> {
    answer(body)?.token.filter(|token| !token.is_empty())
}

/// What etcd complains of, in its own words.
pub(super) fn complaint(body: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(body).ok()?;
    // Older and newer releases use the one, the other, or both.
    ["error", "message"].iter().find_map(|field| value.get(field)?.as_str().map(str::to_owned))
}

fn answer(body: &[u8]) -> Option<Answer> {
    serde_json::from_slice(body).ok().filter(|answer: &Answer| answer.header.is_some())
}

fn value(kvs: Vec<KeyValue>) -> Option<Option<Vec<u8>>> {
    match kvs.as_slice() {
        [] => Some(None),
        [only] => BASE64.decode(&only.value).ok().map(Some),
        _ => None,
    }
}

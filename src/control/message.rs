//! The messages of QMP: what a command looks like, and how greeting, reply, error and event are
//! written.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

/// QEMU's classes of errors. Clients branch on these; people read the description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// Everything that has no class of its own.
    GenericError,
    /// No such command, or not now.
    CommandNotFound,
    /// The device exists but is not active.
    DeviceNotActive,
    /// There is no such device.
    DeviceNotFound,
}

impl ErrorClass {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorClass::GenericError => "GenericError",
            ErrorClass::CommandNotFound => "CommandNotFound",
            ErrorClass::DeviceNotActive => "DeviceNotActive",
            ErrorClass::DeviceNotFound => "DeviceNotFound",
        }
    }
}

/// A command's refusal, as the client sees it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// What kind of error.
    pub class: ErrorClass,
    /// The sentence a person reads.
    pub desc: String,
}

impl QmpError {
    /// An error of class `GenericError`.
    pub fn generic(desc: impl Into<String>) -> QmpError {
        QmpError { class: ErrorClass::GenericError, desc: desc.into() }
    }

    /// An error of class `CommandNotFound`.
    pub fn not_found(desc: impl Into<String>) -> QmpError {
        QmpError { class: ErrorClass::CommandNotFound, desc: desc.into() }
    }
}

/// One command of a client.
#[derive(Debug, PartialEq)]
pub(super) struct Request {
    pub(super) command: String,
    pub(super) arguments: Map<String, Value>,
    pub(super) id: Option<Value>,
    /// Sent with `exec-oob`: answered ahead of the commands before it.
    pub(super) out_of_band: bool,
}

/// A command that could not be understood; the id as far as it was.
#[derive(Debug, PartialEq)]
pub(super) struct BadRequest {
    pub(super) error: QmpError,
    pub(super) id: Option<Value>,
}

/// Reads one command. `oob` is true if the client negotiated out-of-band execution.
pub(super) fn parse_request(bytes: &[u8], oob: bool) -> Result<Request, BadRequest> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|e| BadRequest { error: QmpError::generic(format!("JSON parse error, {e}")), id: None })?;
    let Value::Object(mut members) = value else {
        return Err(BadRequest { error: QmpError::generic("QMP input must be a JSON object"), id: None });
    };
    let id = members.remove("id");
    match parse_members(members, oob) {
        Ok((command, arguments, out_of_band)) => Ok(Request { command, arguments, id, out_of_band }),
        Err(desc) => Err(BadRequest { error: QmpError::generic(desc), id }),
    }
}

fn parse_members(mut members: Map<String, Value>, oob: bool) -> Result<(String, Map<String, Value>, bool), String> {
    let out_of_band = oob && members.contains_key("exec-oob");
    let key = if out_of_band { "exec-oob" } else { "execute" };
    let command = match members.remove(key) {
        Some(Value::String(command)) => command,
        Some(_) => return Err(format!("QMP input member '{key}' must be a string")),
        None if members.contains_key("exec-oob") => {
            return Err("QMP input member 'exec-oob' is unexpected: enable oob with qmp_capabilities first".to_owned());
        }
        None => return Err("QMP input lacks member 'execute'".to_owned()),
    };
    let arguments = match members.remove("arguments") {
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err("QMP input member 'arguments' must be an object".to_owned()),
        None => Map::new(),
    };
    match members.keys().next() {
        Some(key) => Err(format!("QMP input member '{}' is unexpected", shorten(key))),
        None => Ok((command, arguments, out_of_band)),
    }
}

/// A client's own words are put into errors, but not all of a megabyte.
pub(super) fn shorten(text: &str) -> String {
    const CHARS_MAX: usize = 64;
    if text.chars().count() <= CHARS_MAX {
        return text.to_owned();
    }
    text.chars().take(CHARS_MAX).chain("…".chars()).collect()
}

/// The version in QEMU's shape. `qemu` is where clients look for the numbers; `package` says whose
/// they are.
pub(super) fn version() -> Value {
    let number = |text: &str| text.parse::<u64>().unwrap_or(0);
    json!({
        "qemu": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("mcd ", env!("CARGO_PKG_VERSION")),
    })
}

/// The first line a client hears.
pub(super) fn greeting() -> Vec<u8> {
    line(&json!({"QMP": {"version": version(), "capabilities": ["oob"]}}))
}

/// The answer to a command, with the command's id.
pub(super) fn reply(result: Result<Value, QmpError>, id: Option<Value>) -> Vec<u8> {
    let mut members = Map::new();
    match result {
        // QEMU's way to say "done, nothing to tell" is an empty object.
        Ok(Value::Null) => members.insert("return".to_owned(), json!({})),
        Ok(value) => members.insert("return".to_owned(), value),
        Err(e) => members.insert("error".to_owned(), json!({"class": e.class.as_str(), "desc": e.desc})),
    };
    if let Some(id) = id {
        members.insert("id".to_owned(), id);
    }
    line(&Value::Object(members))
}

/// An event, stamped with the time of day. Without data (`Null`), the member is left out, as QEMU
/// does.
pub(super) fn event(name: &str, data: Value, now: SystemTime) -> Vec<u8> {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut members = Map::new();
    members.insert("event".to_owned(), Value::from(name));
    if !data.is_null() {
        members.insert("data".to_owned(), data);
    }
    members.insert("timestamp".to_owned(), json!({"seconds": since.as_secs(), "microseconds": since.subsec_micros()}));
    line(&Value::Object(members))
}

fn line(value: &Value) -> Vec<u8> {
    let mut bytes = value.to_string().into_bytes();
    bytes.extend_from_slice(b"\r\n");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn error_of(text: &str, oob: bool) -> String {
        parse_request(text.as_bytes(), oob).unwrap_err().error.desc
    }

    #[test]
    fn commands_are_read_as_qemu_reads_them() {
        let request = parse_request(br#"{"execute":"stop","id":[1,"x"],"arguments":{"a":1}}"#, false).unwrap();
        assert_eq!(request.command, "stop");
        assert_eq!(request.id, Some(json!([1, "x"])));
        assert_eq!(request.arguments.get("a"), Some(&json!(1)));
        assert!(!request.out_of_band);
        assert!(parse_request(br#"{"exec-oob":"stop"}"#, true).unwrap().out_of_band);
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(error_of("[]", false), "QMP input must be a JSON object");
        assert_eq!(error_of("{}", false), "QMP input lacks member 'execute'");
        assert_eq!(error_of(r#"{"execute":1}"#, false), "QMP input member 'execute' must be a string");
        assert_eq!(
            error_of(r#"{"execute":"a","arguments":[]}"#, false),
            "QMP input member 'arguments' must be an object"
        );
        assert_eq!(error_of(r#"{"execute":"a","foo":1}"#, false), "QMP input member 'foo' is unexpected");
        assert_eq!(error_of(r#"{"execute":"a","exec-oob":"b"}"#, true), "QMP input member 'execute' is unexpected");
        assert!(error_of(r#"{"exec-oob":"a"}"#, false).contains("enable oob"));
        assert!(error_of("{]", false).starts_with("JSON parse error"));
        assert!(error_of(&format!(r#"{{"execute":"a","{}":1}}"#, "x".repeat(5000)), false).len() < 200);
    }

    #[test]
    fn the_id_comes_back_with_an_error() {
        assert_eq!(parse_request(br#"{"id":7}"#, false).unwrap_err().id, Some(json!(7)));
    }

    #[test]
    fn messages_have_qemus_shape() {
        let parse = |bytes: Vec<u8>| serde_json::from_slice::<Value>(&bytes).unwrap();
        assert_eq!(parse(reply(Ok(Value::Null), Some(json!("a")))), json!({"return": {}, "id": "a"}));
        assert_eq!(
            parse(reply(Err(QmpError::not_found("no")), None)),
            json!({"error": {"class": "CommandNotFound", "desc": "no"}})
        );
        let then = UNIX_EPOCH + Duration::new(5, 7_000);
        let stamp = json!({"seconds": 5, "microseconds": 7});
        assert_eq!(parse(event("STOP", Value::Null, then)), json!({"event": "STOP", "timestamp": stamp}));
        assert_eq!(parse(event("X", json!({"a":1}), then)), json!({"event": "X", "data": {"a":1}, "timestamp": stamp}));
        let hello = parse(greeting());
        assert_eq!(hello["QMP"]["capabilities"], json!(["oob"]));
        assert!(hello["QMP"]["version"]["qemu"]["major"].is_u64());
    }
}

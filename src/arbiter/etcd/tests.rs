use std::time::Duration;

use super::wire::{Call, Reply, complaint, reply, token};
use super::{EtcdArbiter, EtcdConfig};
use crate::arbiter::Arbiter;
use crate::protocol::types::GuestName;

fn range(body: &str) -> Option<Reply> {
    reply(&Call::range("/mcd/web"), body.as_bytes())
}

fn swap(body: &str) -> Option<Reply> {
    reply(&Call::swap("/mcd/web", None, "new"), body.as_bytes())
}

#[test]
fn questions_are_as_etcd_wants_them() {
    let text = |call: Call| String::from_utf8(call.body).unwrap();
    assert_eq!(text(Call::range("/mcd/web")), r#"{"key":"L21jZC93ZWI="}"#);
    let first: serde_json::Value = serde_json::from_str(&text(Call::swap("k", None, "new"))).unwrap();
    assert_eq!(first["compare"][0]["create_revision"], "0");
    assert_eq!(first["success"][0]["request_put"]["value"], "bmV3");
    assert_eq!(first["failure"][0]["request_range"]["key"], "aw==");
    let next: serde_json::Value = serde_json::from_str(&text(Call::swap("k", Some("old"), "new"))).unwrap();
    assert_eq!(next["compare"][0]["value"], "b2xk");
    assert_eq!(next["compare"][0]["target"], "VALUE");
}

#[test]
fn answers_are_understood() {
    // As etcd 3.4.23 sends them.
    let header = r#""header":{"cluster_id":"15","member_id":"13","revision":"2","raft_term":"2"}"#;
    let key_value = r#"{"key":"aw==","create_revision":"2","mod_revision":"2","version":"1","value":"aGVsbG8="}"#;
    let kvs = format!(r#""kvs":[{key_value}],"count":"1""#);
    assert_eq!(range(&format!("{{{header}}}")), Some(Reply::Value(None)));
    assert_eq!(range(&format!("{{{header},{kvs}}}")), Some(Reply::Value(Some(b"hello".to_vec()))));
    assert_eq!(
        swap(&format!(r#"{{{header},"succeeded":true,"responses":[{{"response_put":{{{header}}}}}]}}"#)),
        Some(Reply::Swapped)
    );
    for name in ["response_range", "responseRange"] {
        let found = |inner: &str| swap(&format!(r#"{{{header},"responses":[{{"{name}":{{{inner}}}}}]}}"#));
        assert_eq!(found(&format!("{header},{kvs}")), Some(Reply::Value(Some(b"hello".to_vec()))));
        assert_eq!(found(header), Some(Reply::Value(None)));
    }
    assert_eq!(token(format!(r#"{{{header},"token":"abc.1"}}"#).as_bytes()), Some("abc.1".into()));
    for both in [r#"{"error":"no","message":"no","code":9}"#, r#"{"code":9,"message":"no"}"#] {
        assert_eq!(complaint(both.as_bytes()), Some("no".into()));
    }
}

#[test]
fn what_is_no_answer_is_not_taken_for_one() {
    let header = r#""header":{"revision":"2"}"#;
    for bad in ["", "null", "[]", "{}", "<html>", r#"{"kvs":[]}"#, r#"{"header":null}"#, r#"{"header":{}"#] {
        assert_eq!(range(bad), None, "{bad}");
        assert_eq!(swap(bad), None, "{bad}");
        assert_eq!(token(bad.as_bytes()), None, "{bad}");
    }
    for bad in [
        r#""kvs":[{"value":"%%"}]"#,
        r#""kvs":[{"value":3}]"#,
        r#""kvs":[{"value":"YQ=="},{"value":"YQ=="}]"#,
        r#""kvs":{}"#,
    ] {
        assert_eq!(range(&format!("{{{header},{bad}}}")), None, "{bad}");
    }
    // A transaction that failed and does not show the record proves nothing.
    for bad in ["", r#","responses":[]"#, r#","responses":[{"response_put":{}}]"#, r#","succeeded":"yes""#] {
        assert_eq!(swap(&format!("{{{header}{bad}}}")), None, "{bad}");
    }
    assert_eq!(token(format!(r#"{{{header},"token":""}}"#).as_bytes()), None);
    assert_eq!(complaint(b"{}"), None);
}

#[test]
fn the_time_that_was_waited_is_told_and_not_the_one_that_was_allowed() {
    // A port that nobody listens on any more refuses at once.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = EtcdConfig {
        endpoints: vec![format!("http://{closed}")],
        prefix: "/mcd".to_owned(),
        tls: None,
        login: None,
        timeout: Duration::from_secs(3600),
    };
    let mut arbiter = EtcdArbiter::new(config, &GuestName::new("web").unwrap()).unwrap();
    let error = arbiter.read().unwrap_err().to_string();
    assert!(error.contains("no answer after ") && !error.contains("3600000 ms"), "{error}");
}

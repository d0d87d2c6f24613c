//! The `etcd:` arbiter with a real etcd, which is stopped, frozen, killed and restarted; and with
//! clients that race.

mod etcd;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use etcd::{Certificates, Etcd, ReservedPort, config, directory, guest, installed};
use mcd::arbiter::etcd::{EtcdArbiter, EtcdLogin, EtcdTls};
use mcd::arbiter::{Arbiter, ArbiterError, Swap};
use mcd::protocol::arbitration::{ArbiterAnswer, ArbiterRequest, Arbitration, Verdict};
use mcd::protocol::record::Record;
use mcd::protocol::types::{Generation, GuestName, InstanceId, Instant};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const P: InstanceId = InstanceId(1);
const S: InstanceId = InstanceId(2);

/// Long enough for any etcd that is going to answer.
const LONG_MS: u64 = 20_000;
/// Long enough for an etcd that is not.
const SHORT_MS: u64 = 200;

/// Tells a racer where to race, and who it is.
const RACE_URL: &str = "MCD_TEST_RACE_ETCD";
const RACE_INSTANCE: &str = "MCD_TEST_RACE_ETCD_INSTANCE";

/// The generation at which a race of processes is over.
const LAST: u64 = 4_000;

#[track_caller]
fn unreachable<T: std::fmt::Debug>(result: Result<T, ArbiterError>) -> String {
    let error = result.unwrap_err();
    assert!(matches!(error, ArbiterError::Unreachable { .. }), "{error}");
    let text = error.to_string();
    assert!(!text.contains('\n') && text.starts_with("arbiter etcd:"), "{text}");
    text
}

fn post(etcd: &Etcd, path: &str, body: &Value) {
    let answer = ureq::post(format!("{}{path}", etcd.url)).send(body.to_string()).unwrap();
    assert_eq!(answer.status(), 200);
}

#[test]
fn a_guests_life_is_a_chain_of_swaps() {
    if !installed() {
        return;
    }
    let directory = directory();
    let etcd = Etcd::alone(directory.path());
    let (mut one, mut other) = (etcd.arbiter(LONG_MS), etcd.arbiter(LONG_MS));
    let first = Record::first(P);
    let paired = first.next_paired(P, S);
    let solo = paired.next_solo(S);
    assert_eq!(one.read().unwrap(), None);
    assert_eq!(one.swap(Some(&first), &paired).unwrap(), Swap::Lost(None));
    assert_eq!(one.swap(None, &first).unwrap(), Swap::Won);
    assert_eq!(one.swap(None, &first).unwrap(), Swap::Lost(Some(first)));
    assert_eq!(one.swap(Some(&first), &paired).unwrap(), Swap::Won);
    assert_eq!(other.read().unwrap(), Some(paired));
    assert_eq!(other.swap(Some(&paired), &solo).unwrap(), Swap::Won);
    assert_eq!(one.swap(Some(&paired), &paired.next_solo(P)).unwrap(), Swap::Lost(Some(solo)));
    assert_eq!(one.swap(Some(&solo), &solo.next_stopped()).unwrap(), Swap::Won);
    // A record in its own place: so a primary finds out whether its arbiter can write.
    let stopped = solo.next_stopped();
    assert_eq!(one.swap(Some(&stopped), &stopped).unwrap(), Swap::Won);
    assert_eq!(one.swap(Some(&solo), &solo).unwrap(), Swap::Lost(Some(stopped)));
    // Another guest is another record, and so is another prefix.
    let mut neighbour = EtcdArbiter::new(config(&[&etcd.url], LONG_MS), &GuestName::new("web-2").unwrap()).unwrap();
    assert_eq!(neighbour.read().unwrap(), None);
    let elsewhere = mcd::arbiter::etcd::EtcdConfig { prefix: "/other".into(), ..config(&[&etcd.url], LONG_MS) };
    assert_eq!(EtcdArbiter::new(elsewhere, &guest()).unwrap().read().unwrap(), None);
}

#[test]
fn a_damaged_value_is_never_taken_for_a_missing_one() {
    if !installed() {
        return;
    }
    let directory = directory();
    let etcd = Etcd::alone(directory.path());
    let mut arbiter = etcd.arbiter(LONG_MS);
    for bad in ["", "garbage\n"] {
        let key = BASE64.encode(arbiter.key());
        post(&etcd, "/v3/kv/put", &json!({ "key": key, "value": BASE64.encode(bad) }));
        assert!(matches!(arbiter.read(), Err(ArbiterError::Corrupt { .. })));
        let error = arbiter.swap(None, &Record::first(P)).unwrap_err();
        assert!(matches!(error, ArbiterError::Corrupt { .. }));
        assert!(error.to_string().contains("etcd key /mcd/web"), "{error}");
    }
}

/// Not a test of its own: the process that [`each_generation_is_won_once`] starts several times.
#[test]
fn racer() {
    let (Ok(url), Ok(instance)) = (std::env::var(RACE_URL), std::env::var(RACE_INSTANCE)) else { return };
    let me = InstanceId(instance.parse().unwrap());
    let mut arbiter = EtcdArbiter::new(config(&[&url], LONG_MS), &guest()).unwrap();
    let mut wins = String::new();
    let mut stands = arbiter.read().unwrap();
    loop {
        let new = stands.map_or_else(|| Record::first(me), |record| record.next_solo(me));
        if new.generation > Generation(LAST) {
            break;
        }
        stands = match arbiter.swap(stands.as_ref(), &new).unwrap() {
            Swap::Won => {
                wins.push_str(&format!("won {}\n", new.generation.0));
                Some(new)
            }
            Swap::Lost(record) => record,
        };
    }
    io::stdout().write_all(wins.as_bytes()).unwrap();
}

fn start_racer(url: &str, instance: u32) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "racer", "--nocapture"])
        .env(RACE_URL, url)
        .env(RACE_INSTANCE, instance.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn each_generation_is_won_once() {
    if !installed() {
        return;
    }
    let directory = directory();
    let etcd = Etcd::alone(directory.path());
    let racers: Vec<_> = (1..=3).map(|instance| start_racer(&etcd.url, instance)).collect();
    let mut winners = BTreeMap::new();
    for (number, racer) in racers.into_iter().enumerate() {
        let output = racer.wait_with_output().unwrap();
        assert!(output.status.success(), "racer {number}");
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            if let Some(generation) = line.strip_prefix("won ") {
                let before = winners.insert(generation.parse::<u64>().unwrap(), number);
                assert_eq!(before, None, "generation {generation} was won twice");
            }
        }
    }
    assert_eq!(winners.keys().copied().collect::<Vec<_>>(), (1..=LAST).collect::<Vec<_>>());
    let last = etcd.arbiter(LONG_MS).read().unwrap().unwrap();
    assert_eq!((last.generation, last.owner), (Generation(LAST), InstanceId(winners[&LAST] as u128 + 1)));
}

/// Asks until there is an answer, as a node does. True if the swap was won.
fn settle(arbiter: &mut EtcdArbiter, expected: Option<&Record>, new: &Record) -> Result<(), Option<Record>> {
    loop {
        match arbiter.swap(expected, new) {
            Ok(Swap::Won) => return Ok(()),
            Ok(Swap::Lost(stands)) if stands.as_ref() == Some(new) => return Ok(()),
            Ok(Swap::Lost(stands)) => return Err(stands),
            Err(error) => drop(unreachable::<()>(Err(error))),
        }
    }
}

#[test]
fn no_generation_is_won_twice_while_etcd_is_killed_again_and_again() {
    if !installed() {
        return;
    }
    let directory = directory();
    let mut etcd = Etcd::alone(directory.path());
    let over = AtomicBool::new(false);
    let kills = 4;
    let wins: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let racers: Vec<_> = [P, S]
            .map(|me| {
                let (over, mut arbiter) = (&over, etcd.arbiter(1_000));
                scope.spawn(move || {
                    let (mut wins, mut stands) = (Vec::new(), None::<Record>);
                    while !over.load(Ordering::Relaxed) {
                        let new = stands.map_or_else(|| Record::first(me), |record| record.next_solo(me));
                        stands = match settle(&mut arbiter, stands.as_ref(), &new) {
                            Ok(()) => {
                                wins.push(new.generation.0);
                                Some(new)
                            }
                            Err(stands) => stands,
                        };
                    }
                    wins
                })
            })
            .into_iter()
            .collect();
        let mut eye = etcd.arbiter(LONG_MS);
        for round in 1..=kills {
            // Each life of etcd sees some hundred swaps.
            while eye.read().unwrap().is_none_or(|record| record.generation < Generation(round * 300)) {}
            etcd.kill();
            etcd.start();
        }
        over.store(true, Ordering::Relaxed);
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    let mut all: Vec<u64> = wins.concat();
    all.sort_unstable();
    let last = etcd.arbiter(LONG_MS).read().unwrap().unwrap().generation.0;
    let count = all.len() as u64;
    all.dedup();
    assert_eq!(all.len() as u64, count, "a generation was won twice");
    // A win whose answer was lost is known to nobody if the other racer built on it before it was
    // asked again.
    assert!(last - count <= 2 * kills, "{count} of {last} generations have a winner");
    println!("{last} generations over {kills} kills, {} of them without a known winner", last - count);
}

#[test]
fn a_frozen_or_dead_etcd_is_out_of_reach_and_comes_back() {
    if !installed() {
        return;
    }
    let directory = directory();
    let mut etcd = Etcd::alone(directory.path());
    let (mut patient, mut hasty) = (etcd.arbiter(LONG_MS), etcd.arbiter(SHORT_MS));
    let first = Record::first(P);
    assert_eq!(settle(&mut patient, None, &first), Ok(()));
    assert_eq!(settle(&mut hasty, None, &first), Ok(()));
    etcd.signal(Signal::SIGSTOP);
    assert!(unreachable(hasty.read()).contains("no answer after "));
    let taken = first.next_solo(S);
    unreachable(hasty.swap(Some(&first), &taken));
    etcd.signal(Signal::SIGCONT);
    // What was asked of the frozen one may be carried out now or never: asking again tells, and it
    // is won once in any case.
    assert_eq!(settle(&mut patient, Some(&first), &taken), Ok(()));
    assert_eq!(patient.read().unwrap(), Some(taken));

    etcd.kill();
    assert!(unreachable(patient.read()).contains("refused"));
    etcd.start();
    assert_eq!(patient.read().unwrap(), Some(taken));
    assert_eq!(settle(&mut hasty, Some(&taken), &taken.next_stopped()), Ok(()));
}

#[test]
fn endpoints_are_tried_in_turn() {
    if !installed() {
        return;
    }
    let directory = directory();
    let etcd = Etcd::alone(directory.path());
    // Nobody listens at the one; the other takes connections and says nothing; and something else
    // than etcd answers at the third.
    let unused = ReservedPort::new();
    let dead = format!("http://127.0.0.1:{}", unused.port);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = format!("http://{}", silent.local_addr().unwrap());
    let (unknown_peer, _web) = web_server("<html>hello</html>");
    let mut arbiter = EtcdArbiter::new(config(&[&dead, &mute, &unknown_peer, &etcd.url], 8_000), &guest()).unwrap();
    assert_eq!(settle(&mut arbiter, None, &Record::first(P)), Ok(()));
    assert_eq!(etcd.arbiter(LONG_MS).read().unwrap(), Some(Record::first(P)));
    let mut hopeless = EtcdArbiter::new(config(&[&dead, &mute, &unknown_peer], 6_000), &guest()).unwrap();
    let said = unreachable(hopeless.read());
    for part in [&dead, &mute, &unknown_peer, "refused", "timeout", "no etcd"] {
        assert!(said.contains(part), "{part} in {said}");
    }
}

/// Answers every request with `body`.
fn web_server(body: &'static str) -> (String, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.read(&mut [0; 4096]);
            let _ =
                write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
        }
    });
    (url, thread)
}

#[test]
fn a_cluster_answers_while_it_has_a_quorum_and_not_after() {
    if !installed() {
        return;
    }
    let directory = directory();
    let members = Etcd::cluster(directory.path(), 3, None);
    let urls: Vec<&str> = members.iter().map(|member| member.url.as_str()).collect();
    let mut arbiter = EtcdArbiter::new(config(&urls, LONG_MS), &guest()).unwrap();
    let first = Record::first(P);
    assert_eq!(settle(&mut arbiter, None, &first), Ok(()));
    // The member asked first is gone: the others choose a leader, if it led, and answer.
    members[0].signal(Signal::SIGSTOP);
    let paired = first.next_paired(P, S);
    assert_eq!(settle(&mut arbiter, Some(&first), &paired), Ok(()));
    // Of three one is left, cut off from the others: it must not answer, not even what it knows.
    members[1].signal(Signal::SIGSTOP);
    let mut minority = EtcdArbiter::new(config(&[urls[2]], 1_500), &guest()).unwrap();
    unreachable(minority.read());
    unreachable(minority.swap(Some(&paired), &paired.next_solo(S)));
    members[0].signal(Signal::SIGCONT);
    members[1].signal(Signal::SIGCONT);
    // The same question again: won, then or now, and once.
    assert_eq!(settle(&mut arbiter, Some(&paired), &paired.next_solo(S)), Ok(()));
    assert_eq!(settle(&mut arbiter, Some(&paired), &paired.next_solo(P)), Err(Some(paired.next_solo(S))));
}

/// Passes one connection's request on to etcd, waits for the answer, and keeps it from the client.
fn swallow_one_answer(etcd: &str) -> (String, std::thread::JoinHandle<()>) {
    let etcd = etcd.strip_prefix("http://").unwrap().to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut server = TcpStream::connect(etcd).unwrap();
        let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let pump = std::thread::spawn(move || io::copy(&mut from, &mut to));
        let mut answer = [0; 4096];
        assert!(server.read(&mut answer).unwrap() > 0 && answer.starts_with(b"HTTP/1.1 200"));
        client.shutdown(Shutdown::Both).unwrap();
        server.shutdown(Shutdown::Both).unwrap();
        let _ = pump.join();
        let _ = client.flush();
    });
    (url, thread)
}

#[test]
fn a_swap_whose_answer_was_lost_is_recognised_as_won() {
    if !installed() {
        return;
    }
    let directory = directory();
    let mut etcd = Etcd::alone(directory.path());
    let first = Record::first(P);
    assert_eq!(settle(&mut etcd.arbiter(LONG_MS), None, &first), Ok(()));

    // In one question: the first endpoint's answer is lost, the second shows that the swap was
    // carried out.
    let (lossy, thread) = swallow_one_answer(&etcd.url);
    let mut arbiter = EtcdArbiter::new(config(&[&lossy, &etcd.url], LONG_MS), &guest()).unwrap();
    let second = first.next_paired(P, S);
    assert_eq!(arbiter.swap(Some(&first), &second).unwrap(), Swap::Won);
    thread.join().unwrap();

    // Over two questions, with a crash of etcd between them.
    let (lossy, thread) = swallow_one_answer(&etcd.url);
    let mut cut_off = EtcdArbiter::new(config(&[&lossy], LONG_MS), &guest()).unwrap();
    let third = second.next_solo(S);
    let mut asking = Arbitration::new(Duration::ZERO);
    let now = Instant::from_us(0);
    let call = asking.ask(ArbiterRequest::Swap { expected: Some(second), new: third });
    let why = unreachable(cut_off.swap(Some(&second), &third));
    thread.join().unwrap();
    etcd.kill();
    etcd.start();
    assert!(matches!(asking.answer(now, call.ticket, ArbiterAnswer::Unreachable(why)), Some(Verdict::Unreachable(_))));
    let again = asking.poll(now).unwrap();
    let Swap::Lost(stands) = etcd.arbiter(LONG_MS).swap(Some(&second), &third).unwrap() else {
        panic!("the swap was carried out before");
    };
    assert_eq!(asking.answer(now, again.ticket, ArbiterAnswer::Record(stands)), Some(Verdict::Won(third)));
}

#[test]
fn an_encrypted_cluster_knows_its_nodes_and_they_know_it() {
    if !installed() {
        return;
    }
    let directory = directory();
    let (ours, theirs) = (Certificates::new(), Certificates::new());
    let etcd = Etcd::encrypted(directory.path(), &ours);
    let arbiter = |tls| {
        let config = mcd::arbiter::etcd::EtcdConfig { tls, ..config(&[&etcd.url], 5_000) };
        EtcdArbiter::new(config, &guest())
    };
    let mut good = arbiter(Some(ours.tls())).unwrap();
    let first = Record::first(P);
    assert_eq!(good.swap(None, &first).unwrap(), Swap::Won);
    assert_eq!(good.swap(Some(&first), &first.next_paired(P, S)).unwrap(), Swap::Won);
    assert_eq!(good.read().unwrap(), Some(first.next_paired(P, S)));
    // Another authority's server, another authority's client, no client certificate.
    unreachable(arbiter(Some(EtcdTls { ca: theirs.path("ca.pem"), ..ours.tls() })).unwrap().read());
    unreachable(arbiter(Some(EtcdTls { identity: theirs.tls().identity, ..ours.tls() })).unwrap().read());
    unreachable(arbiter(Some(EtcdTls { identity: None, ..ours.tls() })).unwrap().read());
    // Files that are not what they should be are told at once.
    let error = arbiter(Some(EtcdTls { ca: ours.path("client.key"), identity: None })).err().unwrap();
    assert!(matches!(error, ArbiterError::BadPem { what: "certificate", .. }), "{error}");
    let swapped = Some((ours.path("client.key"), ours.path("client.pem")));
    assert!(arbiter(Some(EtcdTls { identity: swapped, ..ours.tls() })).is_err());
    let error = arbiter(Some(EtcdTls { ca: ours.path("nothing"), identity: None })).err().unwrap();
    assert!(matches!(error, ArbiterError::Io { .. }) && error.to_string().contains("nothing"), "{error}");
}

#[test]
fn certificates_are_renewed_under_a_running_node() {
    if !installed() {
        return;
    }
    let directory = directory();
    let (old, new) = (Certificates::new(), Certificates::new());
    let mut etcd = Etcd::encrypted(directory.path(), &old);
    let tls = Some(old.tls());
    let url = etcd.url.clone();
    let config = mcd::arbiter::etcd::EtcdConfig { tls, ..config(&[&url], 5_000) };
    let mut arbiter = EtcdArbiter::new(config, &guest()).unwrap();
    assert_eq!(arbiter.read().unwrap(), None);
    etcd.kill();
    for name in ["ca.pem", "server.pem", "server.key", "client.pem", "client.key"] {
        std::fs::copy(new.path(name), old.path(name)).unwrap();
    }
    etcd.start();
    // What it read at first is good for nothing now; after one question without an answer it has
    // the new files.
    unreachable(arbiter.read());
    assert_eq!(arbiter.read().unwrap(), None);
}

#[test]
fn a_cluster_that_wants_a_password_gets_it() {
    if !installed() {
        return;
    }
    let directory = directory();
    let mut etcd = Etcd::alone(directory.path());
    post(&etcd, "/v3/auth/user/add", &json!({ "name": "root", "password": "of all evil" }));
    post(&etcd, "/v3/auth/role/add", &json!({ "name": "root" }));
    post(&etcd, "/v3/auth/user/grant", &json!({ "user": "root", "role": "root" }));
    post(&etcd, "/v3/auth/enable", &json!({}));
    let arbiter = |password: &str| {
        let password_file = directory.path().join("password");
        std::fs::write(&password_file, password).unwrap();
        let login = Some(EtcdLogin { user: "root".into(), password_file });
        EtcdArbiter::new(mcd::arbiter::etcd::EtcdConfig { login, ..config(&[&etcd.url], 5_000) }, &guest()).unwrap()
    };
    let mut wrong = arbiter("wrong\n");
    assert!(unreachable(wrong.read()).contains("invalid user ID or password"));
    assert!(unreachable(etcd.arbiter(5_000).read()).contains("user name is empty"));
    let mut right = arbiter("of all evil\n");
    let first = Record::first(P);
    assert_eq!(right.swap(None, &first).unwrap(), Swap::Won);
    assert_eq!(wrong.read().unwrap(), Some(first), "its file was read again, and has the right one now");
    // A restart forgets the tokens; the question gets a new one.
    etcd.kill();
    etcd.start();
    assert_eq!(right.swap(Some(&first), &first.next_paired(P, S)).unwrap(), Swap::Won);
}

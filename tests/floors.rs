//! The house has floors. A room imports from its own floor or those under it, never upwards and
//! never in a circle; `protocol/` is pure; and the machine knows nothing of replication.

#[expect(dead_code, reason = "another test uses the rest")]
mod source;

use source::{Token, rust_files, tokens};
use std::collections::{BTreeMap, BTreeSet};

/// Every room and its floor. A new room needs a line here.
const FLOORS: [(&str, u32); 14] = [
    ("protocol", 1),
    ("machine", 2),
    ("device", 2),
    ("checkpoint", 3),
    ("arbiter", 3),
    ("wire", 3),
    ("control", 4),
    ("resync", 4),
    ("node", 5),
    ("cli", 6),
    ("demo", 6),
    ("testbed", 6),
    ("lib", 7),
    ("main", 7),
];

/// Imports that a floor would allow and the design does not: (room, what it must not know).
const FORBIDDEN_IMPORTS: [(&str, &[&str]); 6] = [
    ("machine", &["netbuf"]),
    ("device", &["netbuf"]),
    ("machine", &["mcd", "protocol", "primary"]),
    ("machine", &["mcd", "protocol", "secondary"]),
    ("machine", &["mcd", "protocol", "record"]),
    ("device", &["mcd", "protocol", "record"]),
];

/// What `protocol/` may take from the standard library. All else there may touch a clock, a file, a
/// thread or a random number; a hash map's order is random too.
const PURE_STD: [&str; 25] = [
    "array",
    "borrow",
    "char",
    "clone",
    "cmp",
    "collections",
    "convert",
    "default",
    "error",
    "fmt",
    "hash",
    "iter",
    "marker",
    "mem",
    "num",
    "ops",
    "option",
    "result",
    "slice",
    "str",
    "string",
    "u128",
    "u16",
    "u64",
    "vec",
];

/// What is impure all the same inside those.
const IMPURE_NAMES: [&str; 5] = ["HashMap", "HashSet", "RandomState", "DefaultHasher", "SystemTime"];

/// Crates that compute and do nothing else.
const PURE_CRATES: [&str; 1] = ["thiserror"];

/// Words that have no place in pure code.
const IMPURE_WORDS: [&str; 12] = [
    "unsafe",
    "extern",
    "static",
    "async",
    "thread_local",
    "println",
    "eprintln",
    "print",
    "eprint",
    "dbg",
    "Mutex",
    "RwLock",
];

/// A path in the code, from the crate it begins in, and its line.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PathUse {
    segments: Vec<String>,
    line: usize,
}

/// Every path in a file that begins at `crate`, `mcd`, `super` or another crate, written out from
/// its root.
///
/// `module` is the module the file is, from the crate's root. `use` trees are spread into one path
/// for each leaf.
fn paths(tokens: &[Token], module: &[String]) -> Vec<PathUse> {
    let mut walker = Walker { tokens, at: 0, module: module.to_vec(), depth: 0, inline: Vec::new(), found: Vec::new() };
    while walker.at < tokens.len() {
        walker.step();
    }
    walker.found
}

struct Walker<'a> {
    tokens: &'a [Token],
    at: usize,
    module: Vec<String>,
    depth: usize,
    /// The depth of braces at which each inline module began.
    inline: Vec<usize>,
    found: Vec<PathUse>,
}

impl Walker<'_> {
    fn text(&self, ahead: usize) -> &str {
        self.tokens.get(self.at + ahead).map_or("", |token| token.text.as_str())
    }

    fn line(&self) -> usize {
        self.tokens.get(self.at).map_or(0, |token| token.line)
    }

    fn step(&mut self) {
        match self.text(0) {
            "mod" if self.text(2) == "{" => {
                let name = self.text(1).to_owned();
                self.module.push(name);
                self.inline.push(self.depth);
                self.depth += 1;
                self.at += 3;
            }
            "{" => {
                self.depth += 1;
                self.at += 1;
            }
            "}" => {
                self.depth = self.depth.saturating_sub(1);
                if self.inline.last() == Some(&self.depth) {
                    self.inline.pop();
                    self.module.pop();
                }
                self.at += 1;
            }
            "use" => {
                self.at += 1;
                self.tree(&[]);
            }
            _ if is_word(self.text(0)) && self.text(1) == "::" => self.inline_path(),
            _ => self.at += 1,
        }
    }

    /// A path outside of a `use`: as far as words and `::` go.
    fn inline_path(&mut self) {
        let line = self.line();
        let mut segments = vec![self.text(0).to_owned()];
        self.at += 1;
        while self.text(0) == "::" && is_word(self.text(1)) {
            segments.push(self.text(1).to_owned());
            self.at += 2;
        }
        // A turbofish, or nothing: go on behind it.
        if self.text(0) == "::" {
            self.at += 1;
        }
        self.add(segments, line);
    }

    /// A `use` tree behind `prefix`, up to its `,`, `}` or `;`.
    fn tree(&mut self, prefix: &[String]) {
        let line = self.line();
        let mut segments = prefix.to_vec();
        while self.at < self.tokens.len() {
            match self.text(0).to_owned().as_str() {
                "::" => self.at += 1,
                "{" => {
                    self.at += 1;
                    while self.at < self.tokens.len() && self.text(0) != "}" {
                        self.tree(&segments);
                        if self.text(0) == "," {
                            self.at += 1;
                        }
                    }
                    self.at += 1;
                    return;
                }
                "as" => self.at += 2,
                "," | "}" | ";" => break,
                word => {
                    if word != "self" || segments.is_empty() {
                        segments.push(word.to_owned());
                    }
                    self.at += 1;
                }
            }
        }
        self.add(segments, line);
    }

    /// Writes the path out from its root and keeps it, if it leaves the module.
    fn add(&mut self, mut segments: Vec<String>, line: usize) {
        let mut base = match segments.first().map(String::as_str) {
            Some("crate" | "mcd") => Vec::new(),
            Some("self" | "super") => self.module.clone(),
            _ => return self.found.push(PathUse { segments, line }),
        };
        segments.retain(|segment| {
            if segment == "super" {
                base.pop();
            }
            !matches!(segment.as_str(), "super" | "self" | "crate" | "mcd")
        });
        let segments = ["mcd".to_owned()].into_iter().chain(base).chain(segments).collect();
        self.found.push(PathUse { segments, line });
    }
}

fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// The module that a file under `src/` is: `src/a/b.rs` and `src/a/b/mod.rs` are both `a::b`.
fn module_of(path: &str) -> Vec<String> {
    let inside = path.strip_prefix("src/").unwrap_or(path).trim_end_matches(".rs");
    let mut module: Vec<String> = inside.split('/').map(str::to_owned).collect();
    if module.last().is_some_and(|last| last == "mod") {
        module.pop();
    }
    module
}

/// The module to resolve `super` in: the crate's roots are no module of their own.
fn scope_of(module: &[String]) -> &[String] {
    if module == ["lib"] || module == ["main"] { &[] } else { module }
}

fn floor(room: &str) -> Option<u32> {
    FLOORS.iter().find(|(name, _)| *name == room).map(|(_, floor)| *floor)
}

fn starts_with(path: &[String], prefix: &[&str]) -> bool {
    path.len() >= prefix.len() && path.iter().zip(prefix).all(|(a, b)| a == b)
}

/// All that is wrong with a house of these files: (path, text).
fn violations<'a>(files: impl Iterator<Item = (&'a str, &'a str)>, crates: &BTreeSet<String>) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut imports: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for (path, text) in files {
        let module = module_of(path);
        let Some(room) = module.first().cloned() else { continue };
        let Some(own) = floor(&room) else {
            wrong.push(format!("{path}: the room {room} has no floor; give it one in tests/floors.rs"));
            continue;
        };
        let code = tokens(text);
        let uses = paths(&code, scope_of(&module));
        for found in &uses {
            let at = format!("{path}:{}", found.line);
            wrong.extend(forbidden_import(&room, found, &at));
            if found.segments[0] != "mcd" {
                continue;
            }
            let Some(other) = found.segments.get(1).filter(|other| **other != room) else { continue };
            match floor(other) {
                // Roots hold the rooms and nothing else, so only a room can be meant.
                None if own < 7 => {
                    wrong.push(format!("{at}: {} is in no room with a floor", found.segments.join("::")))
                }
                Some(above) if above > own => {
                    wrong.push(format!("{at}: {room} (floor {own}) looks up to {other} (floor {above})"))
                }
                _ => {
                    imports.entry(room.clone()).or_default().entry(other.clone()).or_insert(at);
                }
            }
        }
        // The switch of the deliberate bugs holds state, and is in no build that anyone runs.
        if room == "protocol" && path != "src/protocol/mutant.rs" {
            wrong.extend(impurities(path, &code, &uses, crates));
        }
    }
    wrong.extend(circles(&imports));
    wrong
}

fn forbidden_import(room: &str, found: &PathUse, at: &str) -> Option<String> {
    let mut matching =
        FORBIDDEN_IMPORTS.iter().filter(|(who, what)| *who == room && starts_with(&found.segments, what));
    matching.next().map(|_| format!("{at}: {room} must not know {}", found.segments.join("::")))
}

fn impurities(path: &str, code: &[Token], uses: &[PathUse], crates: &BTreeSet<String>) -> Vec<String> {
    let mut wrong = Vec::new();
    for token in code.iter().filter(|token| IMPURE_WORDS.contains(&token.text.as_str())) {
        wrong.push(format!("{path}:{}: protocol is pure, and {} is not", token.line, token.text));
    }
    for found in uses {
        let segments: Vec<&str> = found.segments.iter().map(String::as_str).collect();
        let pure = match segments.as_slice() {
            ["std" | "core" | "alloc", "time", "Duration", ..] => true,
            ["std" | "core" | "alloc", part, ..] => {
                PURE_STD.contains(part) && !IMPURE_NAMES.iter().any(|name| segments.contains(name))
            }
            [name, ..] => !crates.contains(*name) || PURE_CRATES.contains(name),
            [] => true,
        };
        if !pure {
            wrong.push(format!("{path}:{}: protocol is pure, and {} is not", found.line, segments.join("::")));
        }
    }
    wrong
}

/// Circles of imports, each told once.
fn circles(imports: &BTreeMap<String, BTreeMap<String, String>>) -> Vec<String> {
    let reaches = |from: &str, goal: &str| {
        let (mut seen, mut next) = (BTreeSet::new(), vec![from.to_owned()]);
        while let Some(room) = next.pop() {
            if room == goal {
                return true;
            }
            if seen.insert(room.clone()) {
                next.extend(imports.get(&room).into_iter().flat_map(|others| others.keys().cloned()));
            }
        }
        false
    };
    let mut wrong = Vec::new();
    for (room, others) in imports {
        for (other, at) in others {
            if room < other && reaches(other, room) {
                let back = imports.get(other).and_then(|theirs| theirs.get(room));
                let back = back.map_or_else(String::new, |back| format!(", and {back} back"));
                wrong.push(format!("{at}: {room} and {other} import each other in a circle{back}"));
            }
        }
    }
    wrong
}

/// The crates that Cargo.toml names, as code writes them.
fn dependencies() -> BTreeSet<String> {
    let text = std::fs::read_to_string(source::root().join("Cargo.toml")).expect("Cargo.toml");
    let manifest: toml::Table = toml::from_str(&text).expect("Cargo.toml");
    let tables = ["dependencies", "dev-dependencies", "build-dependencies"];
    let named = tables.iter().filter_map(|table| manifest.get(*table)?.as_table());
    named.flat_map(|table| table.keys()).map(|name| name.replace('-', "_")).collect()
}

#[test]
fn every_room_keeps_to_its_floor() {
    let files = rust_files("src");
    assert!(files.iter().any(|file| file.path == "src/protocol/mod.rs"), "the walk found the house");
    let wrong = violations(files.iter().map(|file| (file.path.as_str(), file.text.as_str())), &dependencies());
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

/// What the checker says of a house of these files.
fn told(files: &[(&str, &str)]) -> Vec<String> {
    let crates = ["nix", "libc", "getrandom", "thiserror", "netbuf", "kvm_ioctls"].map(str::to_owned);
    violations(files.iter().copied(), &crates.into())
}

fn reported_once(files: &[(&str, &str)], part: &str) {
    let wrong = told(files);
    assert!(
        wrong.len() == 1 && wrong[0].contains(part),
        "{files:?} should give one violation with {part:?}: {wrong:?}"
    );
}

#[test]
fn a_good_house_passes() {
    let good = [
        ("src/lib.rs", "pub mod protocol; pub mod wire; use crate::node::run;"),
        ("src/main.rs", "fn main() { mcd::cli::main() }"),
        (
            "src/protocol/mod.rs",
            "//! std::net::TcpStream\npub mod types; use thiserror::Error; use std::{fmt, time::Duration};",
        ),
        (
            "src/protocol/types.rs",
            "use super::messages::Message; /* unsafe */ const A: &str = \"crate::node use std::fs;\";",
        ),
        ("src/wire/codec.rs", "use super::error::E; use crate::{machine::memory, protocol::{types, record::Record}};"),
        ("src/checkpoint/mod.rs", "use crate::wire::Link; use crate::machine::Machine; use netbuf::OutputBuffer;"),
        (
            "src/machine/mod.rs",
            "use crate::protocol::pages::PageSet; pub(crate) fn x<'a>(c: char) -> bool { c == '\"' || c == 'u' }",
        ),
    ];
    assert_eq!(told(&good), Vec::<String>::new());
}

#[test]
fn upward_imports_are_caught_however_they_are_written() {
    for code in [
        "use crate::node::run;",
        "use crate::{protocol::types, node::run};",
        "use crate::{\n    protocol::{types::{A, B}},\n    node,\n};",
        "use mcd::node::run;",
        "use super::super::node::run as go;",
        "fn f() { crate::node::run::<u8>(); }",
        "mod tests { use super::super::super::node::run; }",
        "mod inner { mod deeper { } fn f() { super::super::super::node::run() } }",
        "/* \" */ use crate::node::run; // \"",
        "const S: &str = r#\" \" \"#; use crate::node::run;",
    ] {
        reported_once(&[("src/wire/codec.rs", code)], "wire (floor 3) looks up to node (floor 5)");
    }
    reported_once(&[("src/wire/mod.rs", "use super::node::run;")], "looks up to node");
    reported_once(&[("src/protocol/mod.rs", "use crate::wire::Link;")], "looks up to wire");
    reported_once(&[("src/machine/vcpu.rs", "use crate::{checkpoint};")], "looks up to checkpoint");
    reported_once(&[("src/attic/mod.rs", "")], "has no floor");
    reported_once(&[("src/wire/mod.rs", "use crate::attic::Box;")], "in no room");
}

#[test]
fn circles_are_caught() {
    let device = ("src/device/mod.rs", "use crate::machine::memory::GuestRam;");
    reported_once(&[device, ("src/machine/mod.rs", "use crate::device::Bus;")], "device and machine import each other");
    assert!(told(&[device, ("src/machine/mod.rs", "")]).is_empty());
    let long = [
        ("src/wire/mod.rs", "use crate::arbiter::A;"),
        ("src/arbiter/mod.rs", "use crate::checkpoint::C;"),
        ("src/checkpoint/mod.rs", "use crate::wire::W;"),
    ];
    assert!(!told(&long).is_empty());
}

#[test]
fn impurity_is_caught() {
    for (code, part) in [
        ("use std::net::TcpStream;", "std::net::TcpStream"),
        ("use std::{fmt, thread};", "std::thread"),
        ("use std::time::{Duration, Instant};", "std::time::Instant"),
        ("use std::time::SystemTime;", "std::time::SystemTime"),
        ("use std::time;", "std::time"),
        ("fn f() { let _ = std::fs::read(p); }", "std::fs::read"),
        ("use std::sync::Arc;", "std::sync"),
        ("use std::collections::HashMap;", "HashMap"),
        ("use nix::sys::time;", "nix::sys::time"),
        ("fn f() { getrandom::fill(b); }", "getrandom::fill"),
        ("use kvm_ioctls::Kvm;", "kvm_ioctls::Kvm"),
        ("static mut X: u8 = 0;", "static"),
        ("fn f() { unsafe { g() } }", "unsafe"),
        ("fn f() { println!(\"x\"); }", "println"),
    ] {
        reported_once(&[("src/protocol/types.rs", code)], part);
        assert!(told(&[("src/wire/codec.rs", code)]).is_empty(), "{code} is allowed above");
    }
}

#[test]
fn the_machine_knows_nothing_of_replication() {
    reported_once(&[("src/machine/mod.rs", "use netbuf::OutputBuffer;")], "machine must not know netbuf");
    reported_once(&[("src/device/net.rs", "fn f() { netbuf::push() }")], "device must not know netbuf");
    reported_once(&[("src/machine/mod.rs", "use crate::protocol::primary::Primary;")], "must not know");
}

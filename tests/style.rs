//! The house's style, as far as a test can tell it: files that can be read in one sitting, reasons
//! for every `unsafe`, and no panic in place of an error.

mod source;

use source::{SourceFile, Token, rust_files, tokens, without_tests};

/// Most lines in a file.
const LINES_MAX: usize = 500;

/// Files that may be longer, and why.
const LONGER: [(&str, usize, &str); 3] = [
    ("tests/device_net.rs", 650, "a driver of a network card, and all that it tries"),
    ("tests/sim/driver.rs", 600, "the simulator's node"),
    ("tests/sim/world.rs", 600, "the simulator's world"),
];

/// Where mcd's own code is: no panic there in place of an error.
const PRODUCTION: [&str; 2] = ["src/", "netbuf/src/"];

/// Panics that nothing outside the code can bring about: the file, how many there are, and why.
const CANNOT_HAPPEN: [(&str, usize, &str); 1] =
    [("src/control/metrics.rs", 1, "a histogram's constant bounds are accepted")];

fn too_long(file: &SourceFile) -> Option<String> {
    let lines = file.text.lines().count();
    let allowed = LONGER.iter().find(|(path, ..)| *path == file.path).map_or(LINES_MAX, |(_, lines, _)| *lines);
    (lines > allowed).then(|| format!("{}: {lines} lines, {allowed} allowed; split it by concern", file.path))
}

/// Every `unsafe` block and implementation without its reason right above.
fn unexplained_unsafe(file: &SourceFile) -> Vec<String> {
    let lines: Vec<&str> = file.text.lines().collect();
    let code = tokens(&file.text);
    let mut wrong = Vec::new();
    let text = |at: usize| code.get(at).map_or("", |token| token.text.as_str());
    for at in (0..code.len()).filter(|at| text(*at) == "unsafe") {
        let public = at > 0 && text(at - 1) == "pub";
        let reason = match (text(at + 1), text(at + 3)) {
            // A function tells its callers what they must keep to; a private one has them all in
            // sight.
            ("extern", "fn") | ("fn" | "trait", _) if public => "# Safety",
            ("extern", "{") | ("{" | "impl", _) => "SAFETY:",
            _ => continue,
        };
        let line = code[at].line;
        if !explained(&lines, line, reason) {
            wrong.push(format!("{}:{line}: unsafe {} without `{reason}` right above", file.path, text(at + 1)));
        }
    }
    wrong
}

/// Looks for `reason` in the comments above `line` (from 1), inside the same statement.
fn explained(lines: &[&str], line: usize, reason: &str) -> bool {
    for above in lines[..line - 1].iter().rev() {
        let text = above.trim();
        if text.starts_with("//") {
            if text.contains(reason) {
                return true;
            }
        } else if text.is_empty() || (!text.starts_with('#') && text.ends_with([';', '{', '}'])) {
            return false;
        }
    }
    false
}

/// Calls that panic where an error belongs.
fn panics(path: &str, code: &[Token]) -> Vec<String> {
    let mut wrong = Vec::new();
    for three in code.windows(3) {
        let [a, b, c] = [0, 1, 2].map(|n| three[n].text.as_str());
        let found = match (a, b, c) {
            (".", "unwrap" | "expect" | "unwrap_err" | "expect_err", "(") => b,
            ("todo" | "unimplemented" | "dbg", "!", _) => a,
            _ => continue,
        };
        wrong.push(format!("{path}:{}: {found} in place of an error", three[1].line));
    }
    wrong
}

/// The panics of all production files, those aside that are only compiled for tests.
fn production_panics(files: &[SourceFile]) -> Vec<String> {
    let (mut wrong, mut test_only) = (Vec::new(), Vec::new());
    let mut kept = Vec::new();
    for file in files.iter().filter(|file| PRODUCTION.iter().any(|room| file.path.starts_with(room))) {
        let (code, test_modules) = without_tests(&tokens(&file.text));
        let stem = file.path.trim_end_matches(".rs");
        let directory = match stem.rsplit_once('/') {
            Some((directory, "mod" | "lib" | "main")) => directory,
            _ => stem,
        };
        test_only.extend(test_modules.iter().map(|name| format!("{directory}/{name}")));
        kept.push((&file.path, code));
    }
    for (path, code) in kept {
        let stem = path.trim_end_matches(".rs");
        if test_only.iter().any(|module| stem == module || stem.starts_with(&format!("{module}/"))) {
            continue;
        }
        let found = panics(path, &code);
        let allowed = CANNOT_HAPPEN.iter().find(|(file, ..)| file == path).map_or(0, |(_, count, _)| *count);
        if found.len() > allowed {
            wrong.extend(found);
        }
    }
    wrong
}

fn project() -> Vec<SourceFile> {
    let mut files: Vec<_> = ["src", "netbuf", "guest", "tests", "bench"].into_iter().flat_map(rust_files).collect();
    files.extend(["build.rs"].iter().filter_map(|path| {
        let text = std::fs::read_to_string(source::root().join(path)).ok()?;
        Some(SourceFile { path: (*path).to_owned(), text })
    }));
    files
}

fn assert_none(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn files_can_be_read_in_one_sitting() {
    assert_none(&project().iter().filter_map(too_long).collect::<Vec<_>>());
}

#[test]
fn every_unsafe_has_its_reason() {
    assert_none(&project().iter().flat_map(unexplained_unsafe).collect::<Vec<_>>());
}

#[test]
fn errors_are_returned() {
    assert_none(&production_panics(&project()));
}

fn file(path: &str, text: &str) -> SourceFile {
    SourceFile { path: path.to_owned(), text: text.to_owned() }
}

#[test]
fn long_files_are_caught() {
    assert!(too_long(&file("src/a.rs", &"\n".repeat(500))).is_none());
    assert!(too_long(&file("src/a.rs", &"\n".repeat(501))).is_some());
}

#[test]
fn missing_reasons_are_caught() {
    let wrong = |text: &str| unexplained_unsafe(&file("src/a.rs", text)).len();
    assert_eq!(wrong("fn f() {\n    unsafe { g() }\n}"), 1);
    assert_eq!(wrong("// SAFETY: far away\nfn f() {\n    unsafe { g() }\n}"), 1);
    assert_eq!(wrong("// SAFETY: for the first\nlet a = unsafe { g() };\nlet b = unsafe { g() };"), 1);
    assert_eq!(wrong("unsafe impl Send for X {}"), 1);
    assert_eq!(wrong("unsafe extern \"C\" { fn f(); }"), 1);
    assert_eq!(wrong("/// Does it.\npub unsafe fn f() {}"), 1);
    assert_eq!(wrong("/// Does it.\npub unsafe extern \"C\" fn f() {}"), 1);
    assert_eq!(wrong("/// Does it.\nunsafe fn f() {}"), 0);
    assert_eq!(wrong("// SAFETY: so.\nlet a = match x {\n    // SAFETY: here.\n    _ => unsafe { g() },\n};"), 0);
    assert_eq!(wrong("// SAFETY: so,\n// over two lines.\nlet long_name =\n    unsafe { g() };"), 0);
    assert_eq!(wrong("/// # Safety\n/// Never.\npub unsafe fn f() {}"), 0);
    assert_eq!(wrong("// unsafe { }\nlet s = \"unsafe { }\"; #[unsafe(no_mangle)] fn f() {}"), 0);
}

#[test]
fn panics_are_caught_outside_tests() {
    let wrong = |files: &[(&str, &str)]| {
        let files: Vec<_> = files.iter().map(|(path, text)| file(path, text)).collect();
        production_panics(&files).len()
    };
    assert_eq!(wrong(&[("src/a.rs", "fn f() { x.unwrap(); y.expect(\"z\"); todo!() }")]), 3);
    assert_eq!(
        wrong(&[("src/a.rs", "fn f() { x.unwrap_or(1); } // .unwrap()\n/// ```\n/// x.unwrap();\nfn g() {}")]),
        0
    );
    assert_eq!(wrong(&[("src/a.rs", "#[cfg(test)]\nmod tests { fn f() { x.unwrap() } }")]), 0);
    assert_eq!(wrong(&[("src/a.rs", "#[cfg(test)]\nuse b::C;\nfn f() { x.unwrap() }")]), 1);
    assert_eq!(wrong(&[("src/a.rs", "#[cfg(not(test))]\nfn f() { x.unwrap() }")]), 1);
    assert_eq!(wrong(&[("src/a/mod.rs", "#[cfg(test)]\nmod tests;"), ("src/a/tests.rs", "fn f() { x.unwrap() }")]), 0);
    assert_eq!(wrong(&[("src/a.rs", "#[cfg(test)]\nmod tests;"), ("src/a/tests/b.rs", "fn f() { x.unwrap() }")]), 0);
    assert_eq!(wrong(&[("src/a/mod.rs", "mod tests;"), ("src/a/tests.rs", "fn f() { x.unwrap() }")]), 1);
    assert_eq!(wrong(&[("tests/a.rs", "fn f() { x.unwrap() }")]), 0);
}

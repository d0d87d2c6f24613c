//! The house's style, as far as a test can tell it: files that can be read in one sitting, lines
//! that fit, the field's words, reasons for every `unsafe`, and no panic in place of an error.

mod source;

use std::path::Path;

use source::{SourceFile, Token, data_lines, rust_files, tokens, without_tests};

/// Most lines in a file.
const LINES_MAX: usize = 500;

/// Files that may be longer, and why.
const LONGER: [(&str, usize, &str); 0] = [];

/// Most columns of code.
const CODE_COLUMNS_MAX: usize = 120;

/// Most columns of comments and of prose.
const PROSE_COLUMNS_MAX: usize = 100;

/// Names that mcd once had for things that have a name in the field, and that name. Whole words,
/// upper or lower case, also as a part of an identifier or of a file's name.
///
/// Not in it, because ordinary English or a term of the field needs them: ask, board, cut, freeze
/// (SIGSTOP and file systems), ladder (the capacity policy's), look, moves, place, plain, promise,
/// pulse (of an interrupt line), rows, saving, stay, sum, told, trouble, truth.
const BANNED: [(&[&str], &str); 23] = [
    (&["heir", "heirs"], "new primary"),
    (&["keeper", "keepers"], "memory holder"),
    (&["notebook", "notebooks"], "local record"),
    (&["vitals"], "tcp_info, or status snapshot"),
    (&["ears"], "acceptor"),
    (&["summer", "summers"], "block hasher"),
    (&["judge", "judges", "judged", "judging"], "failure detector, stall detector; to check"),
    (&["dirt"], "dirty pages"),
    (&["thaw", "thaws", "thawed"], "the end of a copy-before-write; SIGCONT"),
    (&["stranger", "strangers"], "unknown peer"),
    (&["witness", "witnesses"], "traffic checker"),
    (&["reign", "reigns"], "releaser interval"),
    (&["unarbitrated"], "without an arbiter"),
    (&["wholly"], "an enum of the two cases; completely"),
    (&["obey limit"], "vcpu_order_timeout"),
    (&["parting time"], "client_drain_timeout"),
    (&["door", "doors"], "make target; port; entry"),
    (&["nudge", "nudges", "nudged"], "probe"),
    (&["fabric"], "namespaces"),
    (&["excuse", "excuses", "excused"], "kvmclock_ctrl; allowance"),
    (&["patience"], "timeout"),
    (&["hurry"], "abort flag"),
    (&["calm", "steering"], "liveness; phase barrier"),
];

/// Names of files that say nothing of what is in them, or that four files had.
const BANNED_FILES: [&str; 14] = [
    "shared.rs",
    "told.rs",
    "talk.rs",
    "truth.rs",
    "moves.rs",
    "calm.rs",
    "rows.rs",
    "place.rs",
    "trouble.rs",
    "steering.rs",
    "stay.rs",
    "chips.rs",
    "plain.rs",
    "saving.rs",
];

/// The file that has to name the banned words.
const NAMES_BANNED_WORDS: &str = "tests/style.rs";

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

/// Every line that is too wide. Data has the width it needs: tables, drawings and blocks of code or
/// output in Markdown and in comments, string literals that go over several lines, lists in TOML.
fn too_wide(file: &SourceFile) -> Vec<String> {
    let is = |extension: &str| file.path.ends_with(extension);
    let literals = if is(".rs") { data_lines(&file.text) } else { Default::default() };
    let mut in_block = false;
    let mut wrong = Vec::new();
    for (number, line) in (1..).zip(file.text.lines()) {
        let text = line.trim_start();
        let prose = match text.strip_prefix(if is(".rs") { "//" } else { "#" }) {
            _ if is(".md") => Some(text),
            _ if literals.contains(&number) => None,
            Some(comment) => Some(comment.trim_start_matches(['/', '!']).trim_start()),
            None => None,
        };
        in_block = prose.is_some_and(|prose| in_block ^ prose.starts_with("```"));
        let is_data = match prose {
            Some(prose) => in_block || prose.starts_with('|'),
            None => literals.contains(&number) || is(".toml") || is(".example"),
        };
        let max = if prose.is_some() { PROSE_COLUMNS_MAX } else { CODE_COLUMNS_MAX };
        let columns = line.chars().count();
        if !is_data && columns > max {
            wrong.push(format!("{}:{number}: {columns} columns, {max} allowed", file.path));
        }
    }
    wrong
}

/// The words of a text in small letters, also those that an identifier is made of.
fn words(text: &str) -> Vec<String> {
    let letters: Vec<char> = text.chars().collect();
    let mut words = vec![String::new()];
    for (at, letter) in letters.iter().enumerate() {
        let before = at.checked_sub(1).map(|before| letters[before]);
        let after = letters.get(at + 1);
        let begins = letter.is_uppercase()
            && before.is_some_and(|before| !before.is_uppercase() || after.is_some_and(|after| after.is_lowercase()));
        if begins || !letter.is_alphabetic() {
            words.push(String::new());
        }
        if letter.is_alphabetic()
            && let Some(word) = words.last_mut()
        {
            word.extend(letter.to_lowercase());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// The banned words in a text, and what to say instead.
fn banned_words(text: &str) -> Vec<(&'static str, &'static str)> {
    let words = words(text);
    let has = |banned: &str| {
        let parts: Vec<&str> = banned.split(' ').collect();
        words.windows(parts.len()).any(|some| some == parts)
    };
    let all = BANNED.iter().flat_map(|(banned, instead)| banned.iter().map(|word| (*word, *instead)));
    all.filter(|(word, _)| has(word)).collect()
}

/// Every banned word in a file or in its name, and a banned name.
fn not_the_fields_words(file: &SourceFile) -> Vec<String> {
    if file.path == NAMES_BANNED_WORDS {
        return Vec::new();
    }
    let name = file.path.rsplit('/').next().unwrap_or_default();
    let mut wrong = Vec::new();
    if BANNED_FILES.contains(&name) {
        wrong.push(format!("{}: a file's name says what is in it, and this one does not", file.path));
    }
    let of_path = banned_words(&file.path).into_iter().map(|found| (0, found));
    let of_lines =
        (1..).zip(file.text.lines()).flat_map(|(n, line)| banned_words(line).into_iter().map(move |f| (n, f)));
    wrong.extend(
        of_path.chain(of_lines).map(|(n, (word, instead))| format!("{}:{n}: `{word}`; say {instead}", file.path)),
    );
    wrong
}

/// Exceptions from the length of files that are not needed, or name no file.
fn needless_lengths(longer: &[(&str, usize, &str)], files: &[SourceFile]) -> Vec<String> {
    let needless = |path: &str| match files.iter().find(|file| file.path == path) {
        None => Some(format!("{path}: there is no such file, and LONGER names it")),
        Some(file) if file.text.lines().count() <= LINES_MAX => {
            Some(format!("{path}: it is short enough without LONGER"))
        }
        Some(_) => None,
    };
    longer.iter().filter_map(|(path, ..)| needless(path)).collect()
}

/// Exceptions for panics that are not needed, or name no file.
fn needless_panics(cannot_happen: &[(&str, usize, &str)], files: &[SourceFile]) -> Vec<String> {
    let needless = |path: &str, count: usize| match files.iter().find(|file| file.path == path) {
        None => Some(format!("{path}: there is no such file, and CANNOT_HAPPEN names it")),
        Some(file) => {
            let found = panics(path, &without_tests(&tokens(&file.text)).0).len();
            (found < count).then(|| format!("{path}: CANNOT_HAPPEN allows {count}, and there are {found}"))
        }
    };
    cannot_happen.iter().filter_map(|(path, count, _)| needless(path, *count)).collect()
}

/// The links of a Markdown file and the documents that code names which lead to no file.
fn dead_links(file: &SourceFile, exists: impl Fn(&Path) -> bool) -> Vec<String> {
    let directory = Path::new(&file.path).parent().unwrap_or(Path::new(""));
    let mut wrong = Vec::new();
    for (number, line) in (1..).zip(file.text.lines()) {
        let mut links: Vec<_> = line.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()).collect();
        links.retain(|link| file.path.ends_with(".md") && !link.is_empty() && !link.contains("://"));
        let named = line.split(|c: char| !c.is_alphanumeric() && !"/._-".contains(c));
        let named = named.filter(|word| word.starts_with("docs/")).map(|word| word.trim_end_matches('.'));
        let targets = links.iter().map(|link| directory.join(link)).chain(named.map(|word| Path::new(word).to_owned()));
        let dead = targets.filter(|target| !exists(target));
        wrong.extend(dead.map(|target| format!("{}:{number}: {} is not there", file.path, target.display())));
    }
    wrong
}

fn project() -> Vec<SourceFile> {
    let mut files: Vec<_> = ["src", "netbuf", "guest", "tests", "bench"].into_iter().flat_map(rust_files).collect();
    files.push(source::file(Path::new("build.rs")));
    files
}

/// The project's Rust, and all that people read: documents, manifests, scripts.
fn texts() -> Vec<SourceFile> {
    let readable = |path: &Path| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        matches!(extension, Some("md" | "toml" | "example"))
            || path.parent().is_some_and(|parent| parent.ends_with("scripts"))
    };
    let directories = ["docs", "scripts", "src", "netbuf", "guest", "tests", "bench"];
    let of_root = ["README.md", "CONTRIBUTING.md", "Makefile", "Cargo.toml", "rustfmt.toml", ".ci/run"];
    let mut files = project();
    files.extend(directories.into_iter().flat_map(|directory| source::files(directory, readable)));
    files.extend(of_root.into_iter().map(|path| source::file(Path::new(path))));
    files
}

fn assert_none(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn lines_fit() {
    assert_none(&texts().iter().flat_map(too_wide).collect::<Vec<_>>());
}

#[test]
fn the_words_are_the_fields() {
    assert_none(&texts().iter().flat_map(not_the_fields_words).collect::<Vec<_>>());
}

#[test]
fn exceptions_are_needed() {
    let files = project();
    assert_none(&[needless_lengths(&LONGER, &files), needless_panics(&CANNOT_HAPPEN, &files)].concat());
}

#[test]
fn links_lead_to_files() {
    let exists = |path: &Path| source::root().join(path).exists();
    let texts = texts().into_iter().filter(|file| file.path != NAMES_BANNED_WORDS);
    assert_none(&texts.flat_map(|file| dead_links(&file, exists)).collect::<Vec<_>>());
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

#[test]
fn wide_lines_are_caught() {
    let wrong = |path: &str, text: &str| too_wide(&file(path, text)).len();
    let (comment, code) = ("x".repeat(98), "x".repeat(118));
    assert_eq!(wrong("src/a.rs", &format!("//{comment}\n{code};;")), 0);
    assert_eq!(wrong("src/a.rs", &format!("    // {comment}")), 1);
    assert_eq!(wrong("src/a.rs", &format!("let a = {code};")), 1);
    assert_eq!(wrong("src/a.rs", &format!("let a = \"{code}\";")), 1);
    assert_eq!(wrong("src/a.rs", &format!("let a = \"{code} \\\n    {code}\";")), 1 + 1);
    assert_eq!(wrong("src/a.rs", &format!("let a = \"\\\n{code}{code}\n{code}{code}\";\nlet b = 1;")), 0);
    assert_eq!(wrong("docs/a.md", &format!("# a\n\n{comment} word")), 1);
    assert_eq!(wrong("docs/a.md", &format!("| {code} |\n\n```\n{code}\n```\n{comment} word")), 1);
    assert_eq!(wrong("src/a.rs", &format!("/// ```text\n/// {code}\n/// ```\n//! | {code} |\n/// {comment}")), 1);
    assert_eq!(wrong("src/a.rs", &format!("/// ```\nfn f() {{}}\n/// {comment}")), 1);
    assert_eq!(wrong("scripts/a", &format!("# {comment}\n{code};;\n#  {comment}")), 1);
    assert_eq!(wrong("Cargo.toml", &format!("#  {comment}\na = [\"{code}\"]")), 1);
    assert_eq!(wrong("docs/a.md", &"é".repeat(100)), 0);
}

#[test]
fn words_are_found_in_identifiers() {
    assert_eq!(words("the HTTPServer's max_epoch2go"), ["the", "http", "server", "s", "max", "epoch", "go"]);
    assert_eq!(words("EchoJudge::OBEY_LIMIT"), ["echo", "judge", "obey", "limit"]);
}

#[test]
fn banned_words_are_caught() {
    let wrong = |path: &str, text: &str| not_the_fields_words(&file(path, text)).len();
    assert_eq!(wrong("src/a.rs", "struct EchoJudge; // the heir's DIRT\nconst OBEY_LIMIT: u8 = 1;"), 4);
    assert_eq!(wrong("docs/a.md", "Their dirty ears."), 1);
    assert_eq!(wrong("src/witness/a.rs", ""), 1);
    assert_eq!(wrong("tests/model/truth.rs", ""), 1);
    assert_eq!(wrong("src/a.rs", "let (dirty, years, outdoors, limit) = obey();"), 0);
    assert_eq!(wrong(NAMES_BANNED_WORDS, "heir"), 0);
}

#[test]
fn needless_exceptions_are_caught() {
    let files = [file("src/a.rs", &"\n".repeat(501)), file("src/b.rs", "fn f() { x.unwrap() }")];
    let lengths = |path| needless_lengths(&[(path, 600, "long")], &files).len();
    assert_eq!((lengths("src/a.rs"), lengths("src/b.rs"), lengths("src/c.rs")), (0, 1, 1));
    let panics = |path, count| needless_panics(&[(path, count, "never")], &files).len();
    assert_eq!((panics("src/b.rs", 1), panics("src/b.rs", 2), panics("src/c.rs", 1)), (0, 1, 1));
}

#[test]
fn dead_links_are_caught() {
    let exists = |path: &Path| path == Path::new("docs/a/../b.md");
    let wrong = |path: &str, text: &str| dead_links(&file(path, text), exists).len();
    assert_eq!(wrong("docs/a/c.md", "[b](../b.md#x), [here](#y), [web](https://b.example/z)"), 0);
    assert_eq!(wrong("docs/a/c.md", "[b](b.md) and [c](../c.md)"), 2);
    assert_eq!(wrong("src/a.rs", "// docs/a/../b.md; see docs/c.md.\nlet a = b[c](d);"), 1);
}

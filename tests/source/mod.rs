//! Reads Rust source just well enough for the tests that keep the house in order: it knows what is
//! code, what is a comment, what is a string, and which modules are only there for tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A word or a mark of code, and the line it is on (from 1). Strings, characters and numbers are
/// one nameless token each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    pub text: String,
    pub line: usize,
}

/// What stands for a literal.
pub const LITERAL: &str = "\"\"";

/// The code of a file without comments, as tokens.
pub fn tokens(source: &str) -> Vec<Token> {
    read(source).tokens
}

/// The lines (from 1) of string literals that go over several lines by themselves: tables,
/// drawings, expected output. A literal whose lines end with a backslash is text like any other.
pub fn data_lines(source: &str) -> BTreeSet<usize> {
    read(source).data_lines
}

fn read(source: &str) -> Reader<'_> {
    let mut reader = Reader { rest: source, line: 1, tokens: Vec::new(), data_lines: BTreeSet::new() };
    while reader.step() {}
    reader
}

struct Reader<'a> {
    rest: &'a str,
    line: usize,
    tokens: Vec<Token>,
    data_lines: BTreeSet<usize>,
}

impl Reader<'_> {
    fn step(&mut self) -> bool {
        let Some(first) = self.rest.chars().next() else { return false };
        let raw = self.raw_string_hashes();
        if first.is_whitespace() {
            self.skip(first.len_utf8());
        } else if self.rest.starts_with("//") {
            self.skip(self.rest.find('\n').unwrap_or(self.rest.len()));
        } else if self.rest.starts_with("/*") {
            self.skip(self.comment_length());
        } else if let Some((prefix, hashes)) = raw {
            let end = format!("\"{}", "#".repeat(hashes));
            let body = prefix + hashes + 1;
            let length = self.rest[body..].find(&end).map_or(self.rest.len(), |at| body + at + end.len());
            self.literal(length);
        } else if let Some(prefix) = ["\"", "b\"", "c\""].iter().find(|prefix| self.rest.starts_with(**prefix)) {
            self.literal(self.quoted_length(prefix.len(), '"'));
        } else if let Some(length) = self.character_length() {
            self.literal(length);
        } else if first == '\'' {
            // A lifetime, whose mark keeps it apart from words: 'static is no static.
            let name = self.rest[1..].find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(self.rest.len() - 1);
            self.token(1 + name);
        } else if first.is_alphabetic() || first == '_' {
            self.token(self.run_length());
        } else if first.is_ascii_digit() {
            self.literal(self.run_length());
        } else if self.rest.starts_with("::") {
            self.token(2);
        } else {
            self.token(first.len_utf8());
        }
        true
    }

    fn skip(&mut self, length: usize) {
        self.line += self.rest[..length].matches('\n').count();
        self.rest = &self.rest[length..];
    }

    fn token(&mut self, length: usize) {
        self.tokens.push(Token { text: self.rest[..length].to_owned(), line: self.line });
        self.skip(length);
    }

    fn literal(&mut self, length: usize) {
        let literal = &self.rest[..length];
        let broken = literal.matches('\n').count();
        if broken > literal.matches("\\\n").count() {
            self.data_lines.extend(self.line..=self.line + broken);
        }
        self.tokens.push(Token { text: LITERAL.to_owned(), line: self.line });
        self.skip(length);
    }

    fn run_length(&self) -> usize {
        self.rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(self.rest.len())
    }

    fn comment_length(&self) -> usize {
        let (mut depth, mut at) = (0, 0);
        while at < self.rest.len() {
            let rest = &self.rest[at..];
            if rest.starts_with("/*") {
                (depth, at) = (depth + 1, at + 2);
            } else if rest.starts_with("*/") {
                (depth, at) = (depth - 1, at + 2);
                if depth == 0 {
                    break;
                }
            } else {
                at += rest.chars().next().map_or(1, char::len_utf8);
            }
        }
        at
    }

    /// For `r"`, `r#"`, `br##"` and so on: the letters and the hashes.
    fn raw_string_hashes(&self) -> Option<(usize, usize)> {
        let prefix = ["r", "br", "cr"].iter().find(|prefix| {
            let rest = self.rest.strip_prefix(**prefix);
            rest.is_some_and(|rest| rest.trim_start_matches('#').starts_with('"'))
        })?;
        let hashes = self.rest[prefix.len()..].find('"')?;
        Some((prefix.len(), hashes))
    }

    /// The length of a quoted literal whose content begins at `start`.
    fn quoted_length(&self, start: usize, quote: char) -> usize {
        let mut escaped = false;
        for (at, c) in self.rest[start..].char_indices() {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                c if c == quote => return start + at + 1,
                _ => {}
            }
        }
        self.rest.len()
    }

    /// The length of `'x'`, `b'x'` or `'\n'`; none for a lifetime.
    fn character_length(&self) -> Option<usize> {
        let start = ["'", "b'"].iter().find(|prefix| self.rest.starts_with(**prefix))?.len();
        let mut inside = self.rest[start..].chars();
        match (inside.next()?, inside.next()) {
            ('\\', _) => Some(self.quoted_length(start, '\'')),
            (c, Some('\'')) => Some(start + c.len_utf8() + 1),
            _ => None,
        }
    }
}

/// The tokens without the items marked `#[cfg(test)]`, and the names of modules so marked that are
/// files of their own.
pub fn without_tests(tokens: &[Token]) -> (Vec<Token>, Vec<String>) {
    let (mut kept, mut test_files) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < tokens.len() {
        let Some(after) = test_attribute(tokens, at) else {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        };
        let end = item_end(tokens, after);
        if let Some(name) = tokens[after..end].windows(3).find(|w| w[0].text == "mod" && w[2].text == ";") {
            test_files.push(name[1].text.clone());
        }
        at = end;
    }
    (kept, test_files)
}

/// If `#[cfg(test)]` (or with more conditions beside) begins at `at`: the first token after it.
fn test_attribute(tokens: &[Token], at: usize) -> Option<usize> {
    let text = |n: usize| tokens.get(at + n).map_or("", |token| token.text.as_str());
    if [text(0), text(1), text(2), text(3)] != ["#", "[", "cfg", "("] {
        return None;
    }
    let close = at + tokens[at..].iter().position(|token| token.text == "]")?;
    let words: Vec<_> = tokens[at..close].iter().map(|token| token.text.as_str()).collect();
    (words.contains(&"test") && !words.contains(&"not") && !words.contains(&"any")).then_some(close + 1)
}

/// The first token after the item that begins at `at`: past its `;`, or past the brace that closes
/// its body.
fn item_end(tokens: &[Token], at: usize) -> usize {
    let mut depth = 0;
    for (n, token) in tokens.iter().enumerate().skip(at) {
        match token.text.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth -= 1,
            _ => {}
        }
        if depth == 0 && matches!(token.text.as_str(), ";" | "}") {
            return n + 1;
        }
    }
    tokens.len()
}

/// A file of the project.
pub struct SourceFile {
    /// Its path from the project's root, with `/`.
    pub path: String,
    pub text: String,
}

/// The project's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file under `directory` (from the project's root), but for what builds leave in
/// `target`.
pub fn rust_files(directory: &str) -> Vec<SourceFile> {
    files(directory, |path| path.extension().is_some_and(|extension| extension == "rs"))
}

/// Every file under `directory` (from the project's root) that `wanted` wants, but for what builds
/// leave in `target`.
pub fn files(directory: &str, wanted: impl Fn(&Path) -> bool) -> Vec<SourceFile> {
    let mut paths = Vec::new();
    walk(&root().join(directory), &mut paths);
    paths.retain(|path| wanted(path));
    paths.sort();
    paths.iter().map(|path| file(path)).collect()
}

/// The file at `path` (from the project's root).
pub fn file(path: &Path) -> SourceFile {
    let path = root().join(path);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let path = path.strip_prefix(root()).unwrap_or(&path).to_string_lossy().into_owned();
    SourceFile { path, text }
}

fn walk(directory: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if !path.is_dir() {
            into.push(path);
        } else if entry.file_name() != "target" {
            walk(&path, into);
        }
    }
}

//! Archives as the kernel unpacks them for its first root: cpio, "newc", not compressed (an
//! emulated processor unpacks slowly).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// The bit that says directory, regular file or symbolic link, as in `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
/// What every header begins with.
const MAGIC: &str = "070701";
/// The name after which nothing comes.
const END: &str = "TRAILER!!!";

/// One name in the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Directory,
    File { from: PathBuf, mode: u32 },
    Text { bytes: Vec<u8>, mode: u32 },
    Link { target: String },
}

/// A tree of files to be.
#[derive(Debug, Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// Adds a directory and those above it.
    pub fn directory(&mut self, path: &str) {
        let path = path.trim_matches('/');
        for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
            if let Some(above) = path.get(..end).filter(|above| !above.is_empty()) {
                self.entries.entry(above.to_owned()).or_insert(Entry::Directory);
            }
        }
    }

    fn add(&mut self, path: &str, entry: Entry) {
        let path = path.trim_matches('/');
        if let Some((above, _)) = path.rsplit_once('/') {
            self.directory(above);
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// Adds a copy of the file `from`.
    pub fn file(&mut self, path: &str, from: &Path, mode: u32) {
        self.add(path, Entry::File { from: from.to_owned(), mode });
    }

    /// Adds a file with this text.
    pub fn text(&mut self, path: &str, text: impl Into<Vec<u8>>, mode: u32) {
        self.add(path, Entry::Text { bytes: text.into(), mode });
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.add(path, Entry::Link { target: target.to_owned() });
    }

    /// What the archive is made of, one line for each name, so that two archives with the same
    /// lines are the same.
    pub fn inputs(&self) -> io::Result<String> {
        let mut all = String::new();
        for (path, entry) in &self.entries {
            let line = match entry {
                Entry::File { from, mode } => {
                    let meta = fs::metadata(from)?;
                    format!("{path} {mode:o} {} {} {:?}\n", from.display(), meta.len(), meta.modified()?)
                }
                other => format!("{path} {other:?}\n"),
            };
            all.push_str(&line);
        }
        Ok(all)
    }

    /// Writes it to `path`, unless what is there was made of the same inputs. True if it was
    /// written.
    pub fn write_if_changed(&self, path: &Path) -> io::Result<bool> {
        let (note, inputs) = (path.with_extension("inputs"), self.inputs()?);
        if path.exists() && fs::read_to_string(&note).is_ok_and(|old| old == inputs) {
            return Ok(false);
        }
        // First the archive under another name, then its note: a run that is interrupted leaves
        // nothing that looks right.
        let fresh = path.with_extension("new");
        self.write(BufWriter::new(File::create(&fresh)?))?;
        let _ = fs::remove_file(&note);
        fs::rename(&fresh, path)?;
        fs::write(&note, inputs)?;
        Ok(true)
    }

    /// Writes it.
    pub fn write(&self, mut out: impl Write) -> io::Result<()> {
        for (number, (path, entry)) in (1..).zip(&self.entries) {
            match entry {
                Entry::Directory => member(&mut out, number, path, DIRECTORY | 0o755, &[])?,
                Entry::Text { bytes, mode } => member(&mut out, number, path, REGULAR | mode, bytes)?,
                Entry::Link { target } => member(&mut out, number, path, LINK | 0o777, target.as_bytes())?,
                Entry::File { from, mode } => {
                    let mut bytes = Vec::new();
                    File::open(from)?.read_to_end(&mut bytes)?;
                    member(&mut out, number, path, REGULAR | mode, &bytes)?;
                }
            }
        }
        member(&mut out, 0, END, 0, &[])?;
        out.flush()
    }
}

/// One header, name and content, each filled up to a multiple of four bytes.
fn member(out: &mut impl Write, number: u32, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
    let too_big = |_| io::Error::new(io::ErrorKind::FileTooLarge, format!("{path} is too big for a cpio archive"));
    let size = u32::try_from(content.len()).map_err(too_big)?;
    let name_size = u32::try_from(path.len() + 1).map_err(too_big)?;
    // inode, mode, owner, group, links, time, size, device (2), special device (2), size of the
    // name, checksum.
    let fields = [number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
    let mut header = MAGIC.to_owned();
    for field in fields {
        header.push_str(&format!("{field:08x}"));
    }
    header.push_str(path);
    header.push('\0');
    out.write_all(header.as_bytes())?;
    fill(out, header.len())?;
    out.write_all(content)?;
    fill(out, content.len())
}

fn fill(out: &mut impl Write, length: usize) -> io::Result<()> {
    let missing = length.wrapping_neg() % 4;
    out.write_all([0; 3].get(..missing).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(archive: &Archive) -> Vec<&str> {
        archive.entries.keys().map(String::as_str).collect()
    }

    #[test]
    fn directories_above_come_first() {
        let mut archive = Archive::default();
        archive.text("/a/b/c", "x", 0o644);
        archive.directory("a/d/");
        assert_eq!(names(&archive), ["a", "a/b", "a/b/c", "a/d"]);
    }

    #[test]
    fn a_member_is_laid_out_as_newc() {
        let mut out = Vec::new();
        member(&mut out, 7, "ab", REGULAR | 0o644, b"hello").unwrap();
        let header = "070701\
                      00000007000081a40000000000000000000000010000000000000005\
                      00000000000000000000000000000000\
                      0000000300000000";
        assert_eq!(out.len() % 4, 0);
        assert_eq!(&out[..110], header.as_bytes());
        assert_eq!(&out[110..], b"ab\0\0\0\0hello\0\0\0".get(..out.len() - 110).unwrap());
    }

    #[test]
    fn it_is_written_again_only_if_an_input_changed() {
        let directory = tempfile::tempdir().unwrap();
        let (input, output) = (directory.path().join("in"), directory.path().join("out.cpio"));
        fs::write(&input, "one").unwrap();
        let mut archive = Archive::default();
        archive.file("f", &input, 0o644);
        archive.link("l", "f");
        assert!(archive.write_if_changed(&output).unwrap());
        assert!(!archive.write_if_changed(&output).unwrap());
        fs::write(&input, "three").unwrap();
        assert!(archive.write_if_changed(&output).unwrap());
        assert!(String::from_utf8_lossy(&fs::read(&output).unwrap()).contains("three"));
        archive.text("t", "", 0o600);
        assert!(archive.write_if_changed(&output).unwrap());
    }
}

//! Floor 3: the third party that decides who runs a guest.
//!
//! An arbiter keeps one [`Record`] per guest and replaces it only by compare-and-swap: of two nodes that start from the same record, one
//! wins. A node that gets no answer knows nothing, and must act so.

pub mod file;
pub mod none;

use crate::protocol::record::Record;
use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// Keeps the record of one guest. Every call may take as long as the arbiter's patience allows, so callers give it a thread.
pub trait Arbiter: Send {
    /// The guest's record; `None` if it has none yet.
    ///
    /// # Errors
    /// [`ArbiterError`]: nothing is known of the record then.
    fn read(&mut self) -> Result<Option<Record>, ArbiterError>;

    /// Puts `new` in place of `expected` (`None`: no record), if that is what stands.
    ///
    /// # Errors
    /// [`ArbiterError`]: the swap may have been carried out or not. Asking again tells: a swap that finds its own `new` was won before.
    fn swap(&mut self, expected: Option<&Record>, new: &Record) -> Result<Swap, ArbiterError>;

    /// The arbiter in a few words, for logs and status.
    fn describe(&self) -> String;
}

/// What became of a swap that was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swap {
    /// The new record stands.
    Won,
    /// Another record stands (or none), and nothing was changed.
    Lost(Option<Record>),
}

/// Why an arbiter did not answer. Each message is one line that says what to do.
#[derive(Debug, Error)]
pub enum ArbiterError {
    /// It did not answer in time, or cannot be asked at all.
    #[error("arbiter {arbiter} is out of reach: {why}")]
    Unreachable {
        /// Which arbiter.
        arbiter: String,
        /// Why, and what to do.
        why: String,
    },
    /// Its directory is not there.
    #[error("arbiter directory {} does not exist: mount the shared storage, or create the directory on it", path.display())]
    NoDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// The record is there and cannot be trusted. It is never taken for a missing one.
    #[error(
        "arbiter record {} is damaged ({what}): restore it; or, once no node runs the guest, remove it and start the guest anew",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// No room for a new record; the old one stands.
    #[error("no space left for arbiter record {}: the old record stands; make room there", path.display())]
    Full {
        /// The file.
        path: PathBuf,
    },
    /// The filesystem cannot lock.
    #[error("arbiter directory {} has no file locks ({source}): use NFS version 4, a cluster filesystem, or a local directory", path.display())]
    NoLocks {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Anything else the system says.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Which arbiter an operator names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArbiterSpec {
    /// `file:/DIRECTORY`: a directory that both nodes see.
    File(PathBuf),
    /// `none`: nobody.
    None,
}

/// Why an arbiter's name was not understood.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SpecError {
    /// A scheme this release does not have, or none at all.
    #[error("unknown arbiter {0:?}: this mcd knows file:/DIRECTORY and none")]
    Unknown(String),
    /// The directory is not named from the root.
    #[error(
        "arbiter {0:?}: name the directory from the root, as in file:/DIRECTORY, so that it is the same for every node"
    )]
    NotAbsolute(String),
}

impl ArbiterSpec {
    /// Reads `file:/DIRECTORY` or `none`.
    ///
    /// # Errors
    /// [`SpecError`], which names what is known.
    pub fn parse(text: &str) -> Result<ArbiterSpec, SpecError> {
        if text == "none" {
            return Ok(ArbiterSpec::None);
        }
        match text.strip_prefix("file:") {
            Some(path) if path.starts_with('/') && (!path.starts_with("//") || path.starts_with("///")) => {
                Ok(ArbiterSpec::File(PathBuf::from(path)))
            }
            Some(_) => Err(SpecError::NotAbsolute(text.to_owned())),
            None => Err(SpecError::Unknown(text.to_owned())),
        }
    }
}

impl std::str::FromStr for ArbiterSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<ArbiterSpec, SpecError> {
        ArbiterSpec::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_arbiters_are_read() {
        assert_eq!(ArbiterSpec::parse("none"), Ok(ArbiterSpec::None));
        assert_eq!(ArbiterSpec::parse("file:/srv/mcd"), Ok(ArbiterSpec::File("/srv/mcd".into())));
        assert_eq!(ArbiterSpec::parse("file:///srv/mcd"), Ok(ArbiterSpec::File("/srv/mcd".into())));
        for bad in ["file:srv", "file:", "file://host/srv", "file:./srv"] {
            assert_eq!(ArbiterSpec::parse(bad), Err(SpecError::NotAbsolute(bad.into())));
        }
        for bad in ["etcd:http://127.0.0.1:2379", "command:/bin/true", "", "None", "/srv/mcd"] {
            let error = ArbiterSpec::parse(bad).unwrap_err();
            assert_eq!(error, SpecError::Unknown(bad.into()));
            assert!(error.to_string().contains("file:/DIRECTORY and none"));
        }
    }
}

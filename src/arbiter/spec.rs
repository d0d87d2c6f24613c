//! How an arbiter is named: `file:/DIRECTORY`, `etcd:URL,URL/PREFIX`, `command:/SCRIPT` or `none`.

use std::path::PathBuf;
use thiserror::Error;
use ureq::http::Uri;

/// The prefix of the keys of an etcd arbiter that was given none.
const ETCD_PREFIX_DEFAULT: &str = "/mcd";

/// More etcd members than any cluster has.
const ENDPOINTS_MAX: usize = 16;

/// Which arbiter an operator names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArbiterSpec {
    /// `file:/DIRECTORY`: a directory that both nodes see.
    File(PathBuf),
    /// `etcd:URL,URL/PREFIX`: an etcd cluster.
    Etcd {
        /// Each member's client URL, without a path.
        endpoints: Vec<String>,
        /// What the keys begin with: no slash at the end.
        prefix: String,
    },
    /// `command:/SCRIPT`: a fencing script of this node.
    Command(PathBuf),
    /// `none`: nobody.
    None,
}

/// Why an arbiter's name was not understood.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SpecError {
    /// A scheme this release does not have, or none at all.
    #[error(
        "unknown arbiter {0:?}: write file:/DIRECTORY, etcd:http://HOST:2379,http://HOST:2379/PREFIX, \
            command:/SCRIPT or none"
    )]
    Unknown(String),
    /// The directory is not named from the root.
    #[error(
        "arbiter {0:?}: name the directory from the root, as in file:/DIRECTORY, so that it is the same for every node"
    )]
    NotAbsolute(String),
    /// The script is not named from the root.
    #[error("arbiter {0:?}: name the script from the root, as in command:/etc/mcd/fence")]
    NoScript(String),
    /// An endpoint of etcd is not one.
    #[error(
        "arbiter endpoint {0:?}: write http://HOST:PORT or https://HOST:PORT for each, separated by commas, \
            a prefix after the last"
    )]
    BadEndpoint(String),
    /// Some endpoints are encrypted and some are not.
    #[error(
        "arbiter {0:?}: either every endpoint has https:// or none has, \
            for one in the clear would give away what the others hide"
    )]
    MixedEndpoints(String),
}

impl ArbiterSpec {
    /// Reads the name of an arbiter.
    ///
    /// # Errors
    /// [`SpecError`], which shows how to write it.
    pub fn parse(text: &str) -> Result<ArbiterSpec, SpecError> {
        let from_root = |path: &str| path.starts_with('/') && (!path.starts_with("//") || path.starts_with("///"));
        match text.split_once(':') {
            None if text == "none" => Ok(ArbiterSpec::None),
            Some(("file", path)) if from_root(path) => Ok(ArbiterSpec::File(PathBuf::from(path))),
            Some(("file", _)) => Err(SpecError::NotAbsolute(text.to_owned())),
            Some(("command", path)) if from_root(path) && !path.ends_with('/') => {
                Ok(ArbiterSpec::Command(PathBuf::from(path)))
            }
            Some(("command", _)) => Err(SpecError::NoScript(text.to_owned())),
            Some(("etcd", rest)) => etcd(rest),
            _ => Err(SpecError::Unknown(text.to_owned())),
        }
    }
}

fn etcd(text: &str) -> Result<ArbiterSpec, SpecError> {
    let mut urls: Vec<&str> = text.split(',').collect();
    // A path after the last endpoint is the prefix of the keys.
    let mut prefix = "";
    if let Some(last) = urls.last_mut() {
        let host = last.find("://").map_or(0, |at| at + 3);
        if let Some(slash) = last.get(host..).and_then(|rest| rest.find('/')) {
            (*last, prefix) = last.split_at(host + slash);
        }
    }
    if urls.len() > ENDPOINTS_MAX {
        return Err(SpecError::BadEndpoint(text.to_owned()));
    }
    let endpoints = urls.into_iter().map(endpoint).collect::<Result<Vec<_>, _>>()?;
    let encrypted = endpoints.iter().filter(|url| url.starts_with("https://")).count();
    if encrypted != 0 && encrypted != endpoints.len() {
        return Err(SpecError::MixedEndpoints(text.to_owned()));
    }
    let prefix = match prefix.trim_end_matches('/') {
        "" => ETCD_PREFIX_DEFAULT.to_owned(),
        prefix if prefix.len() <= 256 && prefix.bytes().all(|byte| byte.is_ascii_graphic()) => prefix.to_owned(),
        other => return Err(SpecError::BadEndpoint(other.to_owned())),
    };
    Ok(ArbiterSpec::Etcd { endpoints, prefix })
}

/// A URL that is nothing but scheme, host and port.
fn endpoint(url: &str) -> Result<String, SpecError> {
    let bad = || SpecError::BadEndpoint(url.to_owned());
    let uri: Uri = url.parse().map_err(|_| bad())?;
    let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(bad)?;
    let scheme = uri.scheme_str().filter(|scheme| matches!(*scheme, "http" | "https")).ok_or_else(bad)?;
    let port = uri.port_u16().filter(|port| *port != 0).ok_or_else(bad)?;
    let plain = format!("{scheme}://{host}:{port}");
    if plain == url { Ok(plain) } else { Err(bad()) }
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

    fn etcd(endpoints: &[&str], prefix: &str) -> Result<ArbiterSpec, SpecError> {
        let endpoints = endpoints.iter().map(|url| (*url).to_owned()).collect();
        Ok(ArbiterSpec::Etcd { endpoints, prefix: prefix.to_owned() })
    }

    #[test]
    fn names_of_arbiters_are_read() {
        let parse = ArbiterSpec::parse;
        assert_eq!(parse("none"), Ok(ArbiterSpec::None));
        assert_eq!(parse("file:/srv/mcd"), Ok(ArbiterSpec::File("/srv/mcd".into())));
        assert_eq!(parse("file:/srv/a:b"), Ok(ArbiterSpec::File("/srv/a:b".into())));
        assert_eq!(parse("file:///srv/mcd"), Ok(ArbiterSpec::File("/srv/mcd".into())));
        assert_eq!(parse("command:/etc/mcd/fence"), Ok(ArbiterSpec::Command("/etc/mcd/fence".into())));
        assert_eq!(parse("etcd:http://a:2379"), etcd(&["http://a:2379"], "/mcd"));
        assert_eq!(parse("etcd:http://a:2379/"), etcd(&["http://a:2379"], "/mcd"));
        assert_eq!(
            parse("etcd:https://10.0.0.1:2379,https://[fd00::1]:2379/one/two/"),
            etcd(&["https://10.0.0.1:2379", "https://[fd00::1]:2379"], "/one/two")
        );
    }

    #[test]
    fn what_is_no_arbiter_is_told_so() {
        for bad in ["file:srv", "file:", "file://host/srv", "file:./srv"] {
            assert_eq!(ArbiterSpec::parse(bad), Err(SpecError::NotAbsolute(bad.into())));
        }
        for bad in ["command:", "command:fence", "command:/", "command:/etc/"] {
            assert_eq!(ArbiterSpec::parse(bad), Err(SpecError::NoScript(bad.into())));
        }
        for bad in ["zookeeper:a:1", "", "None", "none:", "/srv/mcd"] {
            let error = ArbiterSpec::parse(bad).unwrap_err();
            assert_eq!(error, SpecError::Unknown(bad.into()));
            assert!(error.to_string().contains("file:/DIRECTORY"));
        }
        for bad in [
            "a:2379",
            "",
            "http://",
            "http://a",
            "http://a:0",
            "ftp://a:1",
            "http://a:2379,",
            "http://a:2379/x,http://b:2379",
            "http://u:p@a:2379",
            "http://a:2379?x",
            "http://a:2379/a b",
            "http://a:99999",
        ] {
            let error = ArbiterSpec::parse(&format!("etcd:{bad}"));
            assert!(matches!(error, Err(SpecError::BadEndpoint(_))), "{bad}: {error:?}");
        }
        assert!(matches!(ArbiterSpec::parse("etcd:http://a:1,https://b:1"), Err(SpecError::MixedEndpoints(_))));
    }
}

//! The arbiter `etcd:`: one key per guest in an etcd cluster, swapped by a transaction.
//!
//! etcd's own JSON gateway is spoken (`POST /v3/kv/range`, `/v3/kv/txn`; etcd 3.4 and newer), so
//! that a blocking HTTP client is enough. The key `PREFIX/GUEST` holds the same text as the file of
//! the arbiter `file:`. A swap compares the whole value with the text of the expected record (or
//! that the key does not exist); since a swap raises the generation (or changes nothing), a text
//! never comes back, and the value serves as well as a revision would. Reads and transactions are
//! linearizable: a member that has lost its cluster does not answer them.
//!
//! The endpoints are tried in turn, beginning with the one that answered last. All of a question
//! together takes no longer than the arbiter's timeout, of which each endpoint still to be tried
//! gets its share: a member that hangs costs its share and no more.

mod client;
mod wire;

use super::text;
use super::{Arbiter, ArbiterError, Swap};
use crate::protocol::record::Record;
use crate::protocol::types::GuestName;
use client::{AskError, Client};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use wire::{Call, Reply};

/// How long a question may take, over all endpoints, by default.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(2);

/// How often the row of endpoints is walked in one question: once more than once, for a connection
/// that etcd closed while it was idle.
const ROUNDS_MAX: usize = 2;

/// Where an etcd cluster is, and how to talk to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdConfig {
    /// Each member's client URL, such as `http://10.0.0.1:2379`; at least one.
    pub endpoints: Vec<String>,
    /// What the keys begin with, such as `/mcd`.
    pub prefix: String,
    /// For `https` endpoints: whom to trust and who we are.
    pub tls: Option<EtcdTls>,
    /// For a cluster with authentication.
    pub login: Option<EtcdLogin>,
    /// How long a question may take, over all endpoints.
    pub timeout: Duration,
}

/// PEM files. They are read again whenever no endpoint answered, so that certificates can be
/// renewed under a running node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdTls {
    /// Certificates of the authorities that sign the members' certificates.
    pub ca: PathBuf,
    /// Our own certificate (with its chain) and its key, if the cluster wants one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A user of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdLogin {
    /// The name.
    pub user: String,
    /// A file whose first line is the password.
    pub password_file: PathBuf,
}

/// The arbiter `etcd:` for one guest.
pub struct EtcdArbiter {
    config: EtcdConfig,
    guest: GuestName,
    key: String,
    /// The connections; none while the files they need have to be read again.
    client: Option<Client>,
    /// The endpoint that answered last.
    favourite: usize,
}

impl EtcdArbiter {
    /// The arbiter of `guest` in a cluster. Reads the files named in `config` and connects to
    /// nobody yet.
    ///
    /// # Errors
    /// A file that cannot be read, or that does not hold what it should.
    pub fn new(config: EtcdConfig, guest: &GuestName) -> Result<EtcdArbiter, ArbiterError> {
        let client = Some(Client::new(&config)?);
        let key = format!("{}/{guest}", config.prefix);
        Ok(EtcdArbiter { config, guest: guest.clone(), key, client, favourite: 0 })
    }

    /// The key that holds the record.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Asks one endpoint after the other. Also whether more than one try was made: an earlier
    /// one may have been carried out.
    fn ask(&mut self, call: &Call) -> Result<(Reply, bool), ArbiterError> {
        let deadline = Instant::now() + self.config.timeout;
        let mut client = match self.client.take() {
            Some(client) => client,
            None => Client::new(&self.config)?,
        };
        let began = Instant::now();
        let count = self.config.endpoints.len();
        let tries = count * ROUNDS_MAX;
        let mut failures: Vec<(usize, AskError)> = Vec::new();
        for step in 0..tries {
            let at = (self.favourite + step) % count.max(1);
            let Some(url) = self.config.endpoints.get(at) else { break };
            let left = deadline.saturating_duration_since(Instant::now());
            // In the last round all that is left is one endpoint's, for then the others have failed
            // twice.
            let share = left / u32::try_from(count.saturating_sub(step).max(1)).unwrap_or(1);
            if share.is_zero() {
                break;
            }
            match client.ask(url, call, share) {
                Ok(reply) => {
                    self.favourite = at;
                    self.client = Some(client);
                    return Ok((reply, step > 0));
                }
                Err(error) => {
                    tracing::debug!(url, %error, "no answer from etcd");
                    failures.retain(|(earlier, _)| *earlier != at);
                    failures.push((at, error));
                }
            }
        }
        // Whoever answers first next time, it should not be one that just failed; and the files may
        // have been renewed.
        self.favourite = (self.favourite + 1) % count.max(1);
        Err(self.unreachable(&failures, began.elapsed()))
    }

    fn unreachable(&self, failures: &[(usize, AskError)], waited: Duration) -> ArbiterError {
        let reasons = failures
            .iter()
            .map(|(at, error)| format!("{}: {error}", self.config.endpoints.get(*at).map_or("?", |url| url.as_str())));
        let reasons = reasons.collect::<Vec<_>>().join("; ");
        let waited_ms = waited.as_millis();
        ArbiterError::Unreachable {
            arbiter: self.describe(),
            why: format!(
                "no answer after {waited_ms} ms ({reasons}); \
                    check that the cluster has a quorum and that this host reaches it"
            ),
        }
    }

    fn out_of_place(&self) -> ArbiterError {
        let why = "it answered a read with something else; check that the endpoints are etcd's".to_owned();
        ArbiterError::Unreachable { arbiter: self.describe(), why }
    }

    fn record_of(&self, value: Option<Vec<u8>>) -> Result<Option<Record>, ArbiterError> {
        let Some(bytes) = value else { return Ok(None) };
        let corrupt = |what| ArbiterError::Corrupt { record: format!("etcd key {}", self.key), what };
        text::read(&self.guest, &bytes).map(Some).map_err(corrupt)
    }
}

impl Arbiter for EtcdArbiter {
    fn read(&mut self) -> Result<Option<Record>, ArbiterError> {
        match self.ask(&Call::range(&self.key))?.0 {
            Reply::Value(value) => self.record_of(value),
            Reply::Swapped => Err(self.out_of_place()),
        }
    }

    fn swap(&mut self, expected: Option<&Record>, new: &Record) -> Result<Swap, ArbiterError> {
        let expected = expected.map(|record| text::write(&self.guest, record));
        let call = Call::swap(&self.key, expected.as_deref(), &text::write(&self.guest, new));
        match self.ask(&call)? {
            (Reply::Swapped, _) => Ok(Swap::Won),
            (Reply::Value(value), tried_before) => {
                let current = self.record_of(value)?;
                // Then an earlier try of this very swap was carried out, and only its answer was
                // lost.
                let ours = tried_before && current.as_ref() == Some(new);
                Ok(if ours { Swap::Won } else { Swap::Lost(current) })
            }
        }
    }

    fn describe(&self) -> String {
        format!("etcd:{}{}", self.config.endpoints.join(","), self.config.prefix)
    }
}

#[cfg(test)]
mod tests;

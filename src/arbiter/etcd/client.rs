//! One HTTP exchange with one etcd member, with TLS and with a token where they are wanted.

use super::super::ArbiterError;
use super::wire::{self, Call, Reply};
use super::{EtcdConfig, EtcdLogin, EtcdTls};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};
use thiserror::Error;
use ureq::Agent;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};

/// More bytes than any answer about one record has.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// More bytes than any file of certificates, keys or passwords has that somebody means.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// More than any complaint worth reading.
const COMPLAINT_CHARS_MAX: usize = 200;

/// etcd's answer to a token it does not know (any more), as an HTTP status.
const UNAUTHENTICATED: u16 = 401;

/// Why a member did not answer. In each case the question may have been carried out.
#[derive(Debug, Error)]
pub(super) enum AskError {
    #[error("{0}")]
    Http(#[from] ureq::Error),
    #[error("{}", etcd_error(*.0, .1))]
    Refused(u16, String),
    #[error("it answered something that no etcd of version 3.4 or newer answers")]
    NotUnderstood,
}

fn etcd_error(status: u16, complaint: &str) -> String {
    if complaint.is_empty() { format!("HTTP status {status}") } else { complaint.to_owned() }
}

/// The connections to a cluster.
pub(super) struct Client {
    agent: Agent,
    login: Option<(String, String)>,
    token: Option<String>,
}

impl Client {
    pub(super) fn new(config: &EtcdConfig) -> Result<Client, ArbiterError> {
        let settings = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // A proxy that answers in etcd's place, or hangs, is not what an arbiter is for.
            .proxy(None)
            .https_only(config.tls.is_some());
        let settings = match &config.tls {
            Some(tls) => settings.tls_config(tls_config(tls)?),
            None => settings,
        };
        let login = config.login.as_ref().map(read_login).transpose()?;
        Ok(Client { agent: settings.build().into(), login, token: None })
    }

    /// Asks the member at `url`, for no longer than `timeout`.
    pub(super) fn ask(&mut self, url: &str, call: &Call, timeout: Duration) -> Result<Reply, AskError> {
        let deadline = Instant::now() + timeout;
        let mut had_token = self.token.is_some();
        loop {
            if !had_token {
                self.log_in(url, deadline)?;
            }
            let (status, body) = self.post(url, call, deadline)?;
            if status == UNAUTHENTICATED && self.login.is_some() && had_token {
                // Tokens run out. The question was not carried out; it is asked once more, with a
                // new one.
                self.token = None;
                had_token = false;
                continue;
            }
            if status != 200 {
                return Err(refused(status, &body));
            }
            return wire::reply(call, &body).ok_or(AskError::NotUnderstood);
        }
    }

    fn log_in(&mut self, url: &str, deadline: Instant) -> Result<(), AskError> {
        let Some((user, password)) = &self.login else { return Ok(()) };
        let (status, body) = self.post(url, &Call::authenticate(user, password), deadline)?;
        if status != 200 {
            return Err(refused(status, &body));
        }
        self.token = Some(wire::token(&body).ok_or(AskError::NotUnderstood)?);
        Ok(())
    }

    fn post(&self, url: &str, call: &Call, deadline: Instant) -> Result<(u16, Vec<u8>), AskError> {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let mut request = self.agent.post(format!("{url}{}", call.path)).header("Content-Type", "application/json");
        if let Some(token) = &self.token {
            request = request.header("Authorization", token);
        }
        let mut response = request.config().timeout_global(Some(left)).build().send(call.body.as_slice())?;
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec()?;
        Ok((status, body))
    }
}

fn refused(status: u16, body: &[u8]) -> AskError {
    let complaint = wire::complaint(body).unwrap_or_default();
    // One line, whatever it is that answered.
    let clean = complaint.chars().map(|c| if c.is_control() { ' ' } else { c });
    AskError::Refused(status, clean.take(COMPLAINT_CHARS_MAX).collect())
}

fn tls_config(tls: &EtcdTls) -> Result<TlsConfig, ArbiterError> {
    let roots = certificates(&tls.ca)?;
    let identity = match &tls.identity {
        Some((certificate, key)) => Some(ClientCert::new_with_certs(&certificates(certificate)?, private_key(key)?)),
        None => None,
    };
    Ok(TlsConfig::builder().root_certs(RootCerts::new_with_certs(&roots)).client_cert(identity).build())
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>, ArbiterError> {
    let bad = || ArbiterError::BadPem { path: path.to_owned(), what: "certificate" };
    let bytes = read_file(path)?;
    let items = parse_pem(&bytes).collect::<Result<Vec<_>, _>>().map_err(|_| bad())?;
    let found: Vec<_> = items.into_iter().filter_map(certificate).collect();
    if found.is_empty() { Err(bad()) } else { Ok(found) }
}

fn certificate(item: PemItem<'static>) -> Option<Certificate<'static>> {
    match item {
        PemItem::Certificate(certificate) => Some(certificate),
        _ => None,
    }
}

fn private_key(path: &Path) -> Result<PrivateKey<'static>, ArbiterError> {
    PrivateKey::from_pem(&read_file(path)?)
        .map_err(|_| ArbiterError::BadPem { path: path.to_owned(), what: "private key" })
}

fn read_login(login: &EtcdLogin) -> Result<(String, String), ArbiterError> {
    let bytes = read_file(&login.password_file)?;
    let bad = || ArbiterError::BadPem { path: login.password_file.clone(), what: "password" };
    let text = String::from_utf8(bytes).map_err(|_| bad())?;
    let password = text.lines().next().filter(|line| !line.is_empty()).ok_or_else(bad)?;
    Ok((login.user.clone(), password.to_owned()))
}

fn read_file(path: &Path) -> Result<Vec<u8>, ArbiterError> {
    let failed = |source| ArbiterError::Io { doing: "read", path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)).map_err(failed)?;
    Ok(bytes)
}

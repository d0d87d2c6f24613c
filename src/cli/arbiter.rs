//! From flags to an arbiter: which flag goes with which arbiter, and what each needs.

use std::path::PathBuf;
use std::time::Duration;

use super::args::{ArbiterArgs, OnPeerLossFlag};
use super::config::required;
use super::exit::Failure;
use crate::arbiter::etcd::{EtcdConfig, EtcdLogin, EtcdTls};
use crate::arbiter::{ArbiterSpec, command, etcd, file};
use crate::node::config::{ArbiterConfig, OnPeerLoss};

/// The arbiter that the flags name.
pub(super) fn config(args: &ArbiterArgs) -> Result<ArbiterConfig, Failure> {
    let spec = required(
        args.arbiter.clone(),
        "--arbiter WHO",
        "give file:/DIRECTORY (one that both nodes see), etcd:URL, command:/SCRIPT, \
            or none together with --on-peer-loss",
    )?;
    check_company(args, &spec)?;
    let timeout = |default| args.arbiter_timeout_ms.map_or(default, Duration::from_millis);
    Ok(match spec {
        ArbiterSpec::File(directory) => ArbiterConfig::File { directory, timeout: timeout(file::TIMEOUT_DEFAULT) },
        ArbiterSpec::Command(script) => ArbiterConfig::Command { script, timeout: timeout(command::TIMEOUT_DEFAULT) },
        ArbiterSpec::Etcd { endpoints, prefix } => {
            let (tls, login) = (tls(args, &endpoints)?, login(args)?);
            ArbiterConfig::Etcd(EtcdConfig { endpoints, prefix, tls, login, timeout: timeout(etcd::TIMEOUT_DEFAULT) })
        }
        ArbiterSpec::None => ArbiterConfig::None { on_peer_loss: on_peer_loss(args.on_peer_loss)? },
    })
}

/// No flag may stand there without meaning anything.
fn check_company(args: &ArbiterArgs, spec: &ArbiterSpec) -> Result<(), Failure> {
    if args.on_peer_loss.is_some() && *spec != ArbiterSpec::None {
        return Err(Failure::usage(
            "--on-peer-loss is only for --arbiter none: with an arbiter, the arbiter decides; leave it out",
        ));
    }
    if args.arbiter_timeout_ms.is_some() && *spec == ArbiterSpec::None {
        return Err(Failure::usage(
            "--arbiter-timeout-ms goes with an arbiter, and --arbiter none is none; leave it out",
        ));
    }
    let is_etcd = matches!(spec, ArbiterSpec::Etcd { .. });
    let for_etcd = [
        ("--arbiter-ca", args.arbiter_ca.is_some()),
        ("--arbiter-cert", args.arbiter_cert.is_some()),
        ("--arbiter-key", args.arbiter_key.is_some()),
        ("--arbiter-user", args.arbiter_user.is_some()),
        ("--arbiter-password-file", args.arbiter_password_file.is_some()),
    ];
    match for_etcd.iter().find(|(_, given)| *given) {
        Some((flag, _)) if !is_etcd => {
            Err(Failure::usage(format!("{flag} is only for --arbiter etcd:…; leave it out")))
        }
        _ => Ok(()),
    }
}

fn tls(args: &ArbiterArgs, endpoints: &[String]) -> Result<Option<EtcdTls>, Failure> {
    let encrypted = endpoints.iter().all(|url| url.starts_with("https://"));
    let identity = both("--arbiter-cert", args.arbiter_cert.as_ref(), "--arbiter-key", args.arbiter_key.as_ref())?;
    match (&args.arbiter_ca, encrypted) {
        (Some(ca), true) => Ok(Some(EtcdTls { ca: ca.clone(), identity })),
        (None, true) => Err(Failure::usage(
            "--arbiter-ca FILE is missing: with https endpoints, name the authority that signs etcd's certificates",
        )),
        (None, false) if identity.is_none() => Ok(None),
        (_, false) => Err(Failure::usage(
            "--arbiter-ca, --arbiter-cert and --arbiter-key go with https:// endpoints, and these are http://; change \
                the one or leave out the other",
        )),
    }
}

fn login(args: &ArbiterArgs) -> Result<Option<EtcdLogin>, Failure> {
    let pair = both(
        "--arbiter-user",
        args.arbiter_user.as_ref(),
        "--arbiter-password-file",
        args.arbiter_password_file.as_ref(),
    )?;
    Ok(pair.map(|(user, password_file): (String, PathBuf)| EtcdLogin { user, password_file }))
}

/// Two flags that make sense together only.
fn both<A: Clone, B: Clone>(one: &str, a: Option<&A>, other: &str, b: Option<&B>) -> Result<Option<(A, B)>, Failure> {
    match (a, b) {
        (Some(a), Some(b)) => Ok(Some((a.clone(), b.clone()))),
        (None, None) => Ok(None),
        (Some(_), None) => Err(Failure::usage(format!("{one} is given without {other}; give both or none"))),
        (None, Some(_)) => Err(Failure::usage(format!("{other} is given without {one}; give both or none"))),
    }
}

fn on_peer_loss(flag: Option<OnPeerLossFlag>) -> Result<OnPeerLoss, Failure> {
    match flag {
        Some(OnPeerLossFlag::Wait) => Ok(OnPeerLoss::Wait),
        Some(OnPeerLossFlag::Continue) => Ok(OnPeerLoss::Continue),
        None => Err(Failure::usage(
            "--arbiter none needs --on-peer-loss: wait (stop until a person decides) or continue (go on, \
                risking two guests)",
        )),
    }
}

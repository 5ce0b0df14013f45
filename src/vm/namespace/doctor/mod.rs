//! Looks at everything that a VM needs of this host, by trying it.
//!
//! System calls are tried in children that share this process's memory and live for microseconds
//! ([`probe`]), as guests are started. Whatever a container or a security module forbids shows there,
//! however it forbids it. At the end a VM is booted: what only works as a whole shows there.

mod cgroup;
mod host;
mod isolation;
mod probe;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use agentvm_guest::protocol::NetState;
use nix::errno::Errno;

use super::directory::blocking;
use super::ids::IdMap;
use super::trees::clone_tree;
use super::{BootOptions, boot, delete, starter};
use crate::ids::VmKey;
use crate::net::Policy;
use crate::vm::exec::{ExecEnd, ExecOptions, exec};
use crate::vm::{Check, Diagnosis, DynVm, Exit, Limits, Places, VmError};

/// What is lost where something is missing without which there is no VM.
const EVERYTHING: &str = "no VM can run";

/// Examines this host. It never fails: what can't be found out is a finding. Takes as long as a boot,
/// and leaves nothing behind.
pub async fn examine(places: Places) -> Diagnosis {
    let mut checks = vec![host::kernel()];
    let here = places.clone();
    let tried = blocking(move || {
        let outcome = probe::run();
        let mut checks = isolation::checks(&outcome);
        checks.push(isolation::ids());
        checks.push(cgroup::check());
        checks.push(host::data_directory(&here.data_dir));
        checks.extend(host::limits());
        checks.push(host::agent_store(&here.agents));
        Ok(checks)
    });
    match tried.await {
        Ok(found) => checks.extend(found),
        Err(error) => checks.push(Check::missing(
            "probes",
            error.to_string(),
            EVERYTHING,
            "Report this: the checks themselves failed",
        )),
    }
    checks.extend(idmapped_mounts(&places.data_dir).await);
    checks.extend(temporary_vm(&places).await);
    Diagnosis { checks }
}

/// Privileged hosts only: nobody else can make them, nor needs them.
async fn idmapped_mounts(data_dir: &Path) -> Option<Check> {
    const NAME: &str = "idmapped-mounts";
    let ids = IdMap::of_this_process().ok()?; // why not is told by `isolation::ids`
    if !ids.root_mapped() {
        return None;
    }
    let started = starter::start(ids).await.ok()?; // why not is told above
    let pid = started.pid;
    ids.write(pid).ok()?;
    let namespace = fs::File::open(format!("/proc/{pid}/ns/user")).ok()?.into();
    let existing = host::existing(data_dir).to_owned();
    let refused: Vec<(String, Errno)> = [Path::new("/usr"), &existing]
        .into_iter()
        .filter_map(|path| {
            let errno = clone_tree(path, Some(&namespace)).err()?;
            Some((path.display().to_string(), errno))
        })
        .collect();
    Some(match refused.iter().find(|(path, _)| path == "/usr") {
        Some((path, errno)) => Check::missing(
            NAME,
            format!("{path}: {}", errno.desc()),
            EVERYTHING,
            "The host process is root, which needs Linux 5.12 and a file system with idmapped mounts \
             under /usr (ext4, xfs, btrfs; overlayfs since Linux 6.8). Or run it as an ordinary user",
        ),
        None => match refused.first() {
            Some((path, errno)) => Check::degraded(
                NAME,
                format!("/usr works; {path}: {}", errno.desc()),
                "nothing now; host directories on it can't be shared with a VM's users",
                "Keep the data directory on ext4, xfs or btrfs",
            ),
            None => Check::ok(NAME, format!("on /usr and {}", existing.display())),
        },
    })
}

/// Boots one, runs a command, deletes it.
async fn temporary_vm(places: &Places) -> Vec<Check> {
    const NAME: &str = "boot";
    let name = format!("agentvm doctor {}", uuid::Uuid::now_v7());
    let key = match VmKey::new(vec![name.clone()]) {
        Ok(key) => key,
        Err(error) => return vec![failed_boot(error.to_string(), None)],
    };
    let options = BootOptions {
        dir: places.data_dir.join("vms").join(key.id().to_string()),
        key: serde_json::json!([name]).to_string(),
        base_cache: places.data_dir.join("base"),
        agents: places.agents.clone(),
        policy: Arc::new(Policy::default()),
        denials: None,
        limits: Limits::default(),
        mounts: Vec::new(),
        private: Vec::new(),
        image: None,
        secrets: crate::net::secrets::Secrets::default(),
    };
    let began = Instant::now();
    let mut checks = match boot(options.clone()).await {
        Ok(booted) => {
            let took = began.elapsed();
            let net = booted.net;
            let vm: DynVm = booted.vm;
            let ran = exec(&vm, "true", ExecOptions::default()).await;
            vm.shutdown().await;
            drop(booted.lock);
            let booted = match ran {
                Ok(ExecEnd::Exited(output)) if output.exit == Exit::Code(0) => Check::ok(
                    NAME,
                    format!(
                        "a temporary VM booted in {:.1} ms",
                        took.as_secs_f64() * 1e3
                    ),
                ),
                Ok(ExecEnd::Exited(output) | ExecEnd::TimedOut(output)) => failed_boot(
                    format!("/bin/sh -c true ended with {:?} in a VM", output.exit),
                    None,
                ),
                Err(error) => failed_boot(error.to_string(), None),
            };
            vec![network(&net), ipv6(&net), booted]
        }
        Err(VmError::Unsupported {
            feature,
            detail,
            remedy,
        }) => vec![failed_boot(format!("{feature} ({detail})"), Some(remedy))],
        Err(error) => vec![failed_boot(error.to_string(), None)],
    };
    if let Err(error) = delete(&options.dir, &options.key).await {
        checks.push(Check::degraded(
            "clean-up",
            error.to_string(),
            format!("nothing; {} is left", options.dir.display()),
            "Remove that directory",
        ));
    }
    checks
}

fn failed_boot(detail: String, remedy: Option<String>) -> Check {
    let remedy = remedy.unwrap_or_else(|| "Mend what is missing above, or report this".to_owned());
    Check::missing("boot", detail, EVERYTHING, remedy)
}

fn network(net: &NetState) -> Check {
    const NAME: &str = "network";
    match net {
        NetState::Up { .. } => Check::ok(NAME, "nf_tables with NAT, in a VM"),
        NetState::Down { step, errno } => Check::degraded(
            NAME,
            format!(
                "{}: {}",
                String::from_utf8_lossy(step),
                Errno::from_raw(*errno).desc()
            ),
            "VMs have no network: agents reach no model and no registry",
            "A kernel with CONFIG_NF_TABLES and CONFIG_NFT_NAT. Where they are modules that do not load by \
             themselves, as root: modprobe -a nf_tables nft_chain_nat nft_redir nft_ct nft_reject_inet",
        ),
    }
}

fn ipv6(net: &NetState) -> Check {
    const NAME: &str = "ipv6";
    match net {
        NetState::Up { v6: true, .. } => Check::ok(NAME, "in a VM"),
        _ => Check::degraded(
            NAME,
            "a VM's network has no IPv6",
            "VMs reach IPv4 addresses only",
            "A kernel with IPv6 (not booted with ipv6.disable=1) and CONFIG_NF_TABLES_IPV6",
        ),
    }
}

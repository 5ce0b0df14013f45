//! The host's resolvers.

use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};
use std::{fs, io};

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::Record;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::ResolveHosts;
use hickory_resolver::net::{DnsError, NetError};

use super::Question;

/// Where hosts say which resolvers they use (resolv.conf(5)).
const CONFIGURATION: &str = "/etc/resolv.conf";

/// Answers that are remembered for one VM.
const CACHE_SIZE: u64 = 256;

/// Asks the host's resolvers. Made at the first question, again when the host's configuration has
/// changed: a laptop moves between networks under a running VM.
#[derive(Default)]
pub(super) struct Upstream {
    current: Mutex<Option<(Version, TokioResolver)>>,
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstream").finish_non_exhaustive()
    }
}

/// Tells one state of the configuration from another.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Upstream {
    /// The records that answer the question, aliases on the way included; none if the name has none
    /// of this type.
    pub(super) async fn look_up(&self, question: &Question) -> Result<Vec<Record>, ResponseCode> {
        let resolver = self.resolver().map_err(|error| {
            tracing::warn!(%error, file = CONFIGURATION, "VMs can't resolve names");
            ResponseCode::ServFail
        })?;
        let (name, record_type) = (question.name().clone(), question.record_type());
        match resolver.lookup(name, record_type).await {
            Ok(found) => Ok(found.answers().to_vec()),
            Err(NetError::Dns(DnsError::NoRecordsFound(none))) => match none.response_code {
                ResponseCode::NoError => Ok(Vec::new()),
                code => Err(code),
            },
            Err(error) => {
                tracing::debug!(name = %question.name(), %error, "a name could not be looked up");
                Err(ResponseCode::ServFail)
            }
        }
    }

    fn resolver(&self) -> Result<TokioResolver, NetError> {
        let version = version()?;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, resolver)) = &*current
            && *of == version
        {
            return Ok(resolver.clone());
        }
        let mut builder = TokioResolver::builder_tokio()?;
        let options = builder.options_mut();
        // What the host calls its neighbours is its own business.
        options.use_hosts_file = ResolveHosts::Never;
        options.cache_size = CACHE_SIZE;
        let resolver = builder.build()?;
        *current = Some((version, resolver.clone()));
        Ok(resolver)
    }
}

fn version() -> io::Result<Version> {
    let data = fs::metadata(CONFIGURATION)?;
    Ok(Version {
        device: data.dev(),
        inode: data.ino(),
        size: data.len(),
        changed: (data.ctime(), data.ctime_nsec()),
    })
}

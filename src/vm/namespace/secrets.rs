//! What a VM that has secrets is given instead of them: placeholders, and whom to trust.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use agentvm_guest::protocol::Node;

use super::authorities;
use super::directory::{Directory, host, write_atomically};
use crate::net::secrets::{Interceptor, PlaceholderKey, Secrets};
use crate::vm::Result;

/// In the VM's directory on the host, which no VM sees.
const KEY: &str = "placeholders";

/// In the VM, gone with each run of it as the authority is.
const DIRECTORY: &str = "/run/agentvm";

/// All whom the VM trusts.
const ALL: &str = "/run/agentvm/authorities.pem";

/// Those beside the ones that Node and Bun have built in.
const OWN: &str = "/run/agentvm/own-authorities.pem";

/// The file with the authorities of a system: on Debian and Alpine, Fedora, Arch, SUSE.
pub(super) const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ca-certificates/extracted/tls-ca-bundle.pem",
    "/var/lib/ca-certificates/ca-bundle.pem",
];

/// Where programs look, each with what has it look there.
const VARIABLES: [(&str, &str); 6] = [
    // Node, and Bun's programs.
    ("NODE_EXTRA_CA_CERTS", OWN),
    // OpenSSL, Go, Rust, curl(1), uv.
    ("SSL_CERT_FILE", ALL),
    // libcurl that git is linked with.
    ("GIT_SSL_CAINFO", ALL),
    // Python's requests, and pip: both bring authorities.
    ("REQUESTS_CA_BUNDLE", ALL),
    // libcurl that cargo is linked with.
    ("CARGO_HTTP_CAINFO", ALL),
    // Deno brings authorities.
    ("DENO_CERT", OWN),
];

/// Where npm looks that is told of authorities by the host's configuration, and of nobody else by that.
const NPM_VARIABLE: (&str, &str) = ("npm_config_cafile", ALL);

/// What stands between this run of a VM and the hosts of its secrets, if it has any.
pub(super) fn prepare(
    directory: &Directory,
    secrets: &Secrets,
) -> Result<Option<Arc<Interceptor>>> {
    if secrets.is_empty() {
        return Ok(None);
    }
    let path = directory.path().join(KEY);
    let key = key(&path).map_err(|error| host("can't keep", &path, error))?;
    let interceptor = Interceptor::new(secrets, key)
        .map_err(|error| host("can't make certificates for", directory.path(), error))?;
    Ok(Some(Arc::new(interceptor)))
}

/// The key of the VM's placeholders, made with the first.
fn key(path: &Path) -> io::Result<PlaceholderKey> {
    match fs::read(path) {
        Ok(kept) => PlaceholderKey::from_bytes(&kept)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is not what was kept")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = PlaceholderKey::generate()
                .ok_or_else(|| io::Error::other("the system has no randomness to give"))?;
            write_atomically(path, key.as_bytes())?;
            Ok(key)
        }
        Err(error) => Err(error),
    }
}

/// Files with `authority`, and with it those whom the VM trusts anyway: `npm` of them is what the host's npm
/// is told to.
pub(super) fn nodes(authority: &str, npm: Option<&str>) -> [Node; 3] {
    let own = format!("{}{authority}", authorities::local());
    let hosts = BUNDLES.iter().find_map(|path| fs::read(path).ok());
    [
        Node::Dir {
            path: DIRECTORY.to_owned(),
            mode: 0o755,
            owner: agentvm_guest::protocol::Account::Root,
        },
        Node::Authorities {
            path: ALL.to_owned(),
            from: BUNDLES.map(str::to_owned).to_vec(),
            otherwise: hosts.unwrap_or_default(),
            more: [npm.unwrap_or_default(), &own].concat().into_bytes(),
        },
        Node::File {
            path: OWN.to_owned(),
            content: own.into_bytes(),
        },
    ]
}

/// Tells programs of placeholders and authorities, unless the caller has set the variables.
pub(super) fn add(env: &mut Vec<(String, String)>, secrets: &Interceptor, npm: Option<&str>) {
    let npm = npm.map(|_| NPM_VARIABLE);
    let authorities = VARIABLES.into_iter().chain(npm);
    let authorities = authorities.map(|(name, path)| (name.to_owned(), path.to_owned()));
    for (name, value) in secrets.placeholders().into_iter().chain(authorities) {
        if env.iter().all(|(own, _)| *own != name) {
            env.push((name, value));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_key_of_placeholders_is_kept_for_its_owner() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join(KEY);
        let first = key(&path).expect("a key");
        assert_eq!(key(&path).expect("kept").as_bytes(), first.as_bytes());
        let mode = fs::metadata(&path).expect("stat").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(&path, "short").expect("written");
        assert!(key(&path).is_err());
    }
}

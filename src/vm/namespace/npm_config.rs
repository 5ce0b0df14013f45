//! npm's configuration for all users of a VM: our own defaults, and what the host's administrator says of
//! where packages come from.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::LazyLock;
use std::{fs, io};

use super::authorities;
use super::secrets::BUNDLES;

/// Where the npm of a distribution, and one that was built, look for it.
pub(super) const SOURCES: [&str; 3] = ["/etc/npmrc", "/usr/etc/npmrc", "/usr/local/etc/npmrc"];

/// Where `user` installs programs, who can't where npm would. Named by the environment as npm's global
/// configuration: below `~/.npmrc`, and nothing that nvm minds, unlike `npm_config_prefix`.
const OWN: &str = "prefix=${HOME}/.local\n";

/// What a VM may know: no proxy, which is not there for it, and no credentials.
const KEPT: [&str; 5] = ["ca", "ca[]", "cafile", "registry", "strict-ssl"];

pub(super) fn text() -> String {
    let mut text = OWN.to_owned();
    for path in SOURCES {
        let readable = fs::metadata(path).is_ok_and(|data| data.permissions().mode() & 0o004 != 0);
        let hosts = fs::read_to_string(path).ok().filter(|_| readable);
        for line in kept(&hosts.unwrap_or_default()).lines() {
            // Several of them are often one file.
            if text.lines().all(|known| known != line) {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

/// Whom npm is told to trust (PEM), and nobody beside them. `None`: it is told nothing. As it was when this
/// was first asked.
pub(super) fn authorities() -> Option<&'static str> {
    static AUTHORITIES: LazyLock<Option<String>> =
        LazyLock::new(|| trusted(&text(), |path| authorities::readable(Path::new(path))));
    AUTHORITIES.as_deref()
}

fn trusted(config: &str, read: impl Fn(&str) -> io::Result<String>) -> Option<String> {
    let mut trusted = None;
    for line in config.lines() {
        let text = match line.split_once('=') {
            // Whom the VM trusts anyway.
            Some(("cafile", path)) if BUNDLES.contains(&path) => String::new(),
            Some(("cafile", path)) => read(path).unwrap_or_default(),
            Some(("ca" | "ca[]", text)) => text.replace("\\n", "\n"),
            _ => continue,
        };
        let trusted = trusted.get_or_insert_with(String::new);
        for certificate in authorities::blocks(&text) {
            trusted.push_str(certificate);
            trusted.push('\n');
        }
    }
    trusted
}

fn kept(hosts: &str) -> String {
    let mut kept = String::new();
    for line in hosts.lines() {
        let Some((key, value)) = line.split_once('=') else {
            continue;
        };
        let (key, value) = (key.trim(), value.trim());
        let known = KEPT.contains(&key) || (key.starts_with('@') && key.ends_with(":registry"));
        // An address may name a user with a password.
        if known && !(key.ends_with("registry") && value.contains('@')) {
            // Writing to a String can't fail.
            let _ = writeln!(kept, "{key}={value}");
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::{kept, trusted};

    #[test]
    fn whom_npm_is_told_to_trust_is_found() {
        let certificate = |name: &str| {
            format!("-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n")
        };
        let inline = certificate("A").replace('\n', "\\n");
        let config = format!("prefix=x\ncafile=/house.pem\nca[]=\"{inline}\"\n");
        let read = |path: &str| Ok(format!("# {path}\n{}", certificate("B")));
        let expected = certificate("B") + &certificate("A");
        assert_eq!(trusted(&config, read), Some(expected));
        let usual = format!("cafile={}\n", super::BUNDLES[0]);
        assert_eq!(trusted(&usual, read), Some(String::new()));
        assert_eq!(trusted("registry=https://npm.house/\n", read), None);
    }

    #[test]
    fn where_packages_come_from_is_kept_and_no_secret() {
        let hosts = "; of the house\nregistry = https://npm.house/\n@house:registry=https://x/\n\
            cafile=/etc/ssl/house.pem\nprefix=/opt/npm\nproxy=http://me:pass@proxy\n\
            //npm.house/:_authToken=secret\n@other:registry=https://me:pass@other/\n";
        assert_eq!(
            kept(hosts),
            "registry=https://npm.house/\n@house:registry=https://x/\ncafile=/etc/ssl/house.pem\n"
        );
    }
}

//! Certificate authorities that the host's administrator has added to those of its distribution: of a
//! proxy that looks into TLS, or of servers in the house.
//!
//! Programs of the base find them in `/etc/ssl/certs`. Node has authorities of its own, and is told of a
//! file with the others.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::{fs, io};

/// Where they are put on Debian, Fedora and Arch.
pub(super) const SOURCES: [&str; 3] = [
    "/usr/local/share/ca-certificates",
    "/etc/pki/ca-trust/source/anchors",
    "/etc/ca-certificates/trust-source/anchors",
];

/// Where the VM has them, relative to `/etc`.
pub(super) const BUNDLE: &str = "agentvm/local-authorities.pem";

const VARIABLE: &str = "NODE_EXTRA_CA_CERTS";

/// A certificate has a few kilobytes. What is more is no list of authorities.
const MAX_FILE: u64 = 1 << 20;

/// Those of this host, as it was when it was first asked: Node complains of a file that is not there.
static LOCAL: LazyLock<String> = LazyLock::new(|| bundle(&SOURCES.map(Path::new)));

/// All in one text (PEM); empty if there are none.
pub(super) fn local() -> &'static str {
    &LOCAL
}

/// Tells Node in a VM of them, unless the caller has.
pub(super) fn add(env: &mut Vec<(String, String)>) {
    if !local().is_empty() && env.iter().all(|(name, _)| name != VARIABLE) {
        env.push((VARIABLE.to_owned(), format!("/etc/{BUNDLE}")));
    }
}

fn bundle(sources: &[&Path]) -> String {
    let mut paths: Vec<PathBuf> = sources.iter().flat_map(|path| certificates(path)).collect();
    paths.sort();
    let mut bundle = String::new();
    for path in paths {
        // What is not text is in the other format (DER).
        let text = readable(&path).ok();
        for certificate in text.iter().flat_map(|text| blocks(text)) {
            bundle.push_str(certificate);
            bundle.push('\n');
        }
    }
    bundle
}

/// The text of a file, but of what nobody else may read, which is not for a VM.
pub(super) fn readable(path: &Path) -> io::Result<String> {
    let data = fs::metadata(path)?;
    if !data.is_file() || data.len() > MAX_FILE || data.permissions().mode() & 0o004 == 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    fs::read_to_string(path)
}

/// Files that look like certificates, in a directory and those in it.
fn certificates(directory: &Path) -> Vec<PathBuf> {
    let below = |directory: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).into_iter().flatten();
        entries.flatten().map(|entry| entry.path()).collect()
    };
    let (directories, mut files): (Vec<_>, Vec<_>) =
        below(directory).into_iter().partition(|path| path.is_dir());
    files.extend(directories.iter().flat_map(|path| below(path)));
    files.retain(|path| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        matches!(extension, Some("crt" | "pem" | "cer"))
    });
    files
}

/// The certificates in a text, and no key that somebody has put beside them.
pub(super) fn blocks(text: &str) -> impl Iterator<Item = &str> {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    const END: &str = "-----END CERTIFICATE-----";
    text.match_indices(BEGIN).filter_map(|(start, _)| {
        let end = text[start..].find(END)?;
        Some(&text[start..start + end + END.len()])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_gathered_and_nothing_else() {
        let source = tempfile::tempdir().expect("a directory");
        let certificate = |name: &str| {
            format!("-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n")
        };
        let put = |path: &str, text: &str, mode| {
            let path = source.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
            fs::write(&path, text).expect("write");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
        };
        put("b.crt", &certificate("B"), 0o644);
        put(
            "house/a.pem",
            &format!("# A\n{}key\n", certificate("A")),
            0o644,
        );
        put("secret.crt", &certificate("SECRET"), 0o600);
        put("README", &certificate("README"), 0o644);
        assert_eq!(
            bundle(&[source.path(), Path::new("/nowhere")]),
            certificate("B") + &certificate("A")
        );
    }
}

//! The base of a VM: the host's programs and libraries, with an `/etc` of its own.
//!
//! `/etc` is made once per state of the host from one table ([`COPIED`] and [`written`]) and shared
//! read-only by all VMs, below their writable layers.

use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::bases::{Lease, PARTIAL};
use super::directory::{host, make_parent_of_many};
use super::ids::IdMap;
use super::{authorities, npm_config, packages};
use crate::vm::{INSTRUCTIONS, VmError};

/// Raise when the table changes: VMs then get a new `/etc`.
const TABLE_VERSION: u32 = 5;

/// Namespace of the version-5 UUIDs that name a base.
const BASE_NAMESPACE: Uuid = Uuid::from_u128(0x5a77_9c0e_21d4_4c7b_8f0e_6b1f_4e0d_9a21);

/// What a VM sees of the host's file system, where it exists there: symlinks stay symlinks.
pub(super) const HOST_DIRS: [&str; 7] = [
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32",
];

/// Parts of the host's `/etc` that programs of the base need and that hold no secrets. Only what
/// everyone may read is taken.
const COPIED: &[&str] = &[
    // Dynamic linking, alternatives, time and language.
    "alternatives",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "locale.conf",
    "localtime",
    "timezone",
    // Certificates, as Debian, Fedora, Arch, Alpine and SUSE keep them.
    "ca-certificates",
    "ca-certificates.conf",
    "crypto-policies",
    "pki/ca-trust",
    "pki/tls/certs",
    "pki/tls/cert.pem",
    "pki/tls/openssl.cnf",
    "ssl/cert.pem",
    "ssl/certs",
    "ssl/openssl.cnf",
    // Names and numbers.
    "gai.conf",
    "mime.types",
    "networks",
    "protocols",
    "rpc",
    "services",
    // Shells and terminals. Not `profile.d`, where people keep tokens.
    "bash.bashrc",
    "inputrc",
    "shells",
    "skel",
    "terminfo",
    // Changing users, and making them. Secrets there (`opasswd`) are for their owner only.
    "adduser.conf",
    "deluser.conf",
    "login.defs",
    "pam.conf",
    "pam.d",
    "security",
    // Installing packages; `packages` has the rest.
    "debconf.conf",
    "dpkg/dpkg.cfg",
    "ucf.conf",
    // Which system this is.
    "alpine-release",
    "arch-release",
    "debian_version",
    "fedora-release",
    "lsb-release",
    "os-release",
    "redhat-release",
    "system-release",
    // Language runtimes and tools that refuse to start without.
    "fonts",
    "java-11-openjdk",
    "java-17-openjdk",
    "java-21-openjdk",
    "java-25-openjdk",
    "ImageMagick-6",
    "ImageMagick-7",
    "magic",
    "magic.mime",
    "manpath.config",
    "maven/logging",
    "maven/m2.conf",
    "perl",
    "python3",
    "python3.11",
    "python3.12",
    "python3.13",
    "vim",
];

/// Where the VM's `/etc` lies, relative to `/usr`.
pub(super) const ETC: &str = "lib/agentvm/etc";

/// Directories that packages beside the distribution's own use, and new accounts. Like `/usr`, and in its
/// layer: relative to `/usr`, there, with what lies on top of them in a VM.
pub(super) const BESIDE_USR: [(&str, &str, &[&str]); 3] = [
    ("/home", "lib/agentvm/home", &["user"]),
    (
        "/opt",
        "lib/agentvm/opt",
        &["agentvm/agents", "agentvm/dpkg"],
    ),
    ("/srv", "lib/agentvm/srv", &[]),
];

/// A base, ready to be mounted.
#[derive(Debug, Clone)]
pub(super) struct Base {
    /// Names the state of the host that the base shows.
    pub(super) fingerprint: String,
    /// What is added to the host's `/usr`: the VM's `/etc`, at [`ETC`].
    pub(super) usr: PathBuf,
    /// To be held as long as a VM lies on it.
    pub(super) lease: Lease,
}

/// Finds or makes the base of this host in `cache`.
pub(super) fn base(cache: &Path, ids: IdMap) -> Result<Base, VmError> {
    let fingerprint = fingerprint();
    let usr = cache.join(&fingerprint);
    let failed = |error| host("can't make the base in", cache, error);
    make_parent_of_many(cache).map_err(failed)?;
    loop {
        if let Some(lease) = Lease::take(&usr).map_err(failed)? {
            return Ok(Base {
                fingerprint,
                usr,
                lease,
            });
        }
        make(cache, &usr, ids).map_err(failed)?;
    }
}

/// Changes whenever the host installs, removes or upgrades something.
pub(super) fn fingerprint() -> String {
    let mut state = format!("table {TABLE_VERSION}\n");
    let watched = [
        "/usr",
        "/usr/bin",
        "/usr/lib",
        "/etc/alternatives",
        "/etc/ld.so.cache",
        "/etc/localtime",
        "/etc/os-release",
        "/etc/ssl/certs",
        "/etc/ssl/certs/ca-certificates.crt",
        "/var/lib/dpkg/status",
        "/var/lib/rpm",
        "/lib/apk/db/installed",
        "/var/lib/pacman/local",
    ];
    let watched = watched.into_iter();
    let watched = watched.chain(authorities::SOURCES);
    for path in watched.chain(npm_config::SOURCES) {
        if let Ok(data) = fs::metadata(path) {
            let (mtime, nanos) = (data.mtime(), data.mtime_nsec());
            // Writing to a String can't fail.
            let _ = writeln!(
                state,
                "{path} {} {} {mtime}.{nanos}",
                data.ino(),
                data.len()
            );
        }
    }
    Uuid::new_v5(&BASE_NAMESPACE, state.as_bytes()).to_string()
}

/// Makes it beside its final place: a half-made base is never seen, and two processes that make the
/// same one at once both end with a whole one.
fn make(cache: &Path, usr: &Path, ids: IdMap) -> io::Result<()> {
    let partial = cache.join(format!("{PARTIAL}{}", Uuid::now_v7()));
    let made = make_at(&partial, usr, ids);
    if made.is_err() {
        // Nobody else will: no one knows its name.
        drop(fs::remove_dir_all(&partial));
    }
    made
}

fn make_at(partial: &Path, usr: &Path, ids: IdMap) -> io::Result<()> {
    let etc = partial.join(ETC);
    fs::create_dir_all(&etc)?;
    for name in COPIED {
        copy(&Path::new("/etc").join(name), &etc.join(name))?;
    }
    let own = etc.join("agentvm");
    fs::create_dir_all(&own)?;
    fs::set_permissions(&own, Permissions::from_mode(0o755))?;
    for (name, content) in written() {
        let path = etc.join(name);
        fs::write(&path, content)?;
        let mode = if name == "shadow" { 0o600 } else { 0o644 };
        fs::set_permissions(&path, Permissions::from_mode(mode))?;
    }
    symlink("/proc/self/mounts", etc.join("mtab"))?;
    for (_, path, holds) in BESIDE_USR {
        let path = partial.join(path);
        fs::create_dir_all(&path)?;
        for below in holds {
            fs::create_dir_all(path.join(below))?;
        }
    }
    if ids.root_mapped() {
        packages::add(Path::new("/"), partial, &etc)?;
    }
    open_directories(partial)?;
    match fs::rename(partial, usr) {
        Err(_) if usr.exists() => fs::remove_dir_all(partial),
        result => result,
    }
}

/// Everyone may enter them, whatever the umask of this process. Few of them hold anything that is not a
/// file.
fn open_directories(directory: &Path) -> io::Result<()> {
    fs::set_permissions(directory, Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_directories(&entry.path())?;
        }
    }
    Ok(())
}

/// Copies what everyone may read; what is not there, or not readable, is not copied.
pub(super) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    const READABLE: u32 = 0o004;
    let Ok(data) = fs::symlink_metadata(from) else {
        return Ok(());
    };
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    if data.is_symlink() {
        return symlink(fs::read_link(from)?, to);
    }
    if data.mode() & READABLE == 0 {
        return Ok(());
    }
    if data.is_dir() {
        fs::create_dir(to)?;
        fs::set_permissions(to, Permissions::from_mode(0o755))?;
        for entry in fs::read_dir(from)? {
            let name = entry?.file_name();
            copy(&from.join(&name), &to.join(&name))?;
        }
    } else if data.is_file() {
        fs::copy(from, to)?;
        fs::set_permissions(to, Permissions::from_mode(data.mode() & 0o755 | 0o644))?;
    }
    Ok(())
}

/// Files of `/etc` that are the VM's, not the host's. Ids of system users are Debian's fixed ones
/// (base-passwd), so that packages find the accounts that they expect.
fn written() -> [(&'static str, String); 16] {
    const SYSTEM: [(&str, u32, u32, &str, &str); 18] = [
        ("root", 0, 0, "/root", "/bin/bash"),
        ("daemon", 1, 1, "/usr/sbin", "/usr/sbin/nologin"),
        ("bin", 2, 2, "/bin", "/usr/sbin/nologin"),
        ("sys", 3, 3, "/dev", "/usr/sbin/nologin"),
        ("sync", 4, 65534, "/bin", "/bin/sync"),
        ("games", 5, 60, "/usr/games", "/usr/sbin/nologin"),
        ("man", 6, 12, "/var/cache/man", "/usr/sbin/nologin"),
        ("lp", 7, 7, "/var/spool/lpd", "/usr/sbin/nologin"),
        ("mail", 8, 8, "/var/mail", "/usr/sbin/nologin"),
        ("news", 9, 9, "/var/spool/news", "/usr/sbin/nologin"),
        ("uucp", 10, 10, "/var/spool/uucp", "/usr/sbin/nologin"),
        ("proxy", 13, 13, "/bin", "/usr/sbin/nologin"),
        ("www-data", 33, 33, "/var/www", "/usr/sbin/nologin"),
        ("backup", 34, 34, "/var/backups", "/usr/sbin/nologin"),
        ("_apt", 42, 65534, "/nonexistent", "/usr/sbin/nologin"),
        ("irc", 39, 39, "/run/ircd", "/usr/sbin/nologin"),
        ("user", 1000, 1000, "/home/user", "/bin/bash"),
        ("nobody", 65534, 65534, "/nonexistent", "/usr/sbin/nologin"),
    ];
    const GROUPS: [(&str, u32); 37] = [
        ("root", 0),
        ("daemon", 1),
        ("bin", 2),
        ("sys", 3),
        ("adm", 4),
        ("tty", 5),
        ("disk", 6),
        ("lp", 7),
        ("mail", 8),
        ("news", 9),
        ("uucp", 10),
        ("man", 12),
        ("proxy", 13),
        ("kmem", 15),
        ("dialout", 20),
        ("fax", 21),
        ("voice", 22),
        ("cdrom", 24),
        ("floppy", 25),
        ("tape", 26),
        ("sudo", 27),
        ("audio", 29),
        ("dip", 30),
        ("www-data", 33),
        ("backup", 34),
        ("operator", 37),
        ("irc", 39),
        ("src", 40),
        ("shadow", 42),
        ("utmp", 43),
        ("video", 44),
        ("sasl", 45),
        ("plugdev", 46),
        ("staff", 50),
        ("games", 60),
        ("user", 1000),
        ("nogroup", 65534),
    ];
    let mut passwd = String::new();
    for (name, uid, gid, home, shell) in SYSTEM {
        // Writing to a String can't fail.
        let _ = writeln!(passwd, "{name}:x:{uid}:{gid}:{name}:{home}:{shell}");
    }
    // Nobody has a password. Programs that make accounts look for the file.
    let mut shadow = String::new();
    for (name, ..) in SYSTEM {
        let _ = writeln!(shadow, "{name}:*:19000:0:99999:7:::");
    }
    let mut group = String::new();
    for (name, gid) in GROUPS {
        let _ = writeln!(group, "{name}:x:{gid}:");
    }
    [
        ("passwd", passwd),
        ("group", group),
        ("shadow", shadow),
        ("environment", String::new()),
        ("profile", PROFILE.to_owned()),
        ("hostname", format!("{HOSTNAME}\n")),
        (
            "hosts",
            format!("127.0.0.1 localhost {HOSTNAME}\n::1 localhost ip6-localhost ip6-loopback\n"),
        ),
        ("resolv.conf", "nameserver 127.0.0.53\n".to_owned()),
        (
            "nsswitch.conf",
            "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nnetworks: files\n\
             protocols: files\nservices: files\nrpc: files\n"
                .to_owned(),
        ),
        ("host.conf", "multi on\n".to_owned()),
        ("machine-id", String::new()),
        ("agentvm/instructions.md", INSTRUCTIONS.to_owned()),
        ("agentvm/npmrc", npm_config::text()),
        (authorities::BUNDLE, authorities::local().to_owned()),
        ("gitconfig", GITCONFIG.to_owned()),
        ("pip.conf", PIP_CONF.to_owned()),
    ]
}

/// Those that a VM needs also where `/etc` is an image's own: its name, how names are found, and what it
/// can do.
pub(super) fn files_for_an_image() -> impl Iterator<Item = (&'static str, String)> {
    const FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];
    written()
        .into_iter()
        .filter(|(name, _)| FILES.contains(name) || name.starts_with("agentvm/"))
}

/// Files of accounts in `/etc`, with those that every VM has.
pub(super) fn accounts() -> [(&'static str, Vec<String>); 2] {
    let lines = |lines: [&str; 2]| lines.map(str::to_owned).to_vec();
    [
        (
            "passwd",
            lines([
                "root:x:0:0:root:/root:/bin/sh",
                "user:x:1000:1000:user:/home/user:/bin/sh",
            ]),
        ),
        ("group", lines(["root:x:0:", "user:x:1000:"])),
    ]
}

/// A distribution's own sets `PATH` anew, which the agents that run each command in a login shell would
/// lose `~/.local/bin` and the store's Node by.
const PROFILE: &str = r#"# The PATH that a program was started with stays.
export PATH="${PATH:-/usr/local/bin:/usr/bin:/bin}"
if [ -n "${BASH-}" ] && [ -n "${PS1-}" ] && [ "$BASH" != /bin/sh ] && [ -r /etc/bash.bashrc ]; then
  . /etc/bash.bashrc
fi
for script in /etc/profile.d/*.sh; do
  if [ -r "$script" ]; then . "$script"; fi
done
unset script
# What the first lines of Debian's ~/.profile do, for who has none, or one that an installer began.
bashrc_is_due() {
  [ -n "${BASH-}" ] && [ "$BASH" != /bin/sh ] && [ -z "${bashrc_read-}" ] && [ -r ~/.bashrc ] &&
    [ ! -e ~/.bash_profile ] && [ ! -e ~/.bash_login ] || return
  [ -f ~/.profile ] && [ -r ~/.profile ] || return 0
  local line
  while read -r line || [ -n "$line" ]; do
    case $line in *bashrc*) return 1 ;; esac
  done <~/.profile
}
if bashrc_is_due; then
  # It may read this file.
  bashrc_read=1
  . ~/.bashrc
  unset bashrc_read
fi
unset -f bashrc_is_due
"#;

/// Who is in a VM may read what is in it: a repository that root cloned, or that is mounted, is no trap
/// that another user has laid. No name and no address: git asks for them, where made-up ones would end
/// in a history unnoticed.
const GITCONFIG: &str = "[safe]
	directory = *
";

/// PEP 668 protects a machine whose Python its administrator needs. This machine is the agent's.
const PIP_CONF: &str = "[global]
break-system-packages = true
";

/// The name of every VM's machine: nothing of the host, nothing to tell VMs apart by.
pub(super) const HOSTNAME: &str = "agentvm";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_made_once_and_holds_no_account_of_the_host() {
        let data = tempfile::tempdir().expect("a directory");
        let cache = data.path().join("base");
        let first = base(&cache, IdMap::of_this_process().expect("ids")).expect("a base");
        let second = base(&cache, IdMap::of_this_process().expect("ids")).expect("a base");
        assert_eq!(first.usr, second.usr);
        let passwd = fs::read_to_string(first.usr.join(ETC).join("passwd")).expect("passwd");
        assert!(passwd.contains("\nuser:x:1000:1000:"));
        let shadow = fs::read_to_string(first.usr.join(ETC).join("shadow")).expect("shadow");
        assert!(
            shadow
                .lines()
                .all(|line| line.split(':').nth(1) == Some("*"))
        );
        assert_eq!(fs::read_dir(&cache).expect("cache").count(), 1);
    }

    #[test]
    fn what_only_its_owner_may_read_is_not_copied() {
        let directory = tempfile::tempdir().expect("a directory");
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        fs::create_dir(&from).expect("mkdir");
        fs::set_permissions(&from, Permissions::from_mode(0o755)).expect("chmod");
        for (name, mode) in [("open", 0o644), ("secret", 0o600)] {
            fs::write(from.join(name), name).expect("write");
            fs::set_permissions(from.join(name), Permissions::from_mode(mode)).expect("chmod");
        }
        copy(&from, &to).expect("copy");
        assert!(to.join("open").exists());
        assert!(!to.join("secret").exists());
    }
}

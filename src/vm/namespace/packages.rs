//! Package management in a VM: what dpkg and apt know of the base.
//!
//! dpkg's database says what is in `/usr`, so it lies in the layer of `/usr`, and is lost or kept with
//! it; `/var/lib/dpkg` is a symlink to where the VM shows it. The base holds a snapshot of the host's,
//! made of hard links where it can be: it has thousands of files, and dpkg replaces them by renames.
//! Where a VM can't write to `/usr`, it sees the host's own, read-only.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};

use super::base::copy;
use super::ids::IdMap;

/// dpkg's database on the host, and in a VM the symlink to [`SHOWN`].
pub(super) const DATABASE: &str = "/var/lib/dpkg";

/// Where a VM shows the database, whatever it lies on.
pub(super) const SHOWN: &str = "/opt/agentvm/dpkg";

/// Where the database of a writable base lies, relative to `/usr`.
pub(super) const IN_USR: &str = "lib/agentvm/dpkg";

/// What tells maintainer scripts not to start services: there is no init to start them.
const POLICY: (&str, &str) = (
    "sbin/policy-rc.d",
    "#!/bin/sh\n# No service is started here: an agentvm VM has no init (invoke-rc.d(8)).\nexit 101\n",
);

/// Directories in `/var` that packages of the base bring: one of a VM, which starts empty, gets them
/// when dpkg first changes something.
const VAR_DIRECTORIES: &str = "agentvm/var-directories";

const DPKG_CONFIG: (&str, &str) = (
    "dpkg/dpkg.cfg.d/agentvm",
    "# The directories of /var that packages of the base expect.\n\
     pre-invoke=xargs -r -d '\\n' -a /etc/agentvm/var-directories mkdir -p\n",
);

/// Where to get packages and whom to trust, as the host has it. Not its proxies (`apt.conf`), which
/// are not there for a VM, and not its passwords (`auth.conf`).
const APT: [&str; 6] = [
    "apt/keyrings",
    "apt/preferences",
    "apt/preferences.d",
    "apt/trusted.gpg",
    "apt/trusted.gpg.d",
    "dpkg/origins",
];

/// Puts package management into a base that VMs can write to, if the host has dpkg.
pub(super) fn add(host: &Path, usr: &Path, etc: &Path) -> io::Result<()> {
    let database = host.join(DATABASE.trim_start_matches('/'));
    if !database.join("status").exists() {
        return Ok(());
    }
    let snapshot = usr.join(IN_USR);
    link(&database, &snapshot)?;
    // dpkg does nothing at all if it holds a name that is not in /etc/passwd or /etc/group.
    let overrides = snapshot.join("statoverride");
    if overrides.exists() {
        let kept = known_overrides(&fs::read_to_string(&overrides)?, etc)?;
        // Not in place: it is the host's.
        fs::remove_file(&overrides)?;
        write(&overrides, &kept, 0o644)?;
    }
    let mut directories = String::new();
    for path in var_directories(host, &database)? {
        directories.push_str(&path);
        directories.push('\n');
    }
    write(&etc.join(VAR_DIRECTORIES), &directories, 0o644)?;
    write(&etc.join(DPKG_CONFIG.0), DPKG_CONFIG.1, 0o644)?;
    write(&usr.join(POLICY.0), POLICY.1, 0o755)?;

    let host_etc = host.join("etc");
    for name in APT {
        copy(&host_etc.join(name), &etc.join(name))?;
    }
    // apt complains of each of these that is missing.
    for name in [
        "apt/apt.conf.d",
        "apt/preferences.d",
        "apt/sources.list.d",
        "apt/trusted.gpg.d",
    ] {
        fs::create_dir_all(etc.join(name))?;
    }
    copy_sources(&host_etc, etc)
}

/// Leads `/var/lib/dpkg` of the VM in `directory` to its database, if the host has one and the VM has
/// nothing else there. No link of the VM is followed.
pub(super) fn lead_to_database(directory: &Path, ids: IdMap) -> io::Result<()> {
    if Path::new(DATABASE).is_dir() {
        lead(directory, ids)
    } else {
        Ok(())
    }
}

fn lead(directory: &Path, ids: IdMap) -> io::Result<()> {
    const NAME: &str = "dpkg";
    let vm = File::open(directory)?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let made = openat2(&vm, "var/lib", how).and_then(|lib| {
        symlinkat(SHOWN, &lib, NAME)?;
        let (uid, gid) = ids.root_on_host().unzip();
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        fchownat(&lib, NAME, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)
    });
    match made {
        // Whoever is root there may have made it into something else.
        Ok(()) | Err(Errno::EEXIST | Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// A snapshot of what everyone may read: not of dpkg's locks, which are not for a VM to hold.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    const READABLE: u32 = 0o004;
    fs::create_dir_all(to)?;
    fs::set_permissions(to, Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (kind, target) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_dir() {
            link(&entry.path(), &target)?;
        } else if kind.is_file() && entry.metadata()?.permissions().mode() & READABLE != 0 {
            // Another file system, or too many links already.
            if fs::hard_link(entry.path(), &target).is_err() {
                fs::copy(entry.path(), &target)?;
            }
        }
    }
    Ok(())
}

/// Lines of dpkg's `statoverride`, `<user> <group> <mode> <path>`, whose names the VM has.
fn known_overrides(overrides: &str, etc: &Path) -> io::Result<String> {
    let names = |file: &str| -> io::Result<BTreeSet<String>> {
        let text = fs::read_to_string(etc.join(file))?;
        let first = |line: &str| line.split(':').next().map(str::to_owned);
        Ok(text.lines().filter_map(first).collect())
    };
    let (users, groups) = (names("passwd")?, names("group")?);
    let known =
        |name: &str, names: &BTreeSet<String>| name.starts_with('#') || names.contains(name);
    let kept = overrides.lines().filter(|line| {
        let mut fields = line.split(' ');
        let user = fields.next().is_some_and(|user| known(user, &users));
        user && fields.next().is_some_and(|group| known(group, &groups))
    });
    Ok(kept.flat_map(|line| [line, "\n"]).collect())
}

/// The directories in `/var` that installed packages list.
fn var_directories(host: &Path, database: &Path) -> io::Result<BTreeSet<String>> {
    let mut directories = BTreeSet::new();
    for entry in fs::read_dir(database.join("info"))? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "list") {
            continue;
        }
        // Paths of packages need not be UTF-8.
        let list = fs::read(&path)?;
        for line in list.split(|byte| *byte == b'\n') {
            let Some(path) = std::str::from_utf8(line).ok() else {
                continue;
            };
            // A list does not say what is a directory; the host does.
            let on_host = || fs::symlink_metadata(host.join(path.trim_start_matches('/')));
            if path.starts_with("/var/")
                && !directories.contains(path)
                && on_host().is_ok_and(|data| data.is_dir())
            {
                directories.insert(path.to_owned());
            }
        }
    }
    Ok(directories)
}

/// The host's `sources.list` and `sources.list.d`, but for files with a password in them.
fn copy_sources(host_etc: &Path, etc: &Path) -> io::Result<()> {
    let mut names = vec!["apt/sources.list".to_owned()];
    match fs::read_dir(host_etc.join("apt/sources.list.d")) {
        Ok(entries) => {
            for entry in entries {
                if let Ok(name) = entry?.file_name().into_string() {
                    names.push(format!("apt/sources.list.d/{name}"));
                }
            }
        }
        Err(error) if is_not_ours(&error) => {}
        Err(error) => return Err(error),
    }
    for name in names {
        let path = host_etc.join(&name);
        let text = match fs::read_to_string(&path) {
            Err(error) if is_not_ours(&error) => continue,
            text => text?,
        };
        if has_password(&text) {
            tracing::warn!(path = %path.display(), "not for VMs: it holds a password");
        } else {
            copy(&path, &etc.join(&name))?;
        }
    }
    Ok(())
}

/// Not there, not to be read, or not text: nothing that apt could use. Any other error is none of the
/// file's, and must not make a base without it that later VMs find.
fn is_not_ours(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, IsADirectory, NotADirectory, NotFound, PermissionDenied};
    matches!(
        error.kind(),
        InvalidData | IsADirectory | NotADirectory | NotFound | PermissionDenied
    )
}

/// Whether one of its addresses names a user: `https://user:password@host/`.
fn has_password(sources: &str) -> bool {
    sources.split_whitespace().any(|word| {
        word.split_once("://")
            .and_then(|(_, rest)| rest.split('/').next())
            .is_some_and(|authority| authority.contains('@'))
    })
}

fn write(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, content)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with one package, and the `/usr` and `/etc` of a base on it.
    fn host() -> (tempfile::TempDir, tempfile::TempDir) {
        let (host, base) = (tempfile::tempdir(), tempfile::tempdir());
        let (host, base) = (host.expect("host"), base.expect("base"));
        let put = |path: &str, text: &str, mode| {
            write(&host.path().join(path), text, mode).expect("a file of the host");
        };
        put("var/lib/dpkg/status", "Package: one\n", 0o644);
        put("var/lib/dpkg/lock", "", 0o640);
        put(
            "var/lib/dpkg/statoverride",
            "root acme 710 /a\nroot root 755 /b\nroot #7 755 /c\n",
            0o644,
        );
        put(
            "var/lib/dpkg/info/one.list",
            "/.\n/var\n/var/one\n/var/one/file\n",
            0o644,
        );
        put("var/one/file", "", 0o644);
        put(
            "etc/apt/sources.list.d/open.list",
            "deb https://deb.debian.org/ a b\n",
            0o644,
        );
        put(
            "etc/apt/sources.list.d/secret.list",
            "deb https://me:pass@private/ a b\n",
            0o644,
        );
        put(
            "etc/apt/auth.conf",
            "machine private login me password pass\n",
            0o644,
        );
        put(
            "etc/apt/apt.conf.d/proxy",
            "Acquire::http::Proxy \"http://me:pass@proxy\";\n",
            0o644,
        );
        let etc = base.path().join("etc");
        write(&etc.join("passwd"), "root:x:0:0::/root:/bin/sh\n", 0o644).expect("passwd");
        write(&etc.join("group"), "root:x:0:\n", 0o644).expect("group");
        add(host.path(), base.path(), &etc).expect("package management");
        (host, base)
    }

    #[test]
    fn the_database_is_a_snapshot_without_locks() {
        let (host, base) = host();
        let (theirs, ours) = (host.path().join("var/lib/dpkg"), base.path().join(IN_USR));
        // As dpkg does it.
        fs::write(theirs.join("status-new"), "Package: two\n").expect("write");
        fs::rename(theirs.join("status-new"), theirs.join("status")).expect("rename");
        let status = fs::read_to_string(ours.join("status")).expect("status");
        assert_eq!(status, "Package: one\n");
        assert!(!ours.join("lock").exists());
    }

    #[test]
    fn overrides_for_accounts_that_a_vm_lacks_are_left_out_of_the_snapshot_alone() {
        let (host, base) = host();
        let read = |path: &Path| fs::read_to_string(path).expect("statoverride");
        let ours = read(&base.path().join(IN_USR).join("statoverride"));
        assert_eq!(ours, "root root 755 /b\nroot #7 755 /c\n");
        let theirs = read(&host.path().join("var/lib/dpkg/statoverride"));
        assert!(theirs.starts_with("root acme"));
    }

    #[test]
    fn directories_of_packages_in_var_are_told_from_files() {
        let (_host, base) = host();
        let told = fs::read_to_string(base.path().join("etc").join(VAR_DIRECTORIES));
        assert_eq!(told.expect("directories"), "/var/one\n");
    }

    #[test]
    fn a_vm_is_led_to_its_database_unless_it_has_another() {
        let vm = tempfile::tempdir().expect("a VM");
        let database = vm.path().join("var/lib/dpkg");
        fs::create_dir_all(vm.path().join("var/lib")).expect("mkdir");
        for _ in 0..2 {
            lead(vm.path(), IdMap::of_this_process().expect("ids")).expect("a link");
            assert_eq!(fs::read_link(&database).expect("a link"), Path::new(SHOWN));
        }
        fs::remove_file(&database).expect("rm");
        fs::create_dir(&database).expect("mkdir");
        lead(vm.path(), IdMap::of_this_process().expect("ids")).expect("left alone");
        assert!(fs::symlink_metadata(&database).expect("stat").is_dir());
    }

    #[test]
    fn no_link_that_a_vm_has_made_is_followed() {
        let (vm, outside) = (tempfile::tempdir(), tempfile::tempdir());
        let (vm, outside) = (vm.expect("a VM"), outside.expect("a directory"));
        fs::create_dir(vm.path().join("var")).expect("mkdir");
        std::os::unix::fs::symlink(outside.path(), vm.path().join("var/lib")).expect("symlink");
        lead(vm.path(), IdMap::of_this_process().expect("ids")).expect("left alone");
        assert_eq!(fs::read_dir(outside.path()).expect("ls").count(), 0);
    }

    #[test]
    fn no_password_of_apt_is_copied() {
        let (_host, base) = host();
        let apt = base.path().join("etc/apt");
        assert!(apt.join("sources.list.d/open.list").exists());
        assert!(!apt.join("sources.list.d/secret.list").exists());
        assert!(!apt.join("auth.conf").exists());
        assert_eq!(
            fs::read_dir(apt.join("apt.conf.d"))
                .expect("apt.conf.d")
                .count(),
            0
        );
    }
}

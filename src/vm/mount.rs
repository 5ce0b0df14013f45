//! Directories and files of the host that a VM is shown because its owner asks for it.

use std::path::{Path, PathBuf};

/// As many as one boot message has room for, beside the VM's own.
pub const MAX_MOUNTS: usize = 32;

/// Where nothing of the host may be mounted, neither there nor below: what the VM is made of.
const RESERVED: [&str; 17] = [
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/opt/agentvm",
    "/proc",
    "/sbin",
    "/sys",
    "/usr",
    "/var/cache/agentvm",
    "/var/lib/agentvm",
    "/var/lib/dpkg",
    "/var/lib/apt",
];

/// Where nothing may be mounted because something of the VM lies below; below these it may.
const PARENTS: [&str; 9] = [
    "/",
    "/home",
    "/opt",
    "/root",
    "/run",
    "/tmp",
    "/var",
    "/var/cache",
    "/var/lib",
];

/// One directory or file of the host in a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostMount {
    path: String,
    host_path: PathBuf,
    read_only: bool,
}

/// Which field of a mount is wrong, and how.
#[derive(Debug, PartialEq, Eq)]
pub struct WrongMount {
    pub index: usize,
    pub field: &'static str,
    pub problem: String,
}

impl HostMount {
    /// `path`: in the VM, absolute. `host_path`: on the host, relative to this process's directory
    /// unless it is absolute. Looks at neither.
    pub fn new(
        path: &str,
        host_path: &Path,
        read_only: bool,
    ) -> Result<Self, (&'static str, String)> {
        Ok(Self {
            path: mount_point(path).map_err(|problem| ("path", problem))?,
            host_path: source(host_path).map_err(|problem| ("hostPath", problem))?,
            read_only,
        })
    }

    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Absolute. Not yet looked at.
    #[must_use]
    pub fn host_path(&self) -> &Path {
        &self.host_path
    }

    #[must_use]
    pub const fn read_only(&self) -> bool {
        self.read_only
    }
}

/// What holds for the mounts of one VM together.
pub fn check(mounts: &[HostMount]) -> Result<(), WrongMount> {
    if mounts.len() > MAX_MOUNTS {
        return Err(WrongMount {
            index: MAX_MOUNTS,
            field: "path",
            problem: format!("a VM can have {MAX_MOUNTS} mounts at most"),
        });
    }
    for (index, mount) in mounts.iter().enumerate() {
        if let Some(first) = mounts[..index]
            .iter()
            .position(|other| other.path == mount.path)
        {
            return Err(WrongMount {
                index,
                field: "path",
                problem: format!("{:?} is where mounts[{first}] is already", mount.path),
            });
        }
    }
    Ok(())
}

fn mount_point(path: &str) -> Result<String, String> {
    let Some(relative) = path.strip_prefix('/') else {
        return Err(format!("{path:?} must be an absolute path in the VM"));
    };
    if path.contains('\0') {
        return Err("a path must not contain a NUL byte".to_owned());
    }
    let relative = relative.trim_end_matches('/');
    let plain = |name: &str| !matches!(name, "" | "." | "..");
    if !relative.is_empty() && !relative.split('/').all(plain) {
        return Err(format!("{path:?} must not contain '.', '..' or '//'"));
    }
    let path = format!("/{relative}");
    let mut reserved = RESERVED.iter();
    if let Some(reserved) = reserved.find(|reserved| Path::new(&path).starts_with(reserved)) {
        return Err(format!(
            "{path:?} is part of the VM itself: nothing can be mounted in {reserved}"
        ));
    }
    if PARENTS.contains(&path.as_str()) {
        return Err(format!(
            "{path:?} holds directories of the VM itself: choose a path below it, or another one"
        ));
    }
    Ok(path)
}

fn source(path: &Path) -> Result<PathBuf, String> {
    use std::os::unix::ffi::OsStrExt;
    if path.as_os_str().is_empty() {
        return Err("a path must not be empty".to_owned());
    }
    if path.as_os_str().as_bytes().contains(&0) {
        return Err("a path must not contain a NUL byte".to_owned());
    }
    std::path::absolute(path).map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong_field(path: &str, host_path: &str) -> Option<&'static str> {
        let result = HostMount::new(path, Path::new(host_path), false);
        result.err().map(|(field, _)| field)
    }

    #[test]
    fn what_the_vm_is_made_of_is_no_mount_point() {
        for path in [
            "/",
            "//",
            "/usr",
            "/usr/local/x",
            "/proc/1",
            "/etc",
            "/home",
            "/opt/agentvm/agents",
            "/var/lib/agentvm/sessions",
            "/work/../etc",
            "/work/./x",
            "/a//b",
            "work",
            "",
        ] {
            assert_eq!(wrong_field(path, "/x"), Some("path"), "{path:?}");
        }
        for path in [
            "/work",
            "/home/user",
            "/home/user/project/",
            "/opt/tool",
            "/usrlocal",
        ] {
            assert_eq!(wrong_field(path, "/x"), None, "{path:?}");
        }
        assert_eq!(wrong_field("/work", ""), Some("hostPath"));
    }

    #[test]
    fn two_mounts_at_one_path_are_refused() {
        let mount = |path| HostMount::new(path, Path::new("/x"), true).expect("a mount");
        let wrong = check(&[mount("/a"), mount("/b"), mount("/a/")]).expect_err("a refusal");
        assert_eq!((wrong.index, wrong.field), (2, "path"));
    }
}

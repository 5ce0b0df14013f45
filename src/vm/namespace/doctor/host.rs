//! The machine, its disk and its limits.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statfs::statfs;
use nix::sys::statvfs::{FsFlags, statvfs};

use super::EVERYTHING;
use crate::vm::Check;
use crate::vm::namespace::directory;
use crate::vm::namespace::ids::{CAP_SYS_RESOURCE, IdMap, has_capability};

/// `mount_setattr`, which came last of what every VM needs.
const OLDEST: (u32, u32) = (5, 12);

pub(super) fn kernel() -> Check {
    const NAME: &str = "kernel";
    let release = nix::sys::utsname::uname().map_or_else(
        |_| String::new(),
        |name| name.release().to_string_lossy().into_owned(),
    );
    let mut numbers = release
        .split(|character: char| !character.is_ascii_digit())
        .map_while(|number| number.parse::<u32>().ok());
    let detail = format!("Linux {release}, {}", std::env::consts::ARCH);
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < OLDEST => Check::missing(
            NAME,
            detail,
            EVERYTHING,
            "agentvm needs Linux 5.12 or later",
        ),
        _ => Check::ok(NAME, detail),
    }
}

/// The nearest directory above that is there already.
pub(super) fn existing(path: &Path) -> &Path {
    path.ancestors()
        .find(|path| path.is_dir())
        .unwrap_or_else(|| Path::new("/"))
}

/// Less than this is soon full: one agent takes as much.
const LITTLE_SPACE: u64 = 1 << 30;

pub(super) fn data_directory(path: &Path) -> Check {
    const NAME: &str = "data-directory";
    let place = existing(path);
    let shown = path.display();
    if let Err(error) = directory::check_owner(&path.join("vms")) {
        let remedy = "Give it to this user with mode 0700, or choose another with dataDir or \
                      AGENTVM_DATA_DIR";
        return Check::missing(NAME, error.to_string(), EVERYTHING, remedy);
    }
    let elsewhere = "Choose a directory on a local disk with dataDir or AGENTVM_DATA_DIR";
    let (kind, flags) = match (statfs(place), statvfs(place)) {
        (Ok(kind), Ok(flags)) => (kind.filesystem_type().0, flags),
        (Err(errno), _) | (_, Err(errno)) => {
            let detail = format!("{shown}: {}", errno.desc());
            return Check::missing(NAME, detail, EVERYTHING, elsewhere);
        }
    };
    let writable = nix::unistd::access(place, nix::unistd::AccessFlags::W_OK);
    if let Err(errno) = writable {
        let detail = format!("{} can't be written: {}", place.display(), errno.desc());
        return Check::missing(NAME, detail, EVERYTHING, elsewhere);
    }
    let free = flags.blocks_available() * flags.fragment_size();
    let (name, suitability) = file_system(kind);
    let detail = format!("{shown} on {name}, {} MB free", free >> 20);
    if flags.flags().contains(FsFlags::ST_NOEXEC) {
        let lost = "programs that are built or installed in a VM do not run";
        let remedy = format!("{elsewhere}: this one is mounted noexec");
        return Check::degraded(NAME, detail, lost, remedy);
    }
    if let Some(lost) = suitability {
        return Check::degraded(NAME, detail, lost, elsewhere);
    }
    if free < LITTLE_SPACE {
        let lost = "writes of VMs and sessions fail when it is full";
        return Check::degraded(
            NAME,
            detail,
            lost,
            "Free some space, or choose another disk",
        );
    }
    Check::ok(NAME, detail)
}

/// Its name, and what is lost on it. The numbers are those of `linux/magic.h`.
const fn file_system(kind: i64) -> (&'static str, Option<&'static str>) {
    const NETWORK: Option<&str> = Some(
        "locks and SQLite's log are not reliable on a network file system; where VMs have a root, its \
         changes can't be kept on it",
    );
    match kind {
        0xef53 => ("ext4", None),
        0x5846_5342 => ("xfs", None),
        0x9123_683e => ("btrfs", None),
        0xf2f5_2010 => ("f2fs", None),
        0x2fc1_2fc1 => ("zfs", None),
        0x0102_1994 => ("tmpfs", Some("VMs and sessions end with the machine")),
        0x794c_7630 => (
            "overlayfs",
            Some(
                "what is written in a container's own layer ends with it; where VMs have a root, its changes \
                 can't be kept on it",
            ),
        ),
        0x6969 => ("nfs", NETWORK),
        0xff53_4d42 | 0xfe53_4d42 => ("cifs", NETWORK),
        0x0102_1997 => ("9p", NETWORK),
        0x6573_5546 => ("fuse", NETWORK),
        _ => ("another file system", None),
    }
}

pub(super) fn limits() -> Vec<Check> {
    vec![
        memory(),
        descriptors(),
        file_table(),
        namespaces(),
        mounts(),
        inotify(),
        core_dumps(),
    ]
}

fn memory() -> Check {
    const NAME: &str = "memory";
    /// A VM takes next to nothing; an agent in it takes this.
    const AGENT: u64 = 256 << 10;
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kilobytes = |name: &str| -> Option<u64> {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    match (kilobytes("MemAvailable:"), kilobytes("MemTotal:")) {
        (Some(available), Some(total)) => {
            let detail = format!("{} of {} MB available", available >> 10, total >> 10);
            if available < AGENT {
                let lost = "agents may be killed for lack of memory";
                Check::degraded(NAME, detail, lost, "Free some, or use a larger machine")
            } else {
                Check::ok(NAME, detail)
            }
        }
        _ => Check::degraded(
            NAME,
            "/proc/meminfo can't be read",
            "nothing",
            "Make /proc readable",
        ),
    }
}

fn descriptors() -> Check {
    const NAME: &str = "descriptors";
    const MANY: u64 = 4096;
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    let detail = format!("{limit} open files for this process");
    if limit < MANY {
        let lost = format!(
            "about {} VMs at a time, with fewer connections each",
            limit / OPEN_FILES
        );
        Check::degraded(
            NAME,
            detail,
            lost,
            "Raise it: ulimit -Hn, or LimitNOFILE= of the service",
        )
    } else {
        Check::ok(NAME, detail)
    }
}

/// What a process holds open for a VM with an agent, about.
const OPEN_FILES: u64 = 20;

/// As many VMs as a machine should not be short of anything for.
const MANY_VMS: u64 = 500;

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Of all processes of the host.
fn file_table() -> Check {
    const NAME: &str = "file-table";
    let text = fs::read_to_string("/proc/sys/fs/file-nr").unwrap_or_default();
    let mut numbers = text.split_whitespace().map(str::parse::<u64>);
    let (Some(Ok(open)), _, Some(Ok(most))) = (numbers.next(), numbers.next(), numbers.next())
    else {
        return Check::ok(NAME, "not limited as far as can be seen");
    };
    let detail = format!("{open} of {most} open files on this host (fs.file-max)");
    let vms = most.saturating_sub(open) / OPEN_FILES;
    if vms < MANY_VMS {
        let lost = format!("room for more than about {vms} VMs at a time");
        return Check::degraded(NAME, detail, lost, "As root: sysctl -w fs.file-max=1000000");
    }
    Check::ok(NAME, detail)
}

/// Counted for each user of the host: a VM has one of each kind.
fn namespaces() -> Check {
    const NAME: &str = "namespace-limits";
    let limit = |(kind, _): (&'static str, libc::c_int)| {
        let limit = number(&format!("/proc/sys/user/max_{kind}_namespaces"))?;
        Some((limit, kind))
    };
    let kinds = super::probe::KINDS
        .into_iter()
        .chain([("user", libc::CLONE_NEWUSER)]);
    let Some((least, kind)) = kinds.filter_map(limit).min() else {
        return Check::ok(NAME, "not limited as far as can be seen");
    };
    let detail = format!("{least} for each user (user.max_{kind}_namespaces)");
    if least < MANY_VMS {
        let lost = format!("more than {least} VMs at a time");
        let remedy = format!("As root: sysctl -w user.max_{kind}_namespaces=10000");
        return Check::degraded(NAME, detail, lost, remedy);
    }
    Check::ok(NAME, detail)
}

/// In each namespace; that of a VM begins with a copy of the host's.
fn mounts() -> Check {
    const NAME: &str = "mount-limit";
    const VMS_OWN: u64 = 1000;
    let Some(most) = number("/proc/sys/fs/mount-max") else {
        return Check::ok(NAME, "not limited as far as can be seen");
    };
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let hosts = table.lines().count() as u64;
    let detail = format!("{hosts} mounts on this host, of {most} (fs.mount-max)");
    if most < hosts + VMS_OWN {
        let lost =
            "VMs may not boot, nor show directories with many file systems mounted below them";
        return Check::degraded(NAME, detail, lost, "As root: sysctl -w fs.mount-max=100000");
    }
    Check::ok(NAME, detail)
}

/// Counted for each user of the host, all of its VMs together.
fn inotify() -> Check {
    const NAME: &str = "inotify";
    const FEW: (u64, u64) = (128, 65_536);
    let setting = |name: &str| -> Option<u64> {
        let path = format!("/proc/sys/fs/inotify/{name}");
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    let remedy =
        "As root: sysctl -w fs.inotify.max_user_instances=1024 fs.inotify.max_user_watches=524288";
    match (setting("max_user_instances"), setting("max_user_watches")) {
        (Some(instances), Some(watches)) => {
            let detail = format!("{instances} instances, {watches} watches for each user");
            let disowns = IdMap::of_this_process().and_then(IdMap::can_disown);
            if !disowns.unwrap_or(false) {
                Check::degraded(
                    NAME,
                    format!("{detail}; those of VMs are counted for root"),
                    "the root of a VM can take all that the host's root may have",
                    "Give the host process CAP_SETUID and CAP_SETPCAP",
                )
            } else if instances < FEW.0 || watches < FEW.1 {
                let lost = "file watchers in many VMs, or in large projects, fail";
                Check::degraded(NAME, detail, lost, remedy)
            } else {
                Check::ok(NAME, detail)
            }
        }
        _ => Check::degraded(
            NAME,
            "the kernel has no inotify",
            "programs that watch files fail",
            "A kernel with CONFIG_INOTIFY_USER",
        ),
    }
}

/// A hard limit of 0 stops no `core_pattern` that is a pipe, and it takes a capability to raise it for a VM.
fn core_dumps() -> Check {
    const NAME: &str = "core-dumps";
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    let hard = getrlimit(Resource::RLIMIT_CORE).map_or(0, |(_, hard)| hard);
    let raises = has_capability(CAP_SYS_RESOURCE).unwrap_or(false);
    if hard == 0 && pattern.starts_with('|') && !raises {
        return Check::degraded(
            NAME,
            format!("RLIMIT_CORE is 0, and core_pattern is {}", pattern.trim()),
            "what crashes in a VM is handed to that program of the host",
            "Start the host process with a hard limit: ulimit -Hc 1, or LimitCORE=1 of its service",
        );
    }
    Check::ok(NAME, "of what crashes in a VM there are none")
}

pub(super) fn agent_store(path: &Path) -> Check {
    const NAME: &str = "agent-store";
    let remedy = "Choose another with agentStoreDir or AGENTVM_CACHE_DIR, or run npx agentvm install as its \
                  owner";
    let place = existing(path);
    let writable = nix::unistd::access(place, nix::unistd::AccessFlags::W_OK).is_ok();
    let owner = fs::metadata(place).map_or(0, |metadata| metadata.uid());
    let entries = fs::read_dir(path).map_or(0, |entries| {
        entries
            .flatten()
            .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
            .count()
    });
    let detail = format!("{} with {entries} entries", path.display());
    if writable {
        Check::ok(NAME, detail)
    } else {
        let detail = format!("{detail}, which belongs to uid {owner}");
        Check::degraded(NAME, detail, "agents can't be installed", remedy)
    }
}

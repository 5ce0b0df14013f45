//! What a VM must not see, and must not be able to do: with its user's and with its root's rights.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;

use agentvm::vm::exec::{ExecEnd, ExecOptions, ExecOutput, exec};
use agentvm::vm::{DynVm, Exit, User};

use super::child::{block_on, in_child, unshare};
use super::vm::{booted, sh, stdout};

pub(super) mod system_calls;

/// Who can act in a VM of this host: there is no root where one id only can be mapped.
pub(super) fn users() -> Vec<User> {
    if nix::unistd::geteuid().is_root() {
        vec![User::User, User::Root]
    } else {
        vec![User::User]
    }
}

pub(super) async fn sh_as(vm: &DynVm, user: User, command: &str) -> ExecOutput {
    let options = ExecOptions {
        user,
        ..ExecOptions::default()
    };
    match exec(vm, command, options).await.unwrap() {
        ExecEnd::Exited(output) => output,
        ExecEnd::TimedOut(_) => unreachable!("no time limit was given"),
    }
}

/// Something that occurs nowhere else on this machine.
fn marker() -> String {
    format!("agentvm-marker-{}", uuid::Uuid::now_v7())
}

/// Everything that `command` printed, as whoever can.
async fn seen(vm: &DynVm, command: &str) -> String {
    let mut all = String::new();
    for user in users() {
        let output = sh_as(vm, user, command).await;
        all += &String::from_utf8_lossy(&output.stdout);
        all += &String::from_utf8_lossy(&output.stderr);
    }
    assert!(!all.is_empty(), "{command} printed nothing at all");
    all
}

/// The host's pid of PID 1 of the only VM that this process has.
fn pid_1() -> i32 {
    let mut guests = children().into_iter().filter(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "agentvm-guest\n")
    });
    let pid = guests.next().expect("a VM");
    assert_eq!(guests.next(), None, "more than one VM");
    pid
}

fn children() -> Vec<i32> {
    fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| fs::read_to_string(task.unwrap().path().join("children")).unwrap())
        .flat_map(|line| {
            line.split_whitespace()
                .map(|pid| pid.parse().unwrap())
                .collect::<Vec<i32>>()
        })
        .collect()
}

#[test]
fn no_process_of_the_vm_has_the_hosts_environment() {
    in_child(
        &["env", "AGENTVM_TEST_SECRET=in-the-environment"],
        "isolation::no_process_of_the_vm_has_the_hosts_environment",
        || {
            block_on(async {
                assert!(std::env::var_os("AGENTVM_TEST_SECRET").is_some());
                let data = tempfile::tempdir().unwrap();
                let vm = booted(data.path(), "a").await;
                let environments =
                    seen(&vm, "env; cat /proc/[0-9]*/environ | tr '\\0' '\\n'").await;
                assert!(environments.contains("HOME="), "{environments}");
                assert!(
                    !environments.contains("AGENTVM_TEST_SECRET"),
                    "{environments}"
                );
                // Not even its own user may look from outside.
                let first = fs::read(format!("/proc/{}/environ", pid_1())).unwrap_or_default();
                assert!(first.is_empty(), "{}", String::from_utf8_lossy(&first));
                vm.shutdown().await;
            });
        },
    );
}

#[test]
fn no_descriptor_of_the_host_process_is_inherited() {
    in_child(
        &[],
        "isolation::no_descriptor_of_the_host_process_is_inherited",
        || {
            let secret = tempfile::NamedTempFile::new().unwrap();
            let open: Vec<_> = (0..200).map(|_| secret.reopen().unwrap()).collect();
            for file in &open {
                let none = nix::fcntl::FdFlag::empty();
                nix::fcntl::fcntl(file, nix::fcntl::F_SETFD(none)).unwrap();
            }
            block_on(async {
                let data = tempfile::tempdir().unwrap();
                let vm = booted(data.path(), "a").await;
                for user in users() {
                    let output = sh_as(&vm, user, "ls /proc/self/fd").await;
                    // The fourth is the directory that `ls` reads.
                    assert_eq!(String::from_utf8_lossy(&output.stdout), "0\n1\n2\n3\n");
                }
                if !nix::unistd::geteuid().is_root() {
                    return; // PID 1 is closed to everyone else.
                }
                let mut kinds = BTreeMap::<String, u32>::new();
                for entry in fs::read_dir(format!("/proc/{}/fd", pid_1())).unwrap() {
                    let target = fs::read_link(entry.unwrap().path()).unwrap();
                    let target = target.to_string_lossy();
                    let kind = match target.split_once(':') {
                        Some((kind, _number)) => kind,
                        None => target.rsplit('/').next().unwrap(),
                    };
                    *kinds.entry(kind.to_owned()).or_default() += 1;
                }
                let expected = [("anon_inode", 1), ("lock", 1), ("null", 3), ("socket", 1)];
                let expected = expected.map(|(kind, count)| (kind.to_owned(), count));
                assert_eq!(kinds, BTreeMap::from(expected));
                vm.shutdown().await;
            });
        },
    );
}

#[tokio::test]
async fn processes_of_the_host_are_invisible() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let marker = marker();
    let mut host = std::process::Command::new("sh")
        .args(["-c", "read line", &marker])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let processes = seen(&vm, "cat /proc/[0-9]*/cmdline /proc/[0-9]*/comm").await;
    assert!(!processes.contains(&marker), "{processes}");
    assert!(processes.contains("agentvm-guest"), "{processes}");
    drop(host.stdin.take());
    host.wait().unwrap();
    vm.shutdown().await;
}

#[tokio::test]
async fn files_outside_of_the_base_are_invisible() {
    let outside = tempfile::tempdir().unwrap();
    let marker = marker();
    let file = outside.path().join(&marker);
    fs::write(&file, "secret").unwrap();
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let file = file.to_str().unwrap();
    let root = format!("/proc/1/root{file}");
    let cwd = format!("/proc/self/cwd/../../../../..{file}");
    for path in [file, &root, &cwd] {
        for user in users() {
            let output = sh_as(&vm, user, &format!("cat {path}")).await;
            assert_eq!(output.exit, Exit::Code(1), "{path} as {user:?}");
        }
    }
    // Neither by its name anywhere, nor below the magic links of any process.
    let found = seen(
        &vm,
        &format!(
            "ls -d /; find / /proc/[0-9]*/root/ /proc/[0-9]*/cwd/ -xdev -name {marker} 2>/dev/null"
        ),
    )
    .await;
    assert!(!found.contains(&marker), "{found}");
    vm.shutdown().await;
}

#[tokio::test]
async fn loopback_and_local_sockets_of_the_host_are_unreachable() {
    let (v4, v6) = (
        TcpListener::bind("127.0.0.1:0").unwrap(),
        TcpListener::bind("[::1]:0").unwrap(),
    );
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let _named = UnixListener::bind(&path).unwrap();
    let marker = marker();
    let address = SocketAddr::from_abstract_name(&marker).unwrap();
    let _abstract = UnixListener::bind_addr(&address).unwrap();
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let (v4, v6) = (
        v4.local_addr().unwrap().port(),
        v6.local_addr().unwrap().port(),
    );
    let path = path.to_str().unwrap();
    let connect = "use Socket; sub unix { socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die; \
                   connect($s, pack_sockaddr_un($_[0])) ? 'connected' : $!{ENOENT} ? 'absent' : \
                   $!{ECONNREFUSED} ? 'refused' : $! }";
    for user in users() {
        for (host, port) in [("127.0.0.1", v4), ("::1", v6)] {
            let command = format!("bash -c 'exec 3<>/dev/tcp/{host}/{port}'");
            let output = sh_as(&vm, user, &command).await;
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(said.contains("refused"), "{host} as {user:?}: {said}");
        }
        let command = format!("perl -e '{connect} print unix(\"\\0{marker}\"), unix(\"{path}\")'");
        let output = sh_as(&vm, user, &command).await;
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(said, "refusedabsent", "{user:?}: {output:?}");
    }
    assert!(!seen(&vm, "cat /proc/net/unix").await.contains(&marker));
    vm.shutdown().await;
}

/// System V objects of this process, removed at the end.
pub(super) struct SystemV {
    memory: i32,
    queue: i32,
}

impl SystemV {
    pub(super) fn make(key: i32) -> Self {
        let flags = libc::IPC_CREAT | libc::IPC_EXCL | 0o666;
        // SAFETY: integers.
        let (memory, queue) = unsafe { (libc::shmget(key, 4096, flags), libc::msgget(key, flags)) };
        assert!(memory >= 0 && queue >= 0, "key {key:#x} is in use");
        Self { memory, queue }
    }
}

impl Drop for SystemV {
    fn drop(&mut self) {
        // SAFETY: integers and null pointers, which IPC_RMID ignores.
        unsafe {
            libc::shmctl(self.memory, libc::IPC_RMID, std::ptr::null_mut());
            libc::msgctl(self.queue, libc::IPC_RMID, std::ptr::null_mut());
        }
    }
}

#[tokio::test]
async fn system_v_objects_of_the_host_do_not_exist_inside() {
    let key = i32::try_from(std::process::id()).unwrap();
    let _objects = SystemV::make(key);
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let calls = vec![
        attempt("shmget", libc::SYS_shmget, &[&key.to_string(), "4096", "0"]),
        attempt("msgget", libc::SYS_msgget, &[&key.to_string(), "0"]),
    ];
    for user in users() {
        assert_eq!(
            outcomes(&vm, user, &calls).await,
            [("shmget", "ENOENT"), ("msgget", "ENOENT")].map(owned),
            "{user:?}"
        );
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn nothing_names_the_host() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let hostname = nix::unistd::gethostname().unwrap();
    let hostname = hostname.to_str().unwrap();
    let names = seen(
        &vm,
        "hostname; uname -n; cat /etc/hostname /proc/sys/kernel/hostname",
    )
    .await;
    assert!(names.lines().all(|name| name == "agentvm"), "{names}");
    assert_ne!(hostname, "agentvm", "this host's name proves nothing");
    // Accounts of people: everything from 1000 on that is not 'nobody'.
    let mine = fs::read_to_string("/etc/passwd").unwrap();
    let accounts = seen(&vm, "cat /etc/passwd /etc/group").await;
    for line in mine.lines() {
        let fields: Vec<_> = line.split(':').collect();
        let uid: u32 = fields[2].parse().unwrap();
        if (1000..65534).contains(&uid) && fields[0] != "user" {
            assert!(!accounts.contains(fields[0]), "{} in {accounts}", fields[0]);
        }
    }
    let passwords = seen(&vm, "cut -d: -f2 /etc/shadow 2>/dev/null | sort -u").await;
    assert!(
        passwords.lines().all(|password| password == "*"),
        "{passwords}"
    );
    let cgroups = seen(&vm, "cat /proc/self/cgroup").await;
    for line in cgroups.lines() {
        assert!(line.ends_with(":/"), "{cgroups}");
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn of_the_machine_there_are_harmless_devices_only() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    assert_eq!(
        stdout(&vm, "ls /dev; find /sys -maxdepth 3").await,
        "fd\nfull\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n\
         /sys\n/sys/devices\n/sys/devices/system\n/sys/devices/system/cpu\n"
    );
    // (The others are files with a device mounted over them, which `find` does not notice.)
    let nodes = stdout(
        &vm,
        "find / -path /proc -prune -o \\( -type b -o -type c \\) -print 2>/dev/null; stat -c '%F' /dev/*",
    )
    .await;
    assert!(nodes.starts_with("/dev/pts/ptmx\n"), "{nodes}");
    assert!(!nodes.contains("block"), "{nodes}");
    assert_eq!(
        nodes.matches("character special file").count(),
        6,
        "{nodes}"
    );
    // What lscpu reads, to read.
    let changed = seen(
        &vm,
        "echo 0 > /sys/devices/system/cpu/cpu0/uevent && echo changed",
    )
    .await;
    let refused = |line: &str| line.ends_with("Read-only file system");
    assert!(changed.lines().all(refused), "{changed}");
    let secrets = seen(
        &vm,
        "echo .; cat /proc/kcore /proc/keys /proc/kallsyms /proc/timer_list 2>/dev/null | head -c 1",
    )
    .await;
    assert_eq!(secrets.replace(".\n", ""), "");
    vm.shutdown().await;
}

#[tokio::test]
async fn mounts_of_the_host_are_invisible() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let points = stdout(&vm, "cut -d' ' -f5 /proc/self/mountinfo").await;
    let known = [
        "/usr",
        "/bin",
        "/sbin",
        "/lib",
        "/lib32",
        "/lib64",
        "/libx32",
        "/etc",
        "/home/user",
        "/opt/agentvm/agents",
        "/opt/agentvm/dpkg",
        "/root",
        "/var",
        "/tmp",
        "/run",
        "/dev",
        "/proc",
        "/sys/devices/system/cpu",
    ];
    // Of the VM's own layer, or the root itself: nothing below them but what is named here.
    let own = ["/", "/home", "/opt", "/opt/agentvm", "/srv"];
    for point in points.lines() {
        let of_ours = |known: &&str| point == *known || point.starts_with(&format!("{known}/"));
        assert!(
            own.contains(&point) || known.iter().any(of_ours),
            "{point} in {points}"
        );
    }
    vm.shutdown().await;
}

/// A system call for perl's `syscall`, by the name that tells about it.
pub(super) fn attempt(
    name: &'static str,
    number: i64,
    arguments: &[&str],
) -> (&'static str, String) {
    let mut call = format!("syscall({number}");
    for argument in arguments {
        let is_number = argument
            .trim_start_matches('-')
            .starts_with(|c: char| c.is_ascii_digit());
        // Perl passes the address of a string, and wants one that may be written to.
        let argument = if is_number {
            (*argument).to_owned()
        } else {
            format!("(my $buffer{} = {argument})", call.len())
        };
        let _ = write!(call, ", {argument}"); // writing to a String can't fail
    }
    (name, format!("{call}) != -1"))
}

/// Does each in one process, and says how it went: "done" or the name of the error.
pub(super) async fn outcomes(
    vm: &DynVm,
    user: User,
    attempts: &[(&'static str, String)],
) -> Vec<(String, String)> {
    let mut script = "use Errno; use Fcntl; sub name { my $n = $!; for (keys %!) { return $_ if \
                      $!{$_} && $_ ne \"EWOULDBLOCK\" } $n }\n"
        .to_owned();
    for (name, expression) in attempts {
        // Writing to a String can't fail.
        let _ = writeln!(
            script,
            "$! = 0; print \"{name}=\", ({expression}) ? \"done\" : name(), \"\\n\";"
        );
    }
    let options = ExecOptions {
        user,
        stdin: script.into_bytes(),
        ..ExecOptions::default()
    };
    let ExecEnd::Exited(output) = exec(vm, "perl -", options).await.unwrap() else {
        unreachable!("no time limit was given")
    };
    let text = String::from_utf8(output.stdout).unwrap();
    let outcomes: Vec<_> = text
        .lines()
        .map(|line| owned(line.split_once('=').unwrap()))
        .collect();
    assert_eq!(
        outcomes.len(),
        attempts.len(),
        "{user:?}: {:?}",
        output.stderr
    );
    outcomes
}

fn owned((name, outcome): (&str, &str)) -> (String, String) {
    (name.to_owned(), outcome.to_owned())
}

#[expect(clippy::too_many_lines, reason = "a table")]
#[tokio::test]
async fn neither_user_nor_root_can_change_the_machine() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let namespaces = [
        ("unshare user", libc::CLONE_NEWUSER),
        ("unshare mnt", libc::CLONE_NEWNS),
        ("unshare pid", libc::CLONE_NEWPID),
        ("unshare net", libc::CLONE_NEWNET),
        ("unshare ipc", libc::CLONE_NEWIPC),
        ("unshare uts", libc::CLONE_NEWUTS),
        ("unshare cgroup", libc::CLONE_NEWCGROUP),
        ("unshare time", libc::CLONE_NEWTIME),
    ];
    let mut denied: Vec<_> = namespaces
        .iter()
        .map(|(name, flag)| attempt(name, libc::SYS_unshare, &[&flag.to_string()]))
        .collect();
    let string = |text: &'static str| format!("\"{text}\"");
    let (tmpfs, mnt, proc, empty) = (string("tmpfs"), string("/mnt"), string("/proc"), string(""));
    let node = |mode: u32| (mode | 0o666).to_string();
    let device = |major, minor| libc::makedev(major, minor).to_string();
    denied.extend([
        attempt(
            "mount",
            libc::SYS_mount,
            &[&tmpfs, &mnt, &tmpfs, "0", &empty],
        ),
        attempt(
            "bind",
            libc::SYS_mount,
            &[&proc, &mnt, &empty, &libc::MS_BIND.to_string(), &empty],
        ),
        attempt("umount", libc::SYS_umount2, &[&proc, "2"]),
        attempt("pivot_root", libc::SYS_pivot_root, &[&mnt, &mnt]),
        attempt("chroot", libc::SYS_chroot, &[&mnt]),
        attempt("fsopen", libc::SYS_fsopen, &[&tmpfs, "0"]),
        attempt("open_tree", libc::SYS_open_tree, &["-100", &proc, "1"]),
        attempt(
            "block device",
            libc::SYS_mknodat,
            &["-100", "\"/tmp/b\"", &node(libc::S_IFBLK), &device(8, 0)],
        ),
        attempt(
            "character device",
            libc::SYS_mknodat,
            &["-100", "\"/tmp/c\"", &node(libc::S_IFCHR), &device(1, 1)],
        ),
        attempt("keyctl", libc::SYS_keyctl, &["0", "-3", "0"]),
        attempt(
            "add_key",
            libc::SYS_add_key,
            &["\"user\"", "\"k\"", "\"v\"", "1", "-3"],
        ),
        attempt(
            "kernel log",
            libc::SYS_syslog,
            &["3", "(my $log = \" \" x 4096)", "4096"],
        ),
        attempt(
            "bpf",
            libc::SYS_bpf,
            &["0", "(my $map = \"\\0\" x 128)", "128"],
        ),
        attempt(
            "perf",
            libc::SYS_perf_event_open,
            &["(my $event = \"\\0\" x 128)", "0", "-1", "-1", "0"],
        ),
        attempt(
            "io_uring",
            libc::SYS_io_uring_setup,
            &["1", "(my $ring = \"\\0\" x 256)"],
        ),
        attempt("userfaultfd", libc::SYS_userfaultfd, &["0"]),
        attempt("packet socket", libc::SYS_socket, &["17", "3", "0"]),
        attempt("raw socket", libc::SYS_socket, &["2", "3", "1"]),
        attempt("vsock", libc::SYS_socket, &["40", "1", "0"]),
        attempt(
            "tipc socket pair",
            libc::SYS_socketpair,
            &["30", "5", "0", "(my $pair = \"\\0\" x 8)"],
        ),
        attempt("sethostname", libc::SYS_sethostname, &["\"x\"", "1"]),
        attempt(
            "settimeofday",
            libc::SYS_settimeofday,
            &["pack(\"qq\", 0, 0)", "0"],
        ),
        attempt(
            "reboot",
            libc::SYS_reboot,
            &["0xfee1dead", "672274793", "0x1234567", "0"],
        ),
        attempt(
            "open_by_handle_at",
            libc::SYS_open_by_handle_at,
            &["0", "(my $handle = \"\\0\" x 128)", "0"],
        ),
        attempt("swapon", libc::SYS_swapon, &["\"/tmp/x\"", "0"]),
        attempt("setns", libc::SYS_setns, &["0", "0"]),
    ]);
    for user in users() {
        for (name, outcome) in outcomes(&vm, user, &denied).await {
            assert_eq!(outcome, "EPERM", "{name} as {user:?}");
        }
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn pid_1_can_be_neither_read_nor_traced_nor_ended() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let iovec = "pack(\"PQ\", $room = \" \" x 8, 8)";
    let calls = [
        attempt("attach", libc::SYS_ptrace, &["16", "1", "0", "0"]),
        attempt("seize", libc::SYS_ptrace, &["0x4206", "1", "0", "0"]),
        attempt(
            "read memory",
            libc::SYS_process_vm_readv,
            &["1", iovec, "1", iovec, "1", "0"],
        ),
        (
            "pidfd_getfd",
            format!(
                "($fd = syscall({}, 1, 0)) != -1 && syscall({}, $fd, 3, 0) != -1",
                libc::SYS_pidfd_open,
                libc::SYS_pidfd_getfd
            ),
        ),
    ];
    let files = [
        "mem", "environ", "maps", "auxv", "stack", "syscall", "pagemap",
    ];
    let links = ["root", "cwd", "exe", "fd/3", "ns/user", "ns/mnt"];
    for user in users() {
        for (name, outcome) in outcomes(&vm, user, &calls).await {
            assert_eq!(outcome, "EPERM", "{name} as {user:?}");
        }
        for file in files {
            let command = format!("head -c 1 /proc/1/{file}");
            assert_eq!(
                sh_as(&vm, user, &command).await.stdout,
                b"",
                "{file} as {user:?}"
            );
        }
        for link in links {
            let command = format!("readlink /proc/1/{link}");
            assert_eq!(
                sh_as(&vm, user, &command).await.stdout,
                b"",
                "{link} as {user:?}"
            );
        }
        // Every signal there is: what the sender is told may differ, PID 1 must not even stop.
        sh_as(
            &vm,
            user,
            "for n in $(seq 1 64); do kill -$n 1; done 2>/dev/null",
        )
        .await;
        // One that claims to come from outside: a made-up sender with the pid 0.
        let forged = format!(
            "syscall({}, 1, 15, pack('l3x4l2x104', 15, 0, -1, 0, 0))",
            libc::SYS_rt_sigqueueinfo
        );
        sh_as(&vm, user, &format!("perl -e \"{forged}\"")).await;
        // One whose sender the kernel has no room for: as who PID 1 is, after all signals that may wait.
        let full = format!(
            r#"use POSIX; open(F, "</proc/1/status"); map {{ /^Uid:\s+(\d+)/ and $id = $1 }} <F>;
            syscall({}, $id + 0, -1, -1); sigprocmask(SIG_BLOCK, POSIX::SigSet->new(40));
            1 while syscall({}, $$ + 0, 40, $info = pack("l3x116", 40, 0, -1)) == 0;
            print $!{{EAGAIN}} ? "full" : $!; syscall({}, 1, 1, 15)"#,
            libc::SYS_setresuid,
            libc::SYS_rt_sigqueueinfo,
            libc::SYS_tgkill,
        );
        let output = sh_as(&vm, user, &format!("perl -e '{full}'")).await;
        assert_eq!(output.stdout, b"full", "{output:?}");
        assert_eq!(stdout(&vm, "echo alive").await, "alive\n");
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn kernel_settings_are_read_only() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let paths = [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/hostname",
        "/proc/sys/user/max_user_namespaces",
        "/proc/sys/net/ipv4/ip_unprivileged_port_start",
        "/proc/sys/vm/drop_caches",
        "/proc/irq/default_smp_affinity",
    ];
    for user in users() {
        for path in paths.into_iter().filter(|path| Path::new(path).exists()) {
            let output = sh_as(&vm, user, &format!("echo 1 > {path}")).await;
            assert_ne!(output.exit, Exit::Code(0), "{path} as {user:?}");
        }
        let sysrq = sh_as(&vm, user, "echo h > /proc/sysrq-trigger; echo sent").await;
        assert_eq!(sysrq.stdout, b"sent\n", "masked, or refused");
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn of_the_kernels_files_only_those_of_processes_can_be_written() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let open = "perl -MFcntl -nle \"print if -f && sysopen(F, \\$_, O_WRONLY)\"";
    for user in users() {
        let command = format!(
            "find /proc /sys -path '/proc/[0-9]*' -prune -o -type f -print 2>/dev/null | tee /tmp/all \
             | {open}; wc -l < /tmp/all; rm /tmp/all"
        );
        let output = sh_as(&vm, user, &command).await;
        let text = String::from_utf8(output.stdout).unwrap();
        let mut lines: Vec<&str> = text.lines().collect();
        let count: u32 = lines.pop().unwrap().parse().unwrap();
        assert!(count > 500, "{count} files");
        assert_eq!(lines, Vec::<&str>::new(), "{user:?}");
        // What tells of the whole machine is empty.
        let masked = "cd /proc; cat interrupts kallsyms kcore keys latency_stats sched_debug timer_list \
                      timer_stats 2>/dev/null | wc -c; ls -A acpi asound scsi 2>/dev/null | grep -v :";
        let output = sh_as(&vm, user, masked).await;
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.trim_end(), "0", "{user:?}");
        // Whom the kernel ends first when memory is short.
        let lower =
            "echo 1 > /proc/self/oom_score_adj && echo raised; echo -1 > /proc/self/oom_score_adj";
        let output = sh_as(&vm, user, lower).await;
        assert_eq!(output.stdout, b"raised\n", "{user:?}");
        assert_ne!(output.exit, Exit::Code(0), "{user:?}");
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn set_uid_programs_gain_nothing() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let places = ["/home/user", "/tmp", "/var/tmp", "/dev/shm"];
    for place in places {
        let make = format!("cp /usr/bin/id {place}/id && chmod 6755 {place}/id");
        let maker = *users().last().unwrap();
        sh_as(&vm, maker, &make).await;
        let output = sh(&vm, &format!("{place}/id -u || /usr/bin/id -u")).await;
        assert_eq!(output.stdout, b"1000\n", "{place}");
        sh_as(&vm, maker, &format!("rm {place}/id")).await;
    }
    let status = stdout(&vm, "cat /proc/self/status").await;
    for line in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert!(
            status.contains(&format!("{line}:\t0000000000000000")),
            "{status}"
        );
    }
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    assert!(status.contains("Seccomp:\t2"), "{status}");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_core_dump_is_written_nowhere() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    assert_eq!(stdout(&vm, "ulimit -Sc; ulimit -Hc").await, "0\n0\n");
    let output = sh(&vm, "exec perl -e 'kill ABRT => $$'").await;
    assert_eq!(output.exit, Exit::Signal(libc::SIGABRT));
    assert_eq!(stdout(&vm, "ls -A | wc -l").await, "0\n");
    vm.shutdown().await;
}

/// A hard limit of 0 does not keep the kernel from running a `core_pattern` that is a pipe.
#[test]
fn a_host_that_dumps_no_cores_has_vms_that_dump_none_into_a_pipe() {
    const TEST: &str = "isolation::a_host_that_dumps_no_cores_has_vms_that_dump_none_into_a_pipe";
    in_child(&["prlimit", "--core=0:0"], TEST, || {
        block_on(async {
            let data = tempfile::tempdir().unwrap();
            let vm = booted(data.path(), "a").await;
            let status = fs::read_to_string("/proc/self/status").unwrap();
            let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
            let effective = u64::from_str_radix(effective.unwrap().trim(), 16).unwrap();
            // CAP_SYS_RESOURCE
            let raises = effective & (1 << 24) != 0;
            let bytes = stdout(&vm, "awk '/core/ {print $5, $6}' /proc/self/limits").await;
            assert_eq!(bytes, if raises { "1 1\n" } else { "0 0\n" });
            vm.shutdown().await;
        });
    });
}

#[tokio::test]
async fn what_root_does_to_the_base_stays_in_the_vms_layer() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let marker = marker();
    let kept = "/usr/share/common-licenses/Artistic";
    let before = fs::read(kept).unwrap();
    for user in users() {
        sh_as(
            &vm,
            user,
            &format!("echo changed > /usr/{marker}; echo changed >> {kept}; chmod 600 {kept}"),
        )
        .await;
    }
    assert!(!Path::new("/usr").join(&marker).exists());
    assert_eq!(fs::read(kept).unwrap(), before);
    let readable = fs::metadata(kept).unwrap().mode() & 0o777;
    assert_eq!(readable, 0o644);
    // The agent store is shared by all VMs.
    for user in users() {
        let output = sh_as(&vm, user, "touch /opt/agentvm/agents/x").await;
        assert_ne!(output.exit, Exit::Code(0), "{user:?}");
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn files_of_the_vm_are_owned_on_the_host_by_nobody_else() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    for user in users() {
        let name = format!("of-{user:?}");
        let output = sh_as(&vm, user, &format!("touch /home/user/{name}")).await;
        assert_eq!(output.exit, Exit::Code(0), "{output:?}");
    }
    let owner = |name: &str| {
        let file = fs::metadata(data.path().join("vms/a/home").join(name)).unwrap();
        (file.uid(), file.gid())
    };
    let me = nix::unistd::geteuid();
    if me.is_root() {
        let (uid, gid) = owner("of-Root");
        assert_eq!(uid, gid);
        assert!(uid >= 65_536, "{uid} may belong to somebody");
        assert_eq!(owner("of-User"), (uid + 1000, gid + 1000));
        let taken = fs::read_to_string("/etc/subuid").unwrap_or_default();
        assert!(!taken.contains(&format!(":{uid}:")), "{taken}");
    } else {
        assert_eq!(
            owner("of-User"),
            (me.as_raw(), nix::unistd::getegid().as_raw())
        );
    }
    vm.shutdown().await;
}

#[test]
fn signals_that_the_host_process_ignores_work_inside() {
    // As under nohup(1), or a parent that leaves SIGCHLD ignored.
    in_child(
        &[
            "sh",
            "-c",
            "trap '' CHLD HUP INT QUIT TERM USR1; exec \"$0\" \"$@\"",
        ],
        "isolation::signals_that_the_host_process_ignores_work_inside",
        || {
            block_on(async {
                let data = tempfile::tempdir().unwrap();
                let vm = booted(data.path(), "a").await;
                assert_eq!(
                    stdout(&vm, "grep SigIgn /proc/self/status").await,
                    "SigIgn:\t0000000000000000\n"
                );
                assert_eq!(
                    sh(&vm, "kill -TERM $$").await.exit,
                    Exit::Signal(libc::SIGTERM)
                );
                vm.shutdown().await;
            });
        },
    );
}

#[tokio::test]
async fn bytes_can_not_be_pushed_into_a_terminal() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let call = attempt(
        "TIOCSTI",
        libc::SYS_ioctl,
        &["0", &libc::TIOCSTI.to_string(), "\"x\""],
    );
    for user in users() {
        assert_eq!(
            outcomes(&vm, user, std::slice::from_ref(&call)).await,
            [owned(("TIOCSTI", "EPERM"))]
        );
    }
    vm.shutdown().await;
}

#[test]
fn no_signal_leaves_the_vm() {
    // The host's processes are those of a namespace, lest a failure ends all that this machine runs.
    let wrapper = unshare(&["--pid", "--fork", "--kill-child", "--mount-proc"]);
    in_child(&wrapper, "isolation::no_signal_leaves_the_vm", || {
        let mut host = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        block_on(async {
            let data = tempfile::tempdir().unwrap();
            let vm = booted(data.path(), "a").await;
            for user in users() {
                // To all that there are, but PID 1 and the sender.
                let all = "sleep 1000 & exec perl -e 'print kill(9, -1)'";
                let output = sh_as(&vm, user, all).await;
                assert_eq!(output.stdout, b"1", "{user:?}");
            }
            assert_eq!(stdout(&vm, "echo alive").await, "alive\n");
            vm.shutdown().await;
        });
        drop(host.stdin.take());
        assert!(host.wait().unwrap().success(), "the host's was ended");
    });
}

/// An overlay takes instructions from attributes of its layers' files, one of which is the VM's.
#[tokio::test]
async fn the_vms_root_can_not_instruct_the_overlay() {
    const NAMES: [&str; 3] = [
        "user.overlay.redirect",
        "user.overlay.metacopy",
        "trusted.overlay.redirect",
    ];
    if !users().contains(&User::Root) {
        return; // There is no overlay.
    }
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    sh_as(&vm, User::Root, "mkdir /usr/instructed").await;
    let instruct = NAMES.map(|name| {
        let (file, name) = ("\"/usr/instructed\"", format!("\"{name}\""));
        attempt(
            "set",
            libc::SYS_setxattr,
            &[file, &name, "\"/etc\"", "4", "0"],
        )
    });
    // Refused, or kept under another name: that is the kernel's to say.
    outcomes(&vm, User::Root, &instruct).await;
    // What is not for the overlay is kept as it is.
    let plain = [
        "\"/usr/instructed\"",
        "\"user.plain\"",
        "\"/etc\"",
        "4",
        "0",
    ];
    let plain = [attempt("set", libc::SYS_setxattr, &plain)];
    let kept = outcomes(&vm, User::Root, &plain).await;
    vm.shutdown().await;
    let layer = data.path().join("vms/a/layers/upper/instructed");
    assert!(layer.is_dir());
    let has = |name: &str| {
        let path = std::ffi::CString::new(layer.to_str().unwrap()).unwrap();
        let name = std::ffi::CString::new(name).unwrap();
        // SAFETY: both strings outlive the call, which is to write nothing.
        unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0) >= 0 }
    };
    assert_eq!(has("user.plain"), kept[0].1 == "done");
    for name in NAMES {
        assert!(!has(name), "{name}");
    }
}

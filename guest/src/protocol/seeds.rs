//! What fuzzing begins with: one message of each kind, kept in `fuzz/seeds`.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use super::files::{Event, FileKind, Record, Stat, Time, framed};
use super::*;
use crate::net::Range;

fn bytes(text: &str) -> Bytes {
    text.as_bytes().to_vec()
}

fn encoded<T: Serialize>(message: &T) -> Vec<u8> {
    encode(message).expect("it can be encoded")
}

fn nodes() -> Vec<Node> {
    let path = |path: &str| path.to_owned();
    vec![
        Node::Overlay {
            path: path("/"),
            lowers: vec![Source::Descriptor(0), Source::HostPath(bytes("/usr"))],
            layer: Source::RealPath(bytes("/data/root")),
        },
        Node::Dir {
            path: path("/home"),
            mode: 0o755,
            owner: Account::Root,
        },
        Node::Symlink {
            path: path("/bin"),
            target: path("usr/bin"),
        },
        Node::Tree {
            path: path("/home/user"),
            source: Source::Descriptor(1),
            read_only: false,
            no_exec: true,
        },
        Node::HostMount(HostMount {
            path: path("/home/user/project"),
            source: HostSource::Path {
                path: bytes("/src"),
                dev: 1,
                ino: 2,
            },
            directory: true,
            read_only: true,
            hidden: vec![bytes("data")],
            submounts: vec![bytes("mnt")],
        }),
        Node::File {
            path: path("/etc/hostname"),
            content: bytes("vm\n"),
        },
        Node::Authorities {
            path: path("/run/a.pem"),
            from: vec![path("/etc/ssl/cert.pem")],
            otherwise: Bytes::new(),
            more: bytes("more"),
        },
        Node::Accounts {
            path: path("/etc/passwd"),
            lines: vec![path("user:x:1000:1000::/home/user:/bin/sh")],
        },
        Node::Bind {
            path: path("/var/tmp"),
            from: path("/tmp"),
        },
        Node::Tmpfs {
            path: path("/tmp"),
            mode: 0o1777,
            size: 1 << 30,
            inodes: 1 << 16,
        },
        Node::Proc {
            path: path("/proc"),
        },
        Node::Dev {
            path: path("/dev"),
            shm_size: 1 << 26,
        },
    ]
}

fn boot() -> BootSpec {
    let filter = SockFilter {
        code: 6,
        jt: 0,
        jf: 1,
        k: 0x7fff_0000,
    };
    let address = |last| Ipv4Addr::new(10, 0, 0, last);
    BootSpec {
        real_uid: Some(165_535),
        hostname: bytes("vm"),
        root: nodes(),
        writable_root: true,
        net: NetConfig {
            exempt_ports: vec![3000],
            denied_v4: vec![Range {
                first: address(0),
                last: address(255),
            }],
            denied_v6: Vec::new(),
        },
        seccomp: vec![filter],
        limits: LimitSpec {
            rlimits: vec![Rlimit {
                resource: 6,
                soft: 4096,
                hard: 4096,
            }],
            program_rlimits: Vec::new(),
            sysctls: vec![("kernel/shmall".to_owned(), "1024".to_owned())],
        },
        program_seccomp: vec![filter],
        #[cfg(feature = "weaken")]
        without: Vec::new(),
    }
}

fn file_ops() -> Vec<(&'static str, FileOp)> {
    let path = || bytes("/home/user/a");
    let time = Some(Time {
        seconds: -1,
        nanoseconds: 999_999_999,
    });
    vec![
        (
            "stat",
            FileOp::Stat {
                path: path(),
                follow: true,
            },
        ),
        (
            "make-dir",
            FileOp::MakeDir {
                path: path(),
                mode: 0o777,
                parents: true,
            },
        ),
        (
            "rename",
            FileOp::Rename {
                from: path(),
                to: path(),
                replace: false,
            },
        ),
        ("remove", FileOp::Remove { path: path() }),
        (
            "set-mode",
            FileOp::SetMode {
                path: path(),
                mode: 0o644,
            },
        ),
        ("set-mode-of", FileOp::SetModeOf { mode: 0o644 }),
        (
            "put-in-place",
            FileOp::PutInPlace {
                from: path(),
                to: path(),
                mode: Some(0o600),
            },
        ),
        (
            "set-owner",
            FileOp::SetOwner {
                path: path(),
                uid: Some(0),
                gid: None,
                follow: false,
            },
        ),
        (
            "set-times",
            FileOp::SetTimes {
                path: path(),
                accessed: time,
                modified: None,
                follow: true,
            },
        ),
        (
            "symlink",
            FileOp::Symlink {
                target: path(),
                path: path(),
            },
        ),
        ("read-link", FileOp::ReadLink { path: path() }),
        ("real-path", FileOp::RealPath { path: path() }),
        (
            "list",
            FileOp::List {
                path: path(),
                recursive: true,
                skip_unreadable: true,
            },
        ),
        ("remove-tree", FileOp::RemoveTree { path: path() }),
        (
            "copy",
            FileOp::Copy {
                from: path(),
                to: path(),
                recursive: true,
                replace: false,
            },
        ),
        (
            "watch",
            FileOp::Watch {
                path: path(),
                recursive: false,
            },
        ),
    ]
}

const INSTANCE: Instance = Instance {
    pid: 12,
    started: 3_456_789,
};

fn turn() -> Turn {
    Turn {
        since: 1 << 40,
        spare: vec![vec![bytes("node"), bytes("server.js")]],
    }
}

/// Of what was spawned.
fn process_requests() -> Vec<(&'static str, Request)> {
    let id = 7;
    vec![
        (
            "signal",
            Request::Signal {
                id,
                pid: 12,
                signal: 15,
            },
        ),
        ("end-session", Request::EndSession { id, leader: 12 }),
        (
            "foreground",
            Request::Foreground {
                id,
                agent: 12,
                turn: turn(),
            },
        ),
        (
            "end-foreground",
            Request::EndForeground {
                id,
                agent: INSTANCE,
                turn: turn(),
                seen: vec![INSTANCE],
                agent_too: true,
            },
        ),
    ]
}

fn requests() -> Vec<(&'static str, Request)> {
    let (id, user) = (7, Account::User);
    let argv = || vec![bytes("sh"), bytes("-c"), bytes("echo hi")];
    let env = || vec![bytes("HOME=/home/user")];
    let mut requests = vec![
        ("boot", Request::Boot(Box::new(boot()))),
        (
            "spawn",
            Request::Spawn {
                id,
                argv: argv(),
                env: env(),
                cwd: bytes("/"),
                user,
            },
        ),
        (
            "terminal",
            Request::Terminal {
                id,
                spec: Box::new(TerminalSpec {
                    argv: argv(),
                    env: env(),
                    cwd: bytes("/"),
                    user,
                    rows: 24,
                    cols: 80,
                }),
            },
        ),
        (
            "usage",
            Request::Limits {
                id,
                op: LimitOp::Usage,
            },
        ),
        (
            "kill",
            Request::Limits {
                id,
                op: LimitOp::Kill,
            },
        ),
        (
            "open",
            Request::Open {
                id,
                path: bytes("/etc/passwd"),
                flags: 0,
                mode: 0o666,
                user,
            },
        ),
        (
            "connect",
            Request::Port {
                id,
                op: PortOp::Connect {
                    port: 3000,
                    v6: true,
                },
            },
        ),
        (
            "listeners",
            Request::Port {
                id,
                op: PortOp::Listeners,
            },
        ),
        (
            "processes",
            Request::Process {
                id,
                op: ProcessOp::List {
                    after: 1,
                    commands: true,
                },
            },
        ),
        (
            "make-dirs",
            Request::MakeDirs {
                id,
                path: bytes("/home/user/a/b"),
                user,
            },
        ),
    ];
    requests.extend(process_requests());
    let files = file_ops().into_iter();
    requests.extend(files.map(|(name, op)| (name, Request::File { id, user, op })));
    requests
}

fn stat() -> Stat {
    let time = Time {
        seconds: 1_700_000_000,
        nanoseconds: 1,
    };
    Stat {
        mode: 0o100_644,
        uid: 1000,
        gid: 1000,
        size: 5,
        blocks: 8,
        links: 1,
        device: 42,
        inode: 43,
        accessed: time,
        modified: time,
        changed: time,
    }
}

fn replies() -> Vec<(&'static str, Reply)> {
    let id = 7;
    let process = ProcessEntry {
        instance: INSTANCE,
        parent: 1,
        group: 12,
        session: 12,
        uid: 1000,
        state: b'S',
        threads: 11,
        cpu_ticks: 42,
        resident_bytes: 1 << 20,
        command: bytes("node\0server.js\0"),
    };
    let usage = ProcessUsage {
        cpu_ticks: 42,
        resident_bytes: 1 << 20,
        tasks: 12,
    };
    let listener = SocketAddr::from((Ipv4Addr::LOCALHOST, 3000));
    let down = NetState::Down {
        step: bytes("make a table"),
        errno: 1,
    };
    vec![
        (
            "ready",
            Reply::Ready {
                net: NetState::Up {
                    v6: true,
                    log: true,
                },
            },
        ),
        ("ready-without-net", Reply::Ready { net: down }),
        (
            "boot-failed",
            Reply::BootFailed {
                step: bytes("mount /proc"),
                errno: 1,
            },
        ),
        ("spawned", Reply::Spawned { id, pid: 12 }),
        ("opened", Reply::Opened { id }),
        (
            "listeners",
            Reply::Listeners {
                id,
                listeners: vec![listener],
            },
        ),
        ("done", Reply::Done { id }),
        (
            "foreground",
            Reply::Foreground {
                id,
                agent: Some(INSTANCE),
                seen: vec![INSTANCE],
            },
        ),
        ("foreground-ended", Reply::ForegroundEnded { id, killed: 2 }),
        ("usage", Reply::Usage { id, usage }),
        (
            "processes",
            Reply::Processes {
                id,
                processes: vec![process],
                more: true,
            },
        ),
        (
            "stat",
            Reply::File {
                id,
                answer: FileAnswer::Stat(stat()),
            },
        ),
        (
            "path",
            Reply::File {
                id,
                answer: FileAnswer::Path(bytes("/home/user")),
            },
        ),
        (
            "failed",
            Reply::Failed {
                id,
                errno: 2,
                at: FailedAt::Cwd,
            },
        ),
        ("exited", Reply::Exited { pid: 12, status: 9 }),
        ("fork-bomb", Reply::ForkBomb),
    ]
}

fn records() -> Vec<(&'static str, Vec<Record>)> {
    let path = || bytes("a/b");
    let directory = true;
    let list = |kinds: &[FileKind]| {
        let entries = kinds
            .iter()
            .map(|&kind| Record::Entry { path: path(), kind });
        entries.chain([Record::Done]).collect()
    };
    let failed = Record::Failed {
        path: path(),
        errno: 13,
        found: Some(FileKind::Directory),
    };
    let events = [
        Event::Created {
            path: path(),
            directory,
        },
        Event::Modified { path: path() },
        Event::Attributes {
            path: path(),
            directory,
        },
        Event::Moved {
            from: path(),
            path: bytes("c"),
            directory,
        },
        Event::Deleted {
            path: bytes("c"),
            directory,
        },
        Event::Overflow,
    ];
    let watch = std::iter::once(Record::Watching);
    vec![
        (
            "list",
            list(&[FileKind::File, FileKind::Symlink, FileKind::Unknown]),
        ),
        ("failed", vec![failed]),
        ("watch", watch.chain(events.map(Record::Event)).collect()),
    ]
}

/// What a target is given: for `file_records` the size of chunks comes first.
fn seeds() -> Vec<(String, Vec<u8>)> {
    let named = |target: &str, name: &str| format!("{target}/{name}");
    let records = records().into_iter().map(|(name, records)| {
        let framed = records
            .iter()
            .flat_map(|record| framed(record).expect("short"));
        (
            named("file_records", name),
            std::iter::once(7).chain(framed).collect(),
        )
    });
    requests()
        .iter()
        .map(|(name, request)| (named("guest_request", name), encoded(request)))
        .chain(
            replies()
                .iter()
                .map(|(name, reply)| (named("guest_reply", name), encoded(reply))),
        )
        .chain(records)
        .collect()
}

#[test]
#[cfg_attr(feature = "weaken", ignore = "a test's build has another protocol")]
fn fuzzing_begins_with_messages_of_this_protocol() {
    let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/seeds"));
    let writes = std::env::var_os("AGENTVM_WRITE_SEEDS").is_some();
    for (name, message) in seeds() {
        let path = directory.join(&name);
        if writes {
            fs::create_dir_all(path.parent().expect("a directory")).expect("it can be made");
            fs::write(&path, &message).expect("it can be written");
        }
        let kept = fs::read(&path).ok();
        assert!(
            kept.as_deref() == Some(&message),
            "{name} is of an older protocol: set AGENTVM_WRITE_SEEDS=1 and run this test again"
        );
    }
}

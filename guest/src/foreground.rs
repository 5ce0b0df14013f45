//! Which processes a turn of an agent has in the foreground: a rule on a list of processes.
//!
//! The kernel knows nothing of turns. What it knows is each process's parent, its session and when it
//! started, and that a process whose parent has exited becomes a child of PID 1. From that:
//!
//! - The *agent* is the process that the host started, with what runs below it in its session since
//!   before the turn: many agents are a wrapper that runs the real one.
//! - A *command* is any other child of the agent. Most agents start it as leader of a session of its
//!   own, so that its session says nothing.
//! - In the *foreground* is each command, and each process below it that is in the command's session,
//!   if it started in the turn. So the command of a shell that the agent keeps across turns is in the
//!   foreground, and the shell is not.
//! - In the *background* is what a command has detached: what has another session than the command
//!   (setsid) or has lost its parent (`nohup server &` in a shell that is gone), and all below it.
//! - Commands that the host names, MCP servers, are *spared* with all below them.
//!
//! Taken for background, though nobody meant it so: what a command has left behind when it died, of
//! itself or by the agent's hand, since its parent is gone. (The host looks before it tells the agent
//! to cancel, and names what it saw.) Taken for foreground: the orphans of an agent that is itself a
//! reaper of orphans (`PR_SET_CHILD_SUBREAPER`), and a server in a shell that still waits for
//! something else.

use crate::protocol::{Bytes, Instance};

/// A process as `/proc/<pid>/stat` describes it (`proc_pid_stat(5)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub instance: Instance,
    pub parent: i32,
    pub group: i32,
    pub session: i32,
    state: u8,
    threads: u32,
}

impl Process {
    #[must_use]
    pub fn parse(stat: &[u8]) -> Option<Self> {
        let text = str::from_utf8(stat.split(|byte| *byte == b' ').next()?).ok()?;
        let pid = text.parse().ok()?;
        // A process chooses its name, which may hold anything: the last parenthesis ends it, as only
        // numbers follow.
        let name_ends = stat.iter().rposition(|byte| *byte == b')')?;
        let rest = str::from_utf8(stat.get(name_ends + 1..)?).ok()?;
        // From here on numbered as in the manual page, where the state is field 3.
        let mut fields = rest.split_ascii_whitespace();
        let state = *fields.next()?.as_bytes().first()?;
        let parent = fields.next()?.parse().ok()?;
        let group = fields.next()?.parse().ok()?;
        let session = fields.next()?.parse().ok()?;
        let threads = fields.nth(20 - 7)?.parse().ok()?;
        let started = fields.nth(22 - 21)?.parse().ok()?;
        Some(Self {
            instance: Instance { pid, started },
            parent,
            group,
            session,
            state,
            threads,
        })
    }

    /// Nothing of it runs any more. (A process whose first thread alone has ended is a zombie too.)
    #[must_use]
    pub const fn is_dead(&self) -> bool {
        matches!(self.state, b'X' | b'Z') && self.threads <= 1
    }

    /// After a SIGSTOP: it has taken effect. In an uninterruptible wait (a parent in vfork(2), a dead
    /// network file system) it will before the process does anything else.
    #[must_use]
    pub const fn is_still(&self) -> bool {
        matches!(self.state, b'T' | b't' | b'D' | b'X' | b'Z')
    }
}

/// The unit of [`Instance::started`]: what the kernel calls `USER_HZ`, 100 on every architecture that
/// agentvm runs on.
const TICK_NS: u64 = 1_000_000_000 / 100;

/// The tick in which a moment lies, in nanoseconds since boot. A process that started earlier in the
/// same one counts as started after it.
#[must_use]
pub const fn tick(nanoseconds: u64) -> u64 {
    nanoseconds / TICK_NS
}

/// The foreground, parents before children. `since` in ticks; `is_spared` is asked about commands and
/// about parts of the agent.
pub fn foreground(
    processes: &[Process],
    agent: Instance,
    since: u64,
    is_spared: &mut dyn FnMut(&Process) -> bool,
) -> Vec<Process> {
    let mut by_parent: Vec<&Process> = processes.iter().collect();
    by_parent.sort_by_key(|process| process.parent);
    let children = |of: Instance| {
        let begin = by_parent.partition_point(|process| process.parent < of.pid);
        by_parent[begin..]
            .iter()
            .take_while(move |process| process.parent == of.pid)
            // The list was not read in one instant: a number may have got a second owner meanwhile,
            // younger than the first one's children.
            .filter(move |process| process.instance.started >= of.started)
    };
    let mut found = Vec::new();
    let Some(root) = processes.iter().find(|process| process.instance == agent) else {
        return found;
    };
    // Each process of the list has one parent, and is visited once at most.
    let mut agents = vec![agent];
    let mut commands: Vec<&Process> = Vec::new();
    while let Some(part) = agents.pop() {
        for child in children(part) {
            if is_spared(child) {
                continue;
            }
            if child.session == root.session && child.instance.started < since {
                agents.push(child.instance);
            } else {
                commands.push(child);
            }
        }
    }
    let mut next = 0;
    while let Some(process) = commands.get(next).copied() {
        if process.instance.started >= since && !process.is_dead() {
            found.push(*process);
        }
        let session = process.session;
        commands.extend(children(process.instance).filter(|child| child.session == session));
        next += 1;
    }
    found
}

/// Whether this command line (`/proc/<pid>/cmdline`) is of a process that runs `argv`.
///
/// The arguments are its last words, and before them is the program, by its base name, with or
/// without an interpreter: `node --flag /usr/bin/npx -y server` runs `npx -y server`. A program that
/// has changed its command line is not recognized.
#[must_use]
pub fn runs(cmdline: &[u8], argv: &[Bytes]) -> bool {
    let Some((program, args)) = argv.split_first() else {
        return false;
    };
    let Some(cmdline) = cmdline.strip_suffix(b"\0") else {
        return false;
    };
    let words: Vec<&[u8]> = cmdline.split(|byte| *byte == 0).collect();
    let Some(before) = words.len().checked_sub(args.len()) else {
        return false;
    };
    let (head, tail) = words.split_at(before);
    // Without arguments to tell it by, the program must be the last word: 'node' is not any script.
    let head = if args.is_empty() {
        &head[head.len().saturating_sub(1)..]
    } else {
        head
    };
    tail.iter().zip(args).all(|(word, arg)| word == arg)
        && head
            .iter()
            .any(|word| base_name(word) == base_name(program))
}

fn base_name(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| *byte == b'/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGENT: Instance = Instance {
        pid: 10,
        started: 100,
    };
    const TURN: u64 = 500;

    fn process(pid: i32, parent: i32, session: i32, started: u64) -> Process {
        Process {
            instance: Instance { pid, started },
            parent,
            group: session,
            session,
            state: b'S',
            threads: 1,
        }
    }

    /// The pids in the foreground of the agent 10, whose turn began at tick 500.
    fn pids(others: &[Process], spared: &[i32]) -> Vec<i32> {
        let mut all = vec![process(1, 0, 1, 1), process(10, 1, 10, 100)];
        all.extend_from_slice(others);
        let mut is_spared = |process: &Process| spared.contains(&process.instance.pid);
        foreground(&all, AGENT, TURN, &mut is_spared)
            .iter()
            .map(|process| process.instance.pid)
            .collect()
    }

    #[test]
    fn a_command_is_in_the_foreground_with_what_hangs_below_it_in_its_session() {
        let own_session = [
            process(20, 10, 20, 500),
            process(21, 20, 20, 501),
            process(22, 21, 20, 502),
        ];
        assert_eq!(pids(&own_session, &[]), [20, 21, 22]);
        let agents_session = [process(20, 10, 10, 500), process(21, 20, 10, 501)];
        assert_eq!(pids(&agents_session, &[]), [20, 21]);
    }

    #[test]
    fn what_a_command_detached_is_in_the_background_with_all_below_it() {
        let tree = [
            process(20, 10, 20, 500),
            process(21, 20, 21, 501),
            process(22, 21, 21, 502),
            process(23, 22, 20, 503),
            process(24, 1, 20, 501),
        ];
        assert_eq!(pids(&tree, &[]), [20]);
    }

    #[test]
    fn what_started_before_the_turn_is_not_in_its_foreground() {
        let tree = [
            process(20, 10, 20, 499),
            process(21, 20, 20, 499),
            process(22, 20, 20, 500),
        ];
        assert_eq!(pids(&tree, &[]), [22]);
    }

    #[test]
    fn an_agent_may_be_a_wrapper_of_the_one_that_runs_the_commands() {
        let tree = [
            process(11, 10, 10, 101),
            process(12, 11, 10, 102),
            process(20, 12, 20, 500),
            process(21, 20, 20, 501),
        ];
        assert_eq!(pids(&tree, &[]), [20, 21]);
    }

    #[test]
    fn an_old_server_of_its_own_session_keeps_its_new_workers() {
        let tree = [
            process(20, 10, 20, 200),
            process(21, 20, 21, 201),
            process(22, 21, 21, 600),
        ];
        assert_eq!(pids(&tree, &[]), Vec::<i32>::new());
    }

    #[test]
    fn a_spared_command_is_spared_with_all_below_it() {
        let tree = [
            process(20, 10, 10, 500),
            process(21, 20, 10, 501),
            process(30, 10, 10, 400),
            process(31, 30, 10, 501),
        ];
        assert_eq!(pids(&tree, &[20, 30]), Vec::<i32>::new());
    }

    #[test]
    fn a_number_with_a_second_owner_does_not_make_a_stranger_a_child() {
        let tree = [process(20, 10, 20, 600), process(21, 20, 20, 550)];
        assert_eq!(pids(&tree, &[]), [20]);
    }

    #[test]
    fn another_process_with_the_agents_number_is_not_the_agent() {
        let tree = [process(20, 10, 20, 500)];
        let later = Instance {
            started: 101,
            ..AGENT
        };
        let all = [&[process(10, 1, 10, 100)], &tree[..]].concat();
        assert_eq!(foreground(&all, later, TURN, &mut |_| false), []);
    }

    #[test]
    fn a_process_is_read_whatever_its_name() {
        let stat =
            b"42 (a) R 1 (\xff\n b) S 10 42 41 0 -1 4194560 1 0 0 0 2 3 0 0 20 0 7 0 98765 1";
        let process = Process::parse(stat).expect("a process");
        assert_eq!(process.instance.pid, 42);
        assert_eq!(process.instance.started, 98_765);
        assert_eq!(
            (process.parent, process.group, process.session),
            (10, 42, 41)
        );
        assert_eq!((process.state, process.threads), (b'S', 7));
        assert_eq!(Process::parse(b"42 (sh) S 10"), None);
        assert_eq!(Process::parse(b""), None);
    }

    #[test]
    fn a_command_is_told_by_its_arguments_and_the_name_of_its_program() {
        let argv = |words: &[&str]| -> Vec<Bytes> {
            words.iter().map(|word| word.as_bytes().to_vec()).collect()
        };
        let server = argv(&["npx", "-y", "server"]);
        assert!(runs(b"/usr/bin/npx\0-y\0server\0", &server));
        assert!(runs(b"node\0--flag\0/usr/bin/npx\0-y\0server\0", &server));
        assert!(!runs(b"node\0/usr/bin/npm\0-y\0server\0", &server));
        assert!(!runs(b"npx\0-y\0server\0--more\0", &server));
        assert!(!runs(b"server\0", &server));
        let bare = argv(&["/opt/server"]);
        assert!(runs(b"/bin/sh\0./server\0", &bare));
        assert!(!runs(b"server\0argument\0", &bare));
        assert!(!runs(b"", &bare));
        assert!(!runs(b"server\0", &[]));
    }
}

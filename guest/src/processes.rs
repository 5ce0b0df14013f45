//! What runs in the VM, for the host to list.

use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

use agentvm_guest::protocol::{
    Instance, MAX_COMMAND, MAX_PACKET, ProcessEntry, ProcessOp, Reply, RequestId,
};

use crate::limits::{others, page_size, read_stat};

/// Of one entry without its command line, encoded: every number at its longest.
const ENTRY: usize = 80;

/// Of one `/proc/<pid>/status`, which has all groups of a process before what is looked for.
const MAX_STATUS: u64 = 1 << 20;

/// How long command lines are read for one answer; what comes later has its name alone.
const COMMANDS_FOR: Duration = Duration::from_secs(1);

/// Seconds for an answer of a worker. `stat` and `cmdline` of one process may take longer than that, where it
/// waits itself for the locks of the files that it maps, as all of a fork bomb's do; `status` never does.
pub(crate) const PATIENCE: u32 = 2;

/// By a worker.
pub(crate) fn answer(id: RequestId, op: ProcessOp) -> nix::Result<Reply> {
    let began = Instant::now();
    listed(id, op, |pid| entry(pid, began.elapsed() < COMMANDS_FOR))
}

/// What can be told at once: names, and no times.
pub(crate) fn answer_now(id: RequestId, op: ProcessOp) -> nix::Result<Reply> {
    listed(id, op, entry_now)
}

/// By pid, as many as fit.
fn listed(
    id: RequestId,
    ProcessOp::List { after, .. }: ProcessOp,
    look: impl Fn(i32) -> Option<ProcessEntry>,
) -> nix::Result<Reply> {
    let mut pids: Vec<i32> = others()?.filter(|pid| *pid > after).collect();
    pids.sort_unstable();
    let mut processes = Vec::new();
    let mut room = MAX_PACKET - 64;
    let mut more = false;
    for pid in pids {
        // One that is not there has ended meanwhile.
        let Some(entry) = look(pid) else {
            continue;
        };
        let size = ENTRY + entry.command.len();
        if size > room {
            more = true;
            break;
        }
        room -= size;
        processes.push(entry);
    }
    Ok(Reply::Processes {
        id,
        processes,
        more,
    })
}

fn entry(pid: i32, with_command: bool) -> Option<ProcessEntry> {
    let mut entry = parse(&read_stat(pid)?)?;
    entry.uid = uid(&read(pid, "status", MAX_STATUS)?)?;
    let command = if with_command {
        read(pid, "cmdline", MAX_COMMAND as u64).unwrap_or_default()
    } else {
        Vec::new()
    };
    // What a process without arguments has is its name alone, which `parse` has put there.
    if !command.is_empty() {
        entry.command = command;
    }
    Some(entry)
}

fn entry_now(pid: i32) -> Option<ProcessEntry> {
    parse_status(pid, &read(pid, "status", MAX_STATUS)?)
}

/// Of `proc_pid_status(5)`. What is not there is 0.
fn parse_status(pid: i32, status: &[u8]) -> Option<ProcessEntry> {
    let mut lines = status.split(|byte| *byte == b'\n');
    let lines: Vec<(&[u8], &[u8])> = lines
        .by_ref()
        .filter_map(|line| {
            let colon = line.iter().position(|byte| *byte == b':')?;
            Some((&line[..colon], line[colon + 1..].trim_ascii()))
        })
        .collect();
    let value = |name: &str| {
        let mut lines = lines.iter();
        lines.find_map(|(own, value)| (*own == name.as_bytes()).then_some(*value))
    };
    let first = |name| {
        str::from_utf8(value(name)?)
            .ok()?
            .split_ascii_whitespace()
            .next()
    };
    let number = |name| first(name)?.parse::<u64>().ok();
    let id = |name| first(name).and_then(|text| text.parse().ok()).unwrap_or(0);
    Some(ProcessEntry {
        instance: Instance { pid, started: 0 },
        parent: id("PPid"),
        group: id("NSpgid"),
        session: id("NSsid"),
        uid: uid(status)?,
        state: *value("State")?.first()?,
        threads: number("Threads")
            .and_then(|count| count.try_into().ok())
            .unwrap_or(0),
        cpu_ticks: 0,
        resident_bytes: number("VmRSS").unwrap_or(0).saturating_mul(1024),
        command: [b"[", value("Name")?, b"]\0"].concat(),
    })
}

fn read(pid: i32, name: &str, most: u64) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    let file = File::open(format!("/proc/{pid}/{name}")).ok()?;
    file.take(most).read_to_end(&mut content).ok()?;
    Some(content)
}

/// All but the uid, of `proc_pid_stat(5)`.
fn parse(stat: &[u8]) -> Option<ProcessEntry> {
    let pid = str::from_utf8(stat.split(|byte| *byte == b' ').next()?).ok()?;
    // A process chooses its name, which may hold anything: the last parenthesis ends it, as only
    // numbers follow.
    let name_begins = stat.iter().position(|byte| *byte == b'(')?;
    let name_ends = stat.iter().rposition(|byte| *byte == b')')?;
    let name = stat.get(name_begins + 1..name_ends)?;
    let rest = str::from_utf8(stat.get(name_ends + 1..)?).ok()?;
    // Numbered as in the manual page, where the state is field 3.
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).copied();
    let number = |at: usize| field(at)?.parse::<u64>().ok();
    let id = |at: usize| field(at)?.parse::<i32>().ok();
    Some(ProcessEntry {
        instance: Instance {
            pid: pid.parse().ok()?,
            started: number(22)?,
        },
        parent: id(4)?,
        group: id(5)?,
        session: id(6)?,
        uid: 0,
        state: *field(3)?.as_bytes().first()?,
        threads: field(20)?.parse().ok()?,
        cpu_ticks: number(14)?.saturating_add(number(15)?),
        resident_bytes: number(24)?.saturating_mul(page_size()),
        command: [b"[", name, b"]\0"].concat(),
    })
}

/// The effective one, of `proc_pid_status(5)`. The process's name, which comes before, is escaped: no
/// line of it begins like this one.
fn uid(status: &[u8]) -> Option<u32> {
    let mut lines = status.split(|byte| *byte == b'\n');
    let ids = lines.find_map(|line| line.strip_prefix(b"Uid:"))?;
    let effective = str::from_utf8(ids).ok()?.split_ascii_whitespace().nth(1)?;
    effective.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_at_once_is_in_the_status() {
        let status = b"Name:\ta:\\nb\nUmask:\t0022\nState:\tS (sleeping)\nPid:\t7\nPPid:\t1\n\
            Uid:\t1000\t1001\t1000\t1000\nNSpgid:\t7\nNSsid:\t6\nVmRSS:\t    2048 kB\nThreads:\t5\n";
        let entry = parse_status(7, status).expect("valid");
        assert_eq!(entry.command, b"[a:\\nb]\0");
        assert_eq!((entry.parent, entry.group, entry.session), (1, 7, 6));
        assert_eq!((entry.uid, entry.state, entry.threads), (1001, b'S', 5));
        assert_eq!(entry.resident_bytes, 2 << 20);
    }
}

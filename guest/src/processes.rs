//! What runs in the VM, for the host to list.

use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

use agentvm_guest::protocol::{
    Instance, MAX_COMMAND, MAX_PACKET, ProcessEntry, ProcessOp, Reply, RequestId,
};

use crate::limits::{page_size, pids, read_stat};

/// Of one entry without its command line, encoded: every number at its longest.
const ENTRY: usize = 80;

/// Of one `/proc/<pid>/status`; the line that is looked for is among the first.
const MAX_STATUS: u64 = 2048;

/// How long command lines are read for one answer; what comes later has its name alone.
const COMMANDS_FOR: Duration = Duration::from_secs(1);

/// Command lines are read by a worker: to read one is to wait for a process that forks, and among those of
/// a fork bomb that can take seconds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Commands {
    Read,
    /// Each process has its name alone.
    Leave,
}

pub(crate) fn answer(id: RequestId, op: ProcessOp, commands: Commands) -> nix::Result<Reply> {
    let ProcessOp::List { after } = op;
    let (processes, more) = list(after, commands)?;
    Ok(Reply::Processes {
        id,
        processes,
        more,
    })
}

/// By pid, and whether there are more than fit.
fn list(after: i32, commands: Commands) -> nix::Result<(Vec<ProcessEntry>, bool)> {
    // Who lists is not listed, if it is not PID 1.
    let own = std::process::id().cast_signed();
    let is_listed = |pid: &i32| *pid > after && (*pid != own || own == 1);
    let mut pids: Vec<i32> = pids()?.filter(is_listed).collect();
    pids.sort_unstable();
    let mut listed = Vec::new();
    let mut room = MAX_PACKET - 64;
    let began = Instant::now();
    for pid in pids {
        // One that is not there has ended meanwhile.
        let with_command = commands == Commands::Read && began.elapsed() < COMMANDS_FOR;
        let Some(entry) = entry(pid, with_command) else {
            continue;
        };
        let size = ENTRY + entry.command.len();
        if size > room {
            return Ok((listed, true));
        }
        room -= size;
        listed.push(entry);
    }
    Ok((listed, false))
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

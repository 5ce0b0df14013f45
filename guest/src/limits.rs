//! What the VM's processes may take, what they take, and what is done to all of them.

use std::fs;
use std::io::{self, Read};
use std::sync::OnceLock;

use agentvm_guest::protocol::{LimitSpec, ProcessUsage, Rlimit};
use nix::errno::Errno;

use crate::boot::{errno_of, set_rlimit};

/// Of the programs that PID 1 starts; others are as its own.
static OF_PROGRAMS: OnceLock<Vec<Rlimit>> = OnceLock::new();

/// Of one `/proc/<pid>/stat`.
const MAX_STAT: u64 = 4096;

/// Processes that are looked at for a sum, so that PID 1 is soon back at its socket.
const MAX_COUNTED: usize = 20_000;

/// Before the VM's `/proc/sys` is masked.
pub(crate) fn write_sysctls(spec: &LimitSpec) -> nix::Result<()> {
    for (name, value) in &spec.sysctls {
        match fs::write(format!("/proc/sys/{name}"), value) {
            Ok(()) => {}
            // A kernel without it, or one that lets only the host's root change it.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
                ) => {}
            Err(error) => return Err(errno_of(&error)),
        }
    }
    Ok(())
}

pub(crate) fn set(spec: &LimitSpec) -> nix::Result<()> {
    OF_PROGRAMS.get_or_init(|| spec.program_rlimits.clone());
    spec.rlimits.iter().try_for_each(set_rlimit)
}

/// How many processes and threads each user of the VM may have.
pub(crate) fn processes() -> Option<u64> {
    let mut limits = of_programs().iter();
    limits
        .find(|limit| limit.resource == libc::RLIMIT_NPROC)
        .map(|limit| limit.hard)
}

fn of_programs() -> &'static [Rlimit] {
    OF_PROGRAMS.get().map_or(&[], Vec::as_slice)
}

/// Takes from a process that PID 1 has just started what is PID 1's alone. To be called after the last
/// change of ids, which is where the kernel first looks at how many processes there are; a lower limit
/// then is for those that the new process starts. System calls only: it runs on PID 1's memory.
pub(crate) fn restrict_child() {
    for limit in of_programs() {
        // Lowering a limit can't fail.
        let _ = set_rlimit(limit);
    }
}

/// By a worker: a process may keep it waiting (see [`crate::processes::PATIENCE`]).
pub(crate) fn usage() -> nix::Result<ProcessUsage> {
    let mut usage = ProcessUsage::default();
    let page = page_size();
    for pid in others()?.take(MAX_COUNTED) {
        let Some(stat) = read_stat(pid) else {
            continue; // it has ended meanwhile
        };
        let Some(counted) = Counted::parse(&stat) else {
            continue;
        };
        usage.cpu_ticks = usage.cpu_ticks.saturating_add(counted.cpu_ticks);
        let bytes = counted.resident_pages.saturating_mul(page);
        usage.resident_bytes = usage.resident_bytes.saturating_add(bytes);
        usage.tasks = usage.tasks.saturating_add(counted.threads);
    }
    Ok(usage)
}

/// What can be told at once: how many processes there are, and what their first threads took.
pub(crate) fn usage_now() -> nix::Result<ProcessUsage> {
    let mut usage = ProcessUsage::default();
    let page = page_size();
    for pid in pids()?.take(MAX_COUNTED) {
        usage.tasks += 1;
        let resident_pages = number_in(pid, "statm", 1).unwrap_or(0);
        let bytes = resident_pages.saturating_mul(page);
        usage.resident_bytes = usage.resident_bytes.saturating_add(bytes);
        // Nanoseconds.
        let ticks = number_in(pid, "schedstat", 0).unwrap_or(0) / 10_000_000;
        usage.cpu_ticks = usage.cpu_ticks.saturating_add(ticks);
    }
    Ok(usage)
}

/// How many processes there are.
pub(crate) fn count() -> nix::Result<u64> {
    Ok(pids()?.fold(0, |count, _| count + 1))
}

/// One of the numbers in a file of a process.
fn number_in(pid: i32, name: &str, at: usize) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/{name}")).ok()?;
    text.split_ascii_whitespace().nth(at)?.parse().ok()
}

pub(crate) fn kill_all() -> nix::Result<()> {
    signal_all(libc::SIGKILL)
}

fn signal_all(signal: i32) -> nix::Result<()> {
    // All but the caller and, in a pid namespace, nothing outside of it.
    // SAFETY: integers.
    match Errno::result(unsafe { libc::kill(-1, signal) }) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno),
    }
}

pub(crate) fn pids() -> nix::Result<impl Iterator<Item = i32>> {
    let entries = fs::read_dir("/proc").map_err(|error| errno_of(&error))?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()))
}

/// All but the worker that asks.
pub(crate) fn others() -> nix::Result<impl Iterator<Item = i32>> {
    let own = std::process::id().cast_signed();
    Ok(pids()?.filter(move |pid| *pid != own || own == 1))
}

pub(crate) fn read_stat(pid: i32) -> Option<Vec<u8>> {
    let mut stat = Vec::new();
    let file = fs::File::open(format!("/proc/{pid}/stat")).ok()?;
    file.take(MAX_STAT).read_to_end(&mut stat).ok()?;
    Some(stat)
}

pub(crate) fn page_size() -> u64 {
    // SAFETY: sysconf only returns a number.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// What is summed up, of `proc_pid_stat(5)`.
#[derive(Debug, PartialEq, Eq)]
struct Counted {
    cpu_ticks: u64,
    threads: u64,
    resident_pages: u64,
}

impl Counted {
    fn parse(stat: &[u8]) -> Option<Self> {
        let name_ends = stat.iter().rposition(|byte| *byte == b')')?;
        let rest = str::from_utf8(stat.get(name_ends + 1..)?).ok()?;
        // Numbered as in the manual page, where the state is field 3.
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        // Times of children can be negative, the manual says; they never are.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            cpu_ticks: [14, 15, 16, 17]
                .into_iter()
                .filter_map(field)
                .fold(0, u64::saturating_add),
            threads: field(20)?,
            resident_pages: field(24)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_counted_with_the_children_that_it_has_waited_for() {
        let stat = b"7 (a ) b) S 1 7 7 0 -1 0 1 2 3 4 10 20 300 4000 20 0 5 0 99 1000 25 0 0";
        let counted = Counted::parse(stat).expect("valid");
        assert_eq!(
            counted,
            Counted {
                cpu_ticks: 4330,
                threads: 5,
                resident_pages: 25
            }
        );
    }
}

//! The list of everything that runs, page by page.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agentvm_guest::protocol::{MAX_COMMAND, ProcessEntry, ProcessOp, Request};
use async_trait::async_trait;

use super::control::Answer;
use super::running::{NamespaceVm, processes, unexpected};
use crate::vm::{ProcessInfo, ProcessState, Processes, Result, Vm, VmError};

/// Whatever PID 1 says, the host holds no more.
const MAX_LISTED: usize = 20_000;

/// Arguments of a process that are told: each takes many times the memory of its byte.
const MAX_ARGUMENTS: usize = 256;

/// Pages of a list are asked for with command lines as long as this. One that could not have them takes two
/// seconds by itself.
const COMMANDS_FOR: Duration = Duration::from_secs(1);

/// What the kernel calls `USER_HZ`, in milliseconds.
const TICK_MS: u64 = 10;

#[async_trait]
impl Processes for NamespaceVm {
    async fn processes(&self) -> Result<Vec<ProcessInfo>> {
        // Each is a process in the VM while it is made.
        let _one_list = self.tasks.processes.acquire().await;
        let booted_at = self.machine_booted_at();
        let mut listed: Vec<ProcessInfo> = Vec::new();
        let mut after = 0;
        let began = Instant::now();
        while listed.len() < MAX_LISTED {
            let id = self.control.next_id();
            let op = ProcessOp::List {
                after,
                commands: began.elapsed() < COMMANDS_FOR,
            };
            let request = Request::Process { id, op };
            let (page, more) = match self.control.call(id, &request, &[]).await? {
                Answer::Processes(page, more) => (page, more),
                Answer::Failed { errno, .. } => return Err(processes(errno)),
                other => return Err(unexpected(&other)),
            };
            let is_empty = page.is_empty();
            for entry in page {
                let pid = entry.instance.pid;
                // So the list has an end.
                if pid <= after {
                    return Err(VmError::Protocol("processes out of order".to_owned()));
                }
                if entry.command.len() > MAX_COMMAND {
                    return Err(VmError::Protocol(
                        "a command line that is too long".to_owned(),
                    ));
                }
                after = pid;
                listed.push(info(&entry, booted_at));
            }
            if !more || is_empty {
                break;
            }
        }
        listed.truncate(MAX_LISTED);
        Ok(listed)
    }
}

impl NamespaceVm {
    /// When the clock of [`agentvm_guest::protocol::Instance`] was 0, in milliseconds since the epoch.
    fn machine_booted_at(&self) -> u64 {
        let since_boot = self.now().nanoseconds / 1_000_000;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(0));
        now.saturating_sub(since_boot)
    }
}

fn info(entry: &ProcessEntry, booted_at: u64) -> ProcessInfo {
    let id = |id: i32| u32::try_from(id).unwrap_or(0);
    let ms = |ticks: u64| ticks.saturating_mul(TICK_MS);
    let command = entry.command.strip_suffix(b"\0").unwrap_or(&entry.command);
    ProcessInfo {
        pid: id(entry.instance.pid),
        parent: id(entry.parent),
        group: id(entry.group),
        session: id(entry.session),
        uid: entry.uid,
        state: match entry.state {
            b'R' => ProcessState::Running,
            b'S' | b'I' => ProcessState::Sleeping,
            b'D' => ProcessState::Waiting,
            b'T' => ProcessState::Stopped,
            b't' => ProcessState::Traced,
            b'Z' => ProcessState::Zombie,
            _ => ProcessState::Other,
        },
        threads: entry.threads,
        cpu_ms: ms(entry.cpu_ticks),
        memory_bytes: entry.resident_bytes,
        started_at: match entry.instance.started {
            // PID 1 could not find it out.
            0 => 0,
            started => booted_at.saturating_add(ms(started)),
        },
        command: command
            .split(|byte| *byte == 0)
            .take(MAX_ARGUMENTS)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use agentvm_guest::protocol::Instance;

    use super::*;

    #[test]
    fn of_a_thousand_arguments_the_first_are_told() {
        let entry = ProcessEntry {
            instance: Instance { pid: 7, started: 0 },
            parent: 1,
            group: 7,
            session: 7,
            uid: 1000,
            state: b'R',
            threads: 1,
            cpu_ticks: 0,
            resident_bytes: 0,
            command: vec![0; 2000],
        };
        assert_eq!(info(&entry, 0).command.len(), MAX_ARGUMENTS);
    }
}

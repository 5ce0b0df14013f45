//! What a cancel ends: the commands of the turn, and nothing else. The agents are shells.

use std::os::fd::OwnedFd;
use std::time::Duration;

use agentvm::vm::environment;
use agentvm::vm::{Command, Commands, DynVm, Exit, Extent, GuestPath, Moment, User, exited};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::watch;

use super::{booted, sh, stdout};

/// A shell that does what it is told on its stdin.
struct Agent {
    vm: DynVm,
    pid: u32,
    stdin: pipe::Sender,
    stdout: BufReader<pipe::Receiver>,
    exit: watch::Receiver<Option<Exit>>,
    /// A shell that says that its command was killed must not be killed for that.
    _stderr: OwnedFd,
}

impl Agent {
    async fn start(vm: &DynVm) -> Self {
        let process = vm
            .spawn(&Command {
                argv: vec!["/bin/sh".to_owned()],
                env: environment::merge(User::User, Vec::new()),
                cwd: GuestPath::home(),
                user: User::User,
            })
            .await
            .unwrap();
        Self {
            vm: DynVm::clone(vm),
            pid: process.pid,
            stdin: pipe::Sender::from_owned_fd(process.stdin.into()).unwrap(),
            stdout: BufReader::new(pipe::Receiver::from_owned_fd(process.stdout.into()).unwrap()),
            exit: process.exit,
            _stderr: process.stderr.into(),
        }
    }

    /// Has it run this, which says "ready" when everything is as the test wants it.
    async fn does(&mut self, script: &str) {
        let script = format!("{script}\n");
        self.stdin.write_all(script.as_bytes()).await.unwrap();
        let mut line = String::new();
        self.stdout.read_line(&mut line).await.unwrap();
        assert_eq!(line, "ready\n", "{script}");
    }

    /// What a cancel does when the agent obeys it by doing nothing.
    async fn cancelled(&self, since: Moment, spare: Commands) -> u32 {
        let seen = self.vm.foreground(self.pid, since, spare).await.unwrap();
        let ended = self.vm.end_foreground(&seen, Extent::Foreground).await;
        ended.unwrap()
    }

    async fn still_works(&mut self) {
        self.does("echo ready").await;
    }
}

/// Whether the process whose pid is in this file runs.
async fn lives(vm: &DynVm, name: &str) -> bool {
    let running = format!("grep -q '^State:[[:space:]][^XZ]' /proc/$(cat {name})/status");
    sh(vm, &running).await.exit == Exit::Code(0)
}

/// Waits for the next tick of the clock that dates processes: what started before it is older than
/// what starts after it.
async fn next_tick(vm: &DynVm) -> Moment {
    tokio::time::sleep(Duration::from_millis(20)).await;
    vm.now()
}

#[tokio::test]
async fn commands_of_the_turn_die_whatever_their_session_or_group() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let mut agent = Agent::start(&vm).await;
    let turn = vm.now();
    agent.does("sleep 1000 & echo $! > plain; echo ready").await;
    agent
        .does(
            r#"setsid sh -c 'echo $$ > session
                 sleep 1000 & echo $! > child
                 perl -e "setpgrp; system q(echo \$PPID > group; echo ready; sleep 1000)" &
                 wait' &"#,
        )
        .await;
    // The group's own 'sleep' may not have started yet.
    let killed = agent.cancelled(turn, Vec::new()).await;
    assert!((5..=6).contains(&killed), "{killed}");
    for name in ["plain", "session", "child", "group"] {
        assert!(!lives(&vm, name).await, "{name}");
    }
    assert_eq!(sh(&vm, "pgrep -r S,R,T -x sleep").await.exit, Exit::Code(1));
    agent.still_works().await;
    vm.shutdown().await;
}

#[tokio::test]
async fn what_a_command_left_in_the_background_lives() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let mut agent = Agent::start(&vm).await;
    let turn = vm.now();
    // Its shell has exited when the agent goes on.
    agent
        .does("setsid sh -c 'nohup sleep 1000 > /dev/null 2>&1 & echo $! > left'; echo ready")
        .await;
    agent
        .does(
            "setsid sh -c 'echo $$ > shell
                 setsid sh -c \"echo \\$\\$ > detached; sleep 1000 & echo \\$! > below; echo ready; wait\" &
                 wait' &",
        )
        .await;
    assert_eq!(agent.cancelled(turn, Vec::new()).await, 1);
    assert!(!lives(&vm, "shell").await);
    for name in ["left", "detached", "below"] {
        assert!(lives(&vm, name).await, "{name}");
    }
    agent.still_works().await;
    vm.shutdown().await;
}

#[tokio::test]
async fn what_ran_before_the_turn_lives() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let mut agent = Agent::start(&vm).await;
    agent
        .does(
            "sleep 1000 & echo $! > plain
             setsid sh -c 'sleep 1000 & echo $! > below; echo ready; wait' &
             echo $! > session",
        )
        .await;
    let turn = next_tick(&vm).await;
    agent.does("sleep 1000 & echo $! > new; echo ready").await;
    assert_eq!(agent.cancelled(turn, Vec::new()).await, 1);
    assert!(!lives(&vm, "new").await);
    for name in ["plain", "session", "below"] {
        assert!(lives(&vm, name).await, "{name}");
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn a_command_in_a_shell_that_the_agent_keeps_dies_and_the_shell_lives() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let mut agent = Agent::start(&vm).await;
    agent
        .does("mkfifo orders; setsid sh -c 'echo $$ > shell; echo ready; while :; do . ./orders; done' &")
        .await;
    let turn = next_tick(&vm).await;
    let order = "sh -c \"echo \\$\\$ > command; echo ready; sleep 1000; true\"";
    agent.does(&format!("echo '{order}' > orders")).await;
    assert!(agent.cancelled(turn, Vec::new()).await >= 1);
    assert!(!lives(&vm, "command").await);
    assert!(lives(&vm, "shell").await);
    agent.does("echo 'echo ready' > orders").await;
    vm.shutdown().await;
}

#[tokio::test]
async fn an_mcp_server_that_started_in_the_turn_lives() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let mut agent = Agent::start(&vm).await;
    stdout(
        &vm,
        "echo 'sleep 1000 & echo $! > worker; echo ready; wait' > server.sh",
    )
    .await;
    let turn = vm.now();
    agent.does("sh server.sh --stdio & echo $! > server").await;
    agent
        .does("sleep 1000 & echo $! > command; echo ready")
        .await;
    let server = ["/bin/sh", "server.sh", "--stdio"].map(str::to_owned);
    assert_eq!(agent.cancelled(turn, vec![server.to_vec()]).await, 1);
    assert!(!lives(&vm, "command").await);
    for name in ["server", "worker"] {
        assert!(lives(&vm, name).await, "{name}");
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn commands_that_keep_starting_others_leave_none() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let mut agent = Agent::start(&vm).await;
    let turn = vm.now();
    agent
        .does(
            "for n in 1 2 3; do
                 setsid sh -c 'while :; do sh -c \"sleep 1000 & sleep 1000 & wait\" & sleep 0.001; done' &
             done
             echo ready",
        )
        .await;
    stdout(&vm, "until [ $(pgrep -cx sleep) -ge 60 ]; do :; done").await;
    let killed = agent.cancelled(turn, Vec::new()).await;
    assert!(killed > 60, "{killed}");
    let left = "ps -e -o stat= -o args= | grep '^[^Z].*sleep' | grep -v grep";
    let left = sh(&vm, left).await.stdout;
    assert_eq!(String::from_utf8_lossy(&left), "");
    agent.still_works().await;
    vm.shutdown().await;
}

#[tokio::test]
async fn what_the_agent_orphaned_when_it_obeyed_dies() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let mut agent = Agent::start(&vm).await;
    let turn = vm.now();
    agent
        .does("sh -c 'sleep 1000 & echo $! > command; echo ready; wait' & echo $! > shell")
        .await;
    let seen = vm.foreground(agent.pid, turn, Vec::new()).await.unwrap();
    assert_eq!(seen.len(), 2);
    agent.does("kill -9 $(cat shell); wait; echo ready").await;
    assert!(lives(&vm, "command").await);
    assert_eq!(
        vm.end_foreground(&seen, Extent::Foreground).await.unwrap(),
        1
    );
    assert!(!lives(&vm, "command").await);
    vm.shutdown().await;
}

#[tokio::test]
async fn the_turn_of_one_agent_is_not_that_of_another() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let (mut one, mut other) = (Agent::start(&vm).await, Agent::start(&vm).await);
    let turn = vm.now();
    one.does("sleep 1000 & echo $! > mine; echo ready").await;
    other
        .does("sleep 1000 & echo $! > theirs; echo ready")
        .await;
    assert_eq!(one.cancelled(turn, Vec::new()).await, 1);
    assert!(!lives(&vm, "mine").await);
    assert!(lives(&vm, "theirs").await);
    one.still_works().await;
    other.still_works().await;
    vm.shutdown().await;
}

#[tokio::test]
async fn an_agent_that_ignores_the_cancel_dies_with_its_commands() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let mut agent = Agent::start(&vm).await;
    let turn = vm.now();
    agent
        .does("setsid sh -c 'nohup sleep 1000 > /dev/null 2>&1 & echo $! > left'; echo ready")
        .await;
    // It goes on starting commands in sessions of their own.
    agent
        .does("echo ready; while :; do setsid sh -c 'sleep 1001; true' & sleep 0.001; done")
        .await;
    stdout(
        &vm,
        "until [ $(pgrep -cfx 'sleep 1001') -ge 20 ]; do :; done",
    )
    .await;
    let seen = vm.foreground(agent.pid, turn, Vec::new()).await.unwrap();
    let killed = vm.end_foreground(&seen, Extent::WithAgent).await.unwrap();
    assert!(killed >= 40, "{killed}");
    assert_eq!(exited(&mut agent.exit).await, Some(Exit::Signal(9)));
    let left = "ps -e -o stat= -o args= | grep '^[^Z].*sleep 1001' | grep -v grep";
    let left = sh(&vm, left).await.stdout;
    assert_eq!(String::from_utf8_lossy(&left), "");
    assert!(lives(&vm, "left").await);
    vm.shutdown().await;
}

#[tokio::test]
async fn an_agent_that_has_exited_has_no_foreground() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let mut agent = Agent::start(&vm).await;
    let turn = vm.now();
    agent
        .does("sleep 1000 & echo $! > command; echo ready")
        .await;
    let before = vm.foreground(agent.pid, turn, Vec::new()).await.unwrap();
    agent.does("echo ready; exit").await;
    exited(&mut agent.exit).await;
    let after = vm.foreground(agent.pid, turn, Vec::new()).await.unwrap();
    assert!(after.is_empty());
    assert_eq!(
        vm.end_foreground(&after, Extent::WithAgent).await.unwrap(),
        0
    );
    assert!(lives(&vm, "command").await);
    // What was seen while it lived is known.
    assert_eq!(
        vm.end_foreground(&before, Extent::WithAgent).await.unwrap(),
        1
    );
    assert!(!lives(&vm, "command").await);
    vm.shutdown().await;
}

//! VMs as a caller of the crate sees them.

use std::fs;
use std::future::poll_fn;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use agentvm::net::Policy;
use agentvm::vm::exec::{ExecEnd, ExecOptions, ExecOutput, exec};
use agentvm::vm::namespace::{BootOptions, boot};
use agentvm::vm::{DynVm, Exit, GuestPath, User, file};

use super::child::{block_on, in_child};

mod files;
mod foreground;
mod image;
mod mounts;
mod ports;

pub(super) fn options(data: &Path, name: &str) -> BootOptions {
    BootOptions {
        dir: data.join("vms").join(name),
        key: format!("[{name:?}]"),
        base_cache: data.join("base"),
        agents: data.join("agents"),
        policy: Arc::new(Policy::new(&[])),
        denials: None,
        limits: agentvm::vm::Limits::default(),
        mounts: Vec::new(),
        private: Vec::new(),
        image: None,
        secrets: agentvm::net::secrets::Secrets::default(),
    }
}

pub(super) async fn booted(data: &Path, name: &str) -> DynVm {
    boot(options(data, name)).await.unwrap().vm
}

pub(super) async fn sh(vm: &DynVm, command: &str) -> ExecOutput {
    match exec(vm, command, ExecOptions::default()).await.unwrap() {
        ExecEnd::Exited(output) => output,
        ExecEnd::TimedOut(_) => unreachable!("no time limit was given"),
    }
}

pub(super) async fn stdout(vm: &DynVm, command: &str) -> String {
    let output = sh(vm, command).await;
    assert_eq!(
        output.exit,
        Exit::Code(0),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn a_command_runs_as_user_in_its_home() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    assert_eq!(
        stdout(&vm, "id -un; pwd; hostname").await,
        "user\n/home/user\nagentvm\n"
    );
    vm.shutdown().await;
}

#[tokio::test]
async fn files_go_in_and_out_and_survive_a_shutdown() {
    let data = tempfile::tempdir().unwrap();
    let path = GuestPath::new("notes.txt").unwrap();
    let vm = booted(data.path(), "a").await;
    file::write(&*vm, &path, b"kept".to_vec(), User::User)
        .await
        .unwrap();
    assert_eq!(stdout(&vm, "stat -c '%U %a' notes.txt").await, "user 644\n");
    vm.shutdown().await;
    let vm = booted(data.path(), "a").await;
    assert_eq!(file::read(&*vm, &path, User::User).await.unwrap(), b"kept");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_missing_file_is_enoent() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let path = GuestPath::new("/home/user/none").unwrap();
    let error = agentvm::error::Error::from(file::read(&*vm, &path, User::User).await.unwrap_err());
    assert_eq!(error.code.as_str(), "ENOENT");
    assert!(error.message.contains("/home/user/none"), "{error}");
    vm.shutdown().await;
}

#[tokio::test]
async fn only_regular_files_are_handed_out() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    stdout(
        &vm,
        "mkfifo fifo; ln -s /proc/self/fd/4 magic; ln -s /dev/zero zero; \
         ln -s /proc/sys/kernel/hostname host",
    )
    .await;
    for name in ["fifo", "magic", "zero", "host", "/home/user"] {
        let path = GuestPath::new(name).unwrap();
        assert!(file::read(&*vm, &path, User::User).await.is_err(), "{name}");
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn an_exec_reports_output_exit_code_and_signal_apart() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let output = sh(&vm, "echo out; echo err >&2; exit 3").await;
    assert_eq!(output.stdout, b"out\n");
    assert_eq!(output.stderr, b"err\n");
    assert_eq!(output.exit, Exit::Code(3));
    assert_eq!(sh(&vm, "kill -9 $$").await.exit, Exit::Signal(9));
    vm.shutdown().await;
}

#[tokio::test]
async fn an_exec_returns_when_the_shell_exits_though_a_grandchild_keeps_its_pipe() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    assert_eq!(stdout(&vm, "sleep 1000 & echo done").await, "done\n");
    // The shell is gone before its child is a 'sleep': that one is waited for.
    let found = "until pgrep -x sleep > /dev/null; do :; done; echo alive";
    assert_eq!(stdout(&vm, found).await, "alive\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_time_limit_kills_the_whole_process_group() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let options = ExecOptions {
        timeout: Some(Duration::from_millis(50)),
        ..ExecOptions::default()
    };
    let end = exec(&vm, "echo early; sleep 1000 | sleep 1000", options)
        .await
        .unwrap();
    let ExecEnd::TimedOut(output) = end else {
        panic!("{end:?}")
    };
    assert_eq!(output.stdout, b"early\n");
    assert_eq!(sh(&vm, "pgrep sleep").await.exit, Exit::Code(1));
    vm.shutdown().await;
}

#[tokio::test]
async fn a_time_limit_kills_the_whole_session_but_not_what_was_detached() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let options = ExecOptions {
        timeout: Some(Duration::from_millis(500)),
        ..ExecOptions::default()
    };
    // timeout(1) makes a process group.
    let command = "setsid sleep 1001 & timeout 1002 sleep 1002 & sh -c 'sleep 1003; true'";
    let end = exec(&vm, command, options).await.unwrap();
    assert!(matches!(end, ExecEnd::TimedOut(_)), "{end:?}");
    // PID 1 reaps the orphans among the killed when it comes to it.
    stdout(
        &vm,
        "while pgrep -f 'sleep 100[23]' > /dev/null; do :; done",
    )
    .await;
    assert_eq!(stdout(&vm, "pgrep -cfx 'sleep 1001'").await, "1\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn who_traces_a_command_does_not_keep_it_from_ending() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let options = ExecOptions {
        timeout: Some(Duration::from_millis(500)),
        ..ExecOptions::default()
    };
    // PTRACE_SEIZE, after the command has let anybody trace it (PR_SET_PTRACER), where that is asked.
    let (ptrace, prctl) = (libc::SYS_ptrace, libc::SYS_prctl);
    let command = format!(
        "exec perl -MPOSIX -e 'my $traced = $$; syscall({prctl}, 0x59616d61, -1, 0, 0, 0);
         if (!fork) {{ setsid; syscall({ptrace}, 0x4206, $traced, 0, 0) == 0 or die \"$!\\n\";
             print \"traced\\n\"; close STDOUT; close STDERR; sleep 1000 }} sleep 1000'"
    );
    let ended = exec(&vm, &command, options);
    let ended = tokio::time::timeout(Duration::from_mins(1), ended).await;
    match ended.expect("an end").unwrap() {
        ExecEnd::TimedOut(output) => assert_eq!(output.stdout, b"traced\n", "{output:?}"),
        ExecEnd::Exited(output) => panic!("{output:?}"),
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn an_exec_that_is_given_up_before_it_hears_of_its_command_leaves_none() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let mut given_up = Box::pin(exec(&vm, "sleep 1000; true", ExecOptions::default()));
    // Once: it has asked for the command, and does not look for the answer.
    let polled = poll_fn(|context| Poll::Ready(given_up.as_mut().poll(context))).await;
    assert!(polled.is_pending(), "{polled:?}");
    stdout(&vm, "until pgrep -x sleep; do :; done").await;
    drop(given_up);
    stdout(&vm, "while pgrep -x sleep; do :; done").await;
    vm.shutdown().await;
}

#[tokio::test]
async fn two_vms_see_neither_each_other_nor_the_host() {
    let data = tempfile::tempdir().unwrap();
    let (a, b) = (
        booted(data.path(), "a").await,
        booted(data.path(), "b").await,
    );
    stdout(&a, "echo secret > only-a; sleep 1000 & true").await;
    assert_eq!(sh(&b, "cat only-a").await.exit, Exit::Code(1));
    assert_eq!(sh(&b, "pgrep sleep").await.exit, Exit::Code(1));
    let mine = data.path().to_str().unwrap();
    assert_eq!(sh(&b, &format!("ls {mine}")).await.exit, Exit::Code(2));
    let programs = stdout(&b, "cat /proc/[0-9]*/comm; true").await;
    let own = ["agentvm-guest", "sh", "cat"];
    assert!(
        programs.lines().all(|name| own.contains(&name)),
        "{programs}"
    );
    a.shutdown().await;
    b.shutdown().await;
}

#[tokio::test]
async fn a_vm_is_open_once_and_free_again_after_shutdown() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let error = boot(options(data.path(), "a")).await.err().unwrap();
    let error = agentvm::error::Error::from(error);
    assert_eq!(error.code.as_str(), "VM_BUSY", "{error}");
    assert!(
        error.message.contains(&std::process::id().to_string()),
        "{error}"
    );
    vm.shutdown().await;
    booted(data.path(), "a").await.shutdown().await;
}

#[tokio::test]
async fn a_data_directory_that_others_can_change_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let refused = || async {
        let error = boot(options(data.path(), "a")).await.err().unwrap();
        let error = agentvm::error::Error::from(error);
        assert_eq!(error.code.as_str(), "EACCES", "{error}");
        assert!(error.message.contains("dataDir"), "{error}");
    };
    let mode = |mode| fs::set_permissions(data.path(), fs::Permissions::from_mode(mode)).unwrap();
    mode(0o777);
    refused().await;
    mode(0o775);
    // What others had put there while they could.
    let elsewhere = tempfile::tempdir().unwrap();
    let vms = data.path().join("vms");
    fs::remove_dir_all(&vms).unwrap();
    symlink(elsewhere.path(), &vms).unwrap();
    refused().await;
    fs::remove_file(&vms).unwrap();
    if nix::unistd::geteuid().is_root() {
        chown(data.path(), Some(1), None).unwrap();
        refused().await;
        chown(data.path(), Some(0), None).unwrap();
    }
    booted(data.path(), "a").await.shutdown().await;
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
}

#[test]
fn a_process_without_core_files_has_vms() {
    in_child(
        &["prlimit", "--core=0:0"],
        "vm::a_process_without_core_files_has_vms",
        || {
            block_on(async {
                let data = tempfile::tempdir().unwrap();
                let vm = booted(data.path(), "a").await;
                assert_eq!(stdout(&vm, "ulimit -H -c").await, "0\n");
                vm.shutdown().await;
            });
        },
    );
}

#[tokio::test]
async fn a_program_that_can_not_start_yet_keeps_nobody_waiting() {
    // From fcntl(2).
    const LEASE: &str = "open my $f, '+<', 'program'; fcntl $f, 1024, 1 or die $!; \
        $SIG{IO} = 'IGNORE'; open my $r, '>', 'ready'; sleep 1 until -e 'enough'";
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    stdout(
        &vm,
        "printf '#!/bin/sh\\necho ran\\n' > program; chmod +x program",
    )
    .await;
    let hold = format!(
        "perl -e \"{}\" & until test -e ready; do :; done",
        LEASE.replace('$', "\\$")
    );
    stdout(&vm, &hold).await;
    let command = agentvm::vm::Command {
        argv: vec!["/home/user/program".to_owned()],
        env: Vec::new(),
        cwd: GuestPath::home(),
        user: User::User,
    };
    // Until the lease is given back, or the kernel takes it.
    let mut starting = Box::pin(vm.spawn(&command));
    let others = async {
        assert_eq!(stdout(&vm, "echo alive").await, "alive\n");
        let path = GuestPath::new("ready").unwrap();
        vm.stat(&path, true, User::User).await.unwrap();
    };
    tokio::select! {
        biased;
        _ = &mut starting => panic!("it has started"),
        () = others => {}
    }
    stdout(&vm, "touch enough").await;
    let mut process = starting.await.unwrap();
    assert_eq!(
        agentvm::vm::exited(&mut process.exit).await,
        Some(Exit::Code(0))
    );
    // Given up before it has started, it is killed when it does.
    stdout(&vm, &format!("rm enough ready; {hold}")).await;
    let waited = tokio::time::timeout(Duration::from_millis(100), vm.spawn(&command)).await;
    assert!(waited.is_err(), "it has started");
    stdout(&vm, "touch enough; while pgrep program; do :; done").await;
    vm.shutdown().await;
}

#[tokio::test]
async fn a_program_that_has_lost_its_first_thread_can_be_killed() {
    // pthread_exit(3) of the first thread, which is a zombie then as long as there is another.
    const PROGRAM: &str = r#"use threads; use Config;
        threads->create(sub { open my $ready, ">", "ready"; sleep 1000 })->detach;
        select undef, undef, undef, 0.01 until -e "ready";
        syscall $Config{archname} =~ /aarch64/ ? 93 : 60, 0;"#;
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let command = agentvm::vm::Command {
        argv: ["perl", "-e", PROGRAM].map(str::to_owned).to_vec(),
        env: vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
        cwd: GuestPath::home(),
        user: User::User,
    };
    let mut process = vm.spawn(&command).await.unwrap();
    let zombie = format!(
        "until grep -q '^State:.Z' /proc/{}/status; do :; done",
        process.pid
    );
    stdout(&vm, &zombie).await;
    vm.kill(process.pid).await.unwrap();
    let exit = tokio::time::timeout(
        Duration::from_secs(30),
        agentvm::vm::exited(&mut process.exit),
    );
    assert_eq!(exit.await.unwrap(), Some(Exit::Signal(9)));
    vm.shutdown().await;
}

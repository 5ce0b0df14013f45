//! What a VM may take of the host, and what happens when it takes more.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use agentvm::error::Error;
use agentvm::vm::exec::{ExecEnd, ExecOptions, exec};
use agentvm::vm::limits::{InForce, Mechanism};
use agentvm::vm::namespace::{boot, disk_usage};
use agentvm::vm::{DynVm, Exit, Limit, Limits, User};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use tokio::time::timeout;

use super::child::{block_on, in_child};
use super::death::pid_1;
use super::isolation::{sh_as, users};
use super::vm::{booted, options, sh, stdout};

const LONG: Duration = Duration::from_mins(1);

async fn limited(data: &Path, name: &str, limits: Limits) -> DynVm {
    let mut options = options(data, name);
    options.limits = limits;
    boot(options).await.unwrap().vm
}

/// Whether this process may make cgroups. Elsewhere nothing here can be tested but the refusal.
pub(super) fn has_cgroups() -> bool {
    nix::unistd::geteuid().is_root() && Path::new("/sys/fs/cgroup/memory/cgroup.procs").exists()
}

fn in_force(vm: &DynVm, limit: Limit) -> InForce {
    *vm.limits().iter().find(|own| own.limit == limit).unwrap()
}

async fn fails(vm: &DynVm, command: &str) -> Error {
    let ended = timeout(LONG, exec(vm, command, ExecOptions::default())).await;
    ended.unwrap().unwrap_err().into()
}

/// cgroups of VMs of this process.
pub(super) fn cgroups() -> Vec<String> {
    let own = format!("-{}-", std::process::id());
    let mut found = Vec::new();
    let mut directories = vec![Path::new("/sys/fs/cgroup").to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name().into_string().unwrap();
            if name.starts_with("agentvm-") && name.contains(&own) {
                found.push(entry.path().display().to_string());
            } else if entry.file_type().unwrap().is_dir() {
                directories.push(entry.path());
            }
        }
    }
    found
}

#[tokio::test]
async fn a_command_that_needs_too_much_memory_is_killed_and_says_why() {
    if !has_cgroups() {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    let limits = Limits {
        memory_bytes: Some(64 << 20),
        ..Limits::default()
    };
    let vm = limited(data.path(), "a", limits).await;
    let other = booted(data.path(), "b").await;
    let mut reached = vm.watch_limits();
    assert_eq!(in_force(&vm, Limit::Memory).mechanism, Mechanism::Cgroup1);
    let error = fails(&vm, "echo begun; tail /dev/zero").await;
    assert_eq!(error.code.as_str(), "VM_LIMIT", "{error}");
    assert!(error.message.contains("memoryBytes (67108864)"), "{error}");
    assert_eq!(error.data.unwrap()["stdout"], "begun\n");
    timeout(LONG, reached.wait_for(|reached| reached.memory > 0))
        .await
        .unwrap()
        .unwrap();
    // This VM goes on, and the other one has not noticed.
    assert_eq!(stdout(&vm, "echo alive").await, "alive\n");
    assert_eq!(other.reached().memory, 0);
    assert_eq!(stdout(&other, "echo alive").await, "alive\n");
    vm.shutdown().await;
    other.shutdown().await;
}

#[tokio::test]
async fn a_command_that_is_killed_for_something_else_is_not_blamed_on_a_limit() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    assert_eq!(
        sh(&vm, "kill -KILL $$").await.exit,
        Exit::Signal(libc::SIGKILL)
    );
    vm.shutdown().await;
}

#[tokio::test]
async fn memory_in_tmp_counts() {
    if !has_cgroups() {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    let limits = Limits {
        memory_bytes: Some(64 << 20),
        ..Limits::default()
    };
    let vm = limited(data.path(), "a", limits).await;
    let large = "exec perl -e 'my $x; read STDIN, $x, 45 << 20' < /dev/zero";
    assert_eq!(sh(&vm, large).await.exit, Exit::Code(0));
    // Of which it takes half.
    let full = "head -c 200M /dev/zero > /tmp/file";
    assert_eq!(sh(&vm, full).await.exit, Exit::Code(1));
    let error = fails(&vm, large).await;
    assert_eq!(error.code.as_str(), "VM_LIMIT", "{error}");
    vm.shutdown().await;
}

#[tokio::test]
async fn half_a_cpu_is_half_a_second_of_each() {
    if !has_cgroups() {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    let limits = Limits {
        milli_cpus: Some(500),
        ..Limits::default()
    };
    let vm = limited(data.path(), "a", limits).await;
    let (before, began) = (vm.usage().await.unwrap(), std::time::Instant::now());
    // Two that would take two CPUs.
    let output = sh(
        &vm,
        "for i in 1 2; do timeout 1 sh -c 'while :; do :; done' & done; wait",
    );
    output.await;
    let took = began.elapsed().as_millis();
    let used = u128::from(vm.usage().await.unwrap().cpu_ms - before.cpu_ms);
    // A busy machine gives less; a period's quota may be had in advance.
    assert!(used <= took / 2 + 150, "{used} ms in {took} ms");
    vm.shutdown().await;
}

const BOMB: &str = "bash -c ':(){ :|:& };:'";

async fn survives_a_bomb(limits: Limits, mechanism: Mechanism) {
    let data = tempfile::tempdir().unwrap();
    let vm = limited(data.path(), "a", limits).await;
    let other = booted(data.path(), "b").await;
    assert_eq!(in_force(&vm, Limit::Pids).mechanism, mechanism);
    let most = in_force(&vm, Limit::Pids).value.unwrap();
    // 254: the bomb's first process itself was refused another.
    let exit = sh(&vm, BOMB).await.exit;
    assert!(matches!(exit, Exit::Code(0 | 254)), "{exit:?}");
    for _ in 0..20 {
        // It works, or says what is in its way.
        match timeout(LONG, exec(&vm, "echo alive", ExecOptions::default()))
            .await
            .unwrap()
        {
            Ok(ExecEnd::Exited(_)) => {}
            Ok(ended) => panic!("{ended:?}"),
            Err(error) => {
                let error = Error::from(error);
                assert_eq!(error.code.as_str(), "VM_LIMIT", "{error}");
                assert!(error.message.contains("pids ("), "{error}");
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "small")]
        let pids = vm.usage().await.unwrap().pids as f64;
        // Read from /proc one by one, while others come and go: not what there was at any moment.
        assert!(pids <= most.mul_add(2.0, 40.0), "{pids} processes");
        timeout(LONG, vm.processes()).await.unwrap().unwrap();
    }
    assert_eq!(stdout(&other, "echo alive").await, "alive\n");
    timeout(LONG, vm.shutdown()).await.unwrap();
    other.shutdown().await;
    // It boots again.
    let vm = booted(data.path(), "a").await;
    assert_eq!(stdout(&vm, "echo alive").await, "alive\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn what_is_told_from_work_as_a_fork_bomb_is_ended() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let mut reached = vm.watch_limits();
    // Many processes, and a steady stream of orphans.
    let bomb = "for i in $(seq 300); do sleep 1000 & done
        for i in 1 2 3; do while :; do (: &); done & done
        while :; do (: &); done";
    let error = fails(&vm, bomb).await;
    assert_eq!(error.code.as_str(), "VM_LIMIT", "{error}");
    assert!(error.message.contains("pids (4096)"), "{error}");
    assert!(error.message.contains("fork bomb"), "{error}");
    assert!(reached.borrow_and_update().fork_bombs > 0);
    // It goes on, with nothing of that left as soon as all are reaped.
    timeout(LONG, async {
        while vm.usage().await.unwrap().pids > 1 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert_eq!(stdout(&vm, "echo alive").await, "alive\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn what_runs_is_listed_where_nothing_more_can_be_started() {
    let data = tempfile::tempdir().unwrap();
    let limits = Limits {
        pids: Some(20),
        ..Limits::default()
    };
    let vm = limited(data.path(), "a", limits).await;
    // The shell ends when it can't fork.
    let filled = sh(&vm, "for i in $(seq 30); do sleep 1000 & done").await;
    assert_eq!(filled.exit, Exit::Code(2), "{filled:?}");
    let listed = vm.processes().await.unwrap();
    let sleeps = listed
        .iter()
        .filter(|process| process.command.iter().any(|word| word.contains("sleep")));
    assert!(sleeps.count() >= 15, "{listed:?}");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_fork_bomb_is_contained_by_the_default() {
    survives_a_bomb(Limits::default(), Mechanism::Rlimit).await;
}

#[test]
fn who_does_not_kill_what_is_over_a_limit_ends_with_it() {
    const TEST: &str = "limits::who_does_not_kill_what_is_over_a_limit_ends_with_it";
    in_child(&[], TEST, || {
        block_on(async {
            let data = tempfile::tempdir().unwrap();
            let limits = Limits {
                disk_bytes: Some(64 << 20),
                ..Limits::default()
            };
            let vm = limited(data.path(), "a", limits).await;
            let write = "(until [ -e go ]; do sleep 0.01; done
                head -c 100000000 /dev/zero > much; sleep 1000) > /dev/null 2>&1 & touch go";
            stdout(&vm, write).await;
            kill(pid_1(), Signal::SIGSTOP).unwrap();
            let mut ended = vm.ended();
            let end = timeout(LONG, ended.wait_for(Option::is_some)).await;
            let end = format!("{:?}", *end.expect("an end").unwrap());
            assert!(end.contains("a limit was met"), "{end}");
        });
    });
}

/// As in a container, where root's processes are counted by no kernel.
#[test]
fn a_limit_of_processes_that_does_not_hold_for_root_is_not_told_as_one() {
    const TEST: &str =
        "limits::a_limit_of_processes_that_does_not_hold_for_root_is_not_told_as_one";
    if !nix::unistd::geteuid().is_root() {
        return; // An ordinary user's processes are counted.
    }
    let without_range = [
        "setpriv",
        "--bounding-set=-sys_admin",
        "--inh-caps=-sys_admin",
    ];
    in_child(&without_range, TEST, || {
        block_on(async {
            let data = tempfile::tempdir().unwrap();
            let vm = booted(data.path(), "a").await;
            assert_eq!(
                stdout(&vm, "cat /proc/self/uid_map | xargs").await,
                "1000 0 1\n"
            );
            assert_eq!(in_force(&vm, Limit::Pids).mechanism, Mechanism::None);
            vm.shutdown().await;
        });
    });
}

#[tokio::test]
async fn a_fork_bomb_is_contained_by_a_limit_of_all_users() {
    let limits = Limits {
        pids: Some(100),
        ..Limits::default()
    };
    let mechanism = if has_cgroups() {
        Mechanism::Cgroup1
    } else {
        Mechanism::Rlimit
    };
    survives_a_bomb(limits, mechanism).await;
}

#[tokio::test]
async fn a_limit_that_this_host_cant_enforce_is_refused_by_name_unless_best_effort_will_do() {
    if has_cgroups() {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    let mut options = options(data.path(), "a");
    options.limits.memory_bytes = Some(64 << 20);
    let error = Error::from(boot(options.clone()).await.err().unwrap());
    assert_eq!(error.code.as_str(), "VM_UNSUPPORTED");
    assert!(error.message.starts_with("limits.memoryBytes "), "{error}");
    assert!(error.message.contains("Delegate=yes"), "{error}");
    options.limits.best_effort = true;
    let vm: DynVm = boot(options).await.unwrap().vm;
    assert_eq!(in_force(&vm, Limit::Memory).mechanism, Mechanism::None);
    assert_eq!(stdout(&vm, "echo alive").await, "alive\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_process_may_open_as_many_files_as_it_is_given() {
    let data = tempfile::tempdir().unwrap();
    let limits = Limits {
        open_files: Some(100),
        ..Limits::default()
    };
    let vm = limited(data.path(), "a", limits).await;
    assert_eq!(stdout(&vm, "ulimit -Sn; ulimit -Hn").await, "100\n100\n");
    vm.shutdown().await;
}

#[test]
fn what_the_host_process_has_before_others_its_vms_do_not() {
    let test = "limits::what_the_host_process_has_before_others_its_vms_do_not";
    in_child(&[], test, || {
        block_on(async {
            // As who may: an ordinary user has no more than it was given.
            for resource in [Resource::RLIMIT_NICE, Resource::RLIMIT_RTPRIO] {
                let _ = setrlimit(resource, 30, 30);
            }
            let _ = fs::write("/proc/self/oom_score_adj", "-500");
            let data = tempfile::tempdir().unwrap();
            let vm = booted(data.path(), "a").await;
            for user in users() {
                let limits = "awk '/nice|realtime prio/ { print $4, $5 }' /proc/self/limits";
                let output = sh_as(&vm, user, limits).await;
                assert_eq!(output.stdout, b"0 0\n0 0\n", "{user:?}");
                let output = sh_as(&vm, user, "chrt -f 1 true").await;
                assert_ne!(output.exit, Exit::Code(0), "{user:?}");
                let adjusted = "cat /proc/self/oom_score_adj; echo -1 > /proc/self/oom_score_adj";
                let output = sh_as(&vm, user, adjusted).await;
                let score = String::from_utf8(output.stdout).unwrap();
                assert!(!score.starts_with('-'), "{score}");
                assert_ne!(output.exit, Exit::Code(0), "{user:?}");
            }
            vm.shutdown().await;
        });
    });
}

#[tokio::test]
async fn what_the_kernel_counts_per_user_of_the_host_is_capped_for_each_vm() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    for what in ["instances", "watches"] {
        let hosts = fs::read_to_string(format!("/proc/sys/fs/inotify/max_user_{what}")).unwrap();
        let hosts: u64 = hosts.trim().parse().unwrap();
        let own = stdout(&vm, &format!("cat /proc/sys/user/max_inotify_{what}")).await;
        assert_eq!(
            own.trim().parse::<u64>().unwrap(),
            (hosts / 4).max(16),
            "{what}"
        );
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn who_takes_all_terminals_takes_those_of_one_vm() {
    const TAKE: &str = r"
        my @taken;
        while (open(my $terminal, q(+<), q(/dev/ptmx))) { push @taken, $terminal }
        $| = 1;
        print scalar(@taken), qq( $!\n);
        sleep 1000";
    let data = tempfile::tempdir().unwrap();
    let (vm, other) = (
        booted(data.path(), "a").await,
        booted(data.path(), "b").await,
    );
    let take = format!("perl -e '{TAKE}' > taken & until [ -s taken ]; do sleep 0.01; done");
    stdout(&vm, &take).await;
    let taken = stdout(&vm, "cat taken").await;
    assert_eq!(taken, "256 No space left on device\n");
    stdout(&other, "exec 3<> /dev/ptmx").await;
    let mut ptmx = fs::File::options();
    ptmx.read(true).write(true).open("/dev/ptmx").unwrap();
    vm.shutdown().await;
    other.shutdown().await;
}

/// How many of a kind can be made until there is no room for another one.
async fn takes_all(vm: &DynVm, user: User, call: &str) -> usize {
    // Of 100,000, none is bounded.
    let take = format!("perl -e 'my $i = 0; $i++ while $i < 1e5 && {call} >= 0; print qq($i $!)'");
    let output = sh_as(vm, user, &take).await;
    let taken = String::from_utf8(output.stdout).unwrap();
    let (count, error) = taken.split_once(' ').unwrap();
    assert_eq!(error, "No space left on device", "{call}: {taken}");
    count.parse().unwrap()
}

/// Only as root: these are for the root of the VM's user namespace to set, and an ordinary user's has none.
#[tokio::test]
async fn what_system_v_keeps_in_memory_is_bounded() {
    let user = User::Root;
    if !users().contains(&user) {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    let (vm, other) = (
        booted(data.path(), "a").await,
        booted(data.path(), "b").await,
    );
    let system_v = |number, size| format!("syscall({number}, 0, {size}0600)");
    for (call, all) in [
        (system_v(libc::SYS_shmget, "67108864, "), 16),
        (system_v(libc::SYS_msgget, ""), 1024),
        (system_v(libc::SYS_semget, "100, "), 320),
    ] {
        assert_eq!(takes_all(&vm, user, &call).await, all, "{call}");
        // They outlive who has made them, and are that VM's.
        assert_eq!(takes_all(&vm, user, &call).await, 0, "{call}");
        assert_eq!(takes_all(&other, user, &call).await, all, "{call}");
    }
    vm.shutdown().await;
    other.shutdown().await;
}

#[tokio::test]
async fn files_without_content_end_where_memory_is_theirs() {
    const FILL: &str = r#"
        for (my $i = 0; open(my $file, ">", "/dev/shm/$i"); $i++) {}
        print "$!\n""#;
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let full = stdout(&vm, &format!("perl -e '{FILL}'; ls -U /dev/shm | wc -l")).await;
    // The directory is one.
    assert_eq!(full, "No space left on device\n65535\n");
    let bounds = stdout(&vm, "df --output=itotal /tmp /run /dev | tail -n 3").await;
    for bound in bounds.split_whitespace() {
        let most = 1 << 20;
        assert!(
            (1..=most).contains(&bound.parse::<u64>().unwrap()),
            "{bounds}"
        );
    }
    vm.shutdown().await;
}

/// A VM is started by a thread that is another user for the moment.
#[test]
fn starting_a_vm_leaves_the_host_process_as_it_was() {
    let test = "limits::starting_a_vm_leaves_the_host_process_as_it_was";
    in_child(&[], test, || {
        let before = identities();
        block_on(async {
            let data = tempfile::tempdir().unwrap();
            let vm = booted(data.path(), "a").await;
            assert_eq!(identities(), before);
            let starter = threads().find(|(name, _)| name == "agentvm-starter");
            let blocked = line_of(&starter.unwrap().1, "SigBlk:");
            assert_eq!(blocked, Some("0000000000000000".to_owned()));
            vm.shutdown().await;
        });
    });
}

/// Who the threads of this process are, and whether its memory may be dumped.
fn identities() -> (BTreeSet<String>, i32) {
    const LINES: [&str; 5] = ["Uid:", "Gid:", "CapPrm:", "CapEff:", "CapBnd:"];
    let identity = |(_, status): (String, String)| {
        let lines = LINES.map(|name| line_of(&status, name).unwrap());
        lines.join(" ")
    };
    let of_threads = threads().map(identity).collect();
    // SAFETY: no pointers.
    (of_threads, unsafe { libc::prctl(libc::PR_GET_DUMPABLE) })
}

/// Name and status of each thread of this process that has not ended meanwhile.
fn threads() -> impl Iterator<Item = (String, String)> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    tasks.filter_map(|task| {
        let status = fs::read_to_string(task.unwrap().path().join("status")).ok()?;
        Some((line_of(&status, "Name:")?, status))
    })
}

fn line_of(status: &str, name: &str) -> Option<String> {
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(value.trim().to_owned())
}

#[tokio::test]
async fn a_vm_sees_its_cgroup_as_the_root_and_leaves_none_behind() {
    if !has_cgroups() {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    let limits = Limits {
        memory_bytes: Some(256 << 20),
        ..Limits::default()
    };
    let vm = limited(data.path(), "a", limits).await;
    assert!(!cgroups().is_empty());
    let cgroup = stdout(&vm, "grep -E ':(memory|pids):' /proc/self/cgroup").await;
    assert!(cgroup.lines().all(|line| line.ends_with(":/")), "{cgroup}");
    vm.shutdown().await;
    assert_eq!(cgroups(), [] as [String; 0]);
}

#[tokio::test]
async fn what_writes_too_much_is_killed_and_the_vm_goes_on() {
    let data = tempfile::tempdir().unwrap();
    let limits = Limits {
        disk_bytes: Some(20 << 20),
        ..Limits::default()
    };
    let vm = limited(data.path(), "a", limits).await;
    assert_eq!(in_force(&vm, Limit::Disk).mechanism, Mechanism::Polled);
    let error = fails(&vm, "head -c 40M /dev/zero > file; sleep 1000").await;
    assert_eq!(error.code.as_str(), "VM_LIMIT", "{error}");
    assert!(error.message.contains("diskBytes (20971520)"), "{error}");
    // What is too much can be deleted.
    assert_eq!(stdout(&vm, "rm file; echo gone").await, "gone\n");
    assert!(disk_usage(&data.path().join("vms/a")).await.unwrap() < 20 << 20);
    vm.shutdown().await;
}

#[tokio::test]
async fn usage_tells_what_runs() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let idle = vm.usage().await.unwrap();
    assert_eq!(idle.pids, 1);
    assert_eq!(idle.counted_by, None);
    sh(
        &vm,
        "sleep 1000 & i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done",
    )
    .await;
    let busy = vm.usage().await.unwrap();
    assert_eq!(busy.pids, 2);
    assert!(busy.cpu_ms > idle.cpu_ms, "{busy:?}");
    assert!(busy.memory_bytes > idle.memory_bytes, "{busy:?}");
    assert!(busy.uptime_ms >= idle.uptime_ms);
    vm.shutdown().await;
}

/// A boot that fails after the VM's PID 1 has been started: its directory is not usable.
#[tokio::test]
async fn a_boot_that_fails_half_way_leaves_nothing_of_its_limits() {
    let data = tempfile::tempdir().unwrap();
    let mut options = options(data.path(), "a");
    options.limits.memory_bytes = Some(64 << 20);
    options.limits.best_effort = true;
    // Where its directories belong.
    fs::create_dir_all(&options.dir).unwrap();
    fs::write(options.dir.join("home"), "").unwrap();
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    // The first attempt opens what the process keeps for all VMs.
    assert!(boot(options.clone()).await.is_err());
    let before = descriptors();
    for _ in 0..3 {
        assert!(boot(options.clone()).await.is_err());
    }
    assert_eq!(descriptors(), before);
    assert_eq!(cgroups(), [] as [String; 0]);
    fs::remove_file(options.dir.join("home")).unwrap();
    fs::create_dir(options.dir.join("home")).unwrap();
    let vm: DynVm = boot(options).await.unwrap().vm;
    assert_eq!(stdout(&vm, "echo alive").await, "alive\n");
    vm.shutdown().await;
    assert_eq!(cgroups(), [] as [String; 0]);
}

#[tokio::test]
async fn a_hundred_vms_run_at_once_and_leave_nothing_behind() {
    let data = tempfile::tempdir().unwrap();
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    booted(data.path(), "first").await.shutdown().await;
    let before = descriptors();
    let mut booting = tokio::task::JoinSet::new();
    for number in 0..100 {
        let options = options(data.path(), &number.to_string());
        booting.spawn(async move { boot(options).await.unwrap().vm as DynVm });
    }
    let vms = booting.join_all().await;
    for vm in &vms {
        assert_eq!(vm.usage().await.unwrap().pids, 1);
    }
    let mut ending = tokio::task::JoinSet::new();
    for vm in vms {
        ending.spawn(async move { vm.shutdown().await });
    }
    ending.join_all().await;
    // What a VM's network and control had is closed by other threads.
    let closed = async {
        while descriptors() != before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let closed = tokio::time::timeout(Duration::from_secs(30), closed).await;
    assert!(closed.is_ok(), "{} of {before} descriptors", descriptors());
}

//! A host that runs out of something, at every step in turn: the call says of what, nothing is left of
//! it, and all goes on when there is enough again.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use agentvm::error::{Code, Error};
use agentvm::vm::exec::{ExecOptions, exec};
use agentvm::vm::namespace::{boot, delete};
use agentvm::vm::{DynVm, GuestPath, User, Vm as _, VmError, file};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::child::{block_on, in_child, unshare};
use super::vm::{booted, options, stdout};

/// Generous: it takes milliseconds.
const SOON: Duration = Duration::from_secs(20);

/// More steps than anything here has that could fail.
const STEPS: u64 = 200;

/// What this process holds of the host.
#[derive(Debug)]
struct Held {
    descriptors: usize,
    children: Vec<String>,
    mounts: usize,
}

fn held() -> Held {
    Held {
        descriptors: fs::read_dir("/proc/self/fd").unwrap().count(),
        children: children(),
        mounts: fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .count(),
    }
}

fn children() -> Vec<String> {
    fs::read_dir("/proc/self/task")
        .unwrap()
        // A thread may end while we look.
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok())
        .flat_map(|children| {
            let children: Vec<_> = children.split_whitespace().map(str::to_owned).collect();
            children
        })
        .collect()
}

/// Waits for what ends beside the call that has failed.
async fn settles(before: &Held) {
    let deadline = Instant::now() + SOON;
    loop {
        let now = held();
        // Fewer: something of an earlier VM was still ending then.
        let fewer = now.descriptors <= before.descriptors;
        if fewer && now.children == before.children && now.mounts == before.mounts {
            return;
        }
        assert!(Instant::now() < deadline, "{now:?}, not {before:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Lets this process open so many files more. The kernel hands out the lowest numbers, and refuses those
/// from the limit on.
fn room_for(more: u64) {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let listed: Vec<u64> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .parse()
                .unwrap()
        })
        .collect();
    // Without the one that was for the list.
    let open: BTreeSet<u64> = listed
        .into_iter()
        .filter(|number| fs::read_link(format!("/proc/self/fd/{number}")).is_ok())
        .collect();
    let mut free = (0..).filter(|number| !open.contains(number));
    let limit = free.nth(usize::try_from(more).unwrap()).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
}

fn room_for_all() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 16), hard).unwrap();
}

fn assert_no_room(error: VmError, at: u64) {
    let error = Error::from(error);
    assert_eq!(error.code.as_str(), "EMFILE", "at {at}: {error}");
    assert!(error.message.contains("ulimit -n"), "at {at}: {error}");
}

#[test]
fn a_boot_that_finds_no_room_for_a_descriptor_at_any_step_leaves_nothing() {
    const TEST: &str =
        "faults::a_boot_that_finds_no_room_for_a_descriptor_at_any_step_leaves_nothing";
    in_child(&[], TEST, || {
        block_on(async {
            let data = tempfile::tempdir().unwrap();
            let mut failed = 0;
            for more in 0..STEPS {
                // Twice: the first attempt may open what the process keeps for all VMs.
                let mut before = held();
                let mut booted = None;
                for attempt in 0..2 {
                    room_for(more);
                    let result = boot(options(data.path(), "a")).await;
                    room_for_all();
                    match result {
                        Ok(vm) => booted = Some(vm.vm),
                        Err(error) => assert_no_room(error, more),
                    }
                    if booted.is_some() {
                        break;
                    }
                    failed += 1;
                    assert_eq!(held().children, before.children, "at {more}");
                    if attempt == 0 {
                        before = held();
                    } else {
                        settles(&before).await;
                    }
                }
                if let Some(vm) = booted {
                    let vm: DynVm = vm;
                    assert_eq!(stdout(&vm, "echo works").await, "works\n");
                    vm.shutdown().await;
                    assert!(failed > 10, "{failed}");
                    return;
                }
            }
            panic!("{STEPS} descriptors are not enough for a boot");
        });
    });
}

#[test]
fn calls_that_find_no_room_for_a_descriptor_leave_the_vm_and_what_runs_in_it() {
    const TEST: &str =
        "faults::calls_that_find_no_room_for_a_descriptor_leave_the_vm_and_what_runs_in_it";
    in_child(&[], TEST, || {
        block_on(async {
            let data = tempfile::tempdir().unwrap();
            let vm = booted(data.path(), "a").await;
            let begun = "echo content > file; setsid sleep 1000 & until pgrep sleep; do :; done";
            stdout(&vm, begun).await;
            let path = GuestPath::new("file").unwrap();
            assert_eq!(
                file::read(&*vm, &path, User::User).await.unwrap(),
                b"content\n"
            );
            let before = held();
            let (mut reads, mut execs) = (0, 0);
            for more in 0..STEPS {
                room_for(more);
                let read = file::read(&*vm, &path, User::User).await;
                let ran = exec(&vm, "true", ExecOptions::default()).await;
                room_for_all();
                let done = read.is_ok() && ran.is_ok();
                if let Err(error) = read {
                    assert_no_room(error, more);
                    reads += 1;
                }
                if let Err(error) = ran {
                    assert_no_room(error, more);
                    execs += 1;
                }
                settles(&before).await;
                if done {
                    break;
                }
            }
            assert!(reads > 0 && execs > 4, "{reads}, {execs}");
            assert_eq!(stdout(&vm, "pgrep -c sleep").await, "1\n");
            vm.shutdown().await;
        });
    });
}

/// A file system of its own of so many MiB, in this process's mount namespace.
fn small_disk(at: &Path) {
    fs::create_dir(at).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=32m,mode=700", "tmpfs"])
        .arg(at)
        .status()
        .unwrap();
    assert!(mounted.success());
}

/// Every path below `directory`.
fn paths(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(paths(&entry.path()));
        }
        found.push(entry.path());
    }
    found
}

#[test]
fn a_boot_that_finds_the_disk_full_at_any_step_leaves_nothing_that_is_in_the_way() {
    const TEST: &str =
        "faults::a_boot_that_finds_the_disk_full_at_any_step_leaves_nothing_that_is_in_the_way";
    in_child(&unshare(&["--mount"]), TEST, || {
        block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let data = directory.path().join("data");
            small_disk(&data);
            let ballast = data.join("ballast");
            let take_all_but = |pages: u64| {
                let disk = nix::sys::statvfs::statvfs(&data).unwrap();
                let free = disk.blocks_available() * disk.fragment_size();
                let taken = usize::try_from(free - pages * 4096).unwrap();
                fs::write(&ballast, vec![0; taken]).unwrap();
            };
            // What is derived from the host's `/etc` takes more.
            take_all_but(16);
            let error = Error::from(boot(options(&data, "first")).await.err().unwrap());
            assert_eq!(error.code, Code::StoreFull, "{error}");
            assert!(error.message.contains("Free disk space"), "{error}");
            assert_eq!(fs::read_dir(data.join("base")).unwrap().count(), 0);
            fs::remove_file(&ballast).unwrap();
            let base = directory.path().join("base");
            let options = |name: &str| {
                let mut options = options(&data, name);
                options.base_cache.clone_from(&base);
                options
            };
            boot(options("warm")).await.unwrap().vm.shutdown().await;
            let mut failed = 0;
            for pages in 0..STEPS {
                let name = format!("vm-{pages}");
                take_all_but(pages);
                let before = held();
                let result = boot(options(&name)).await;
                let full = match result {
                    Ok(booted) => {
                        booted.vm.shutdown().await;
                        false
                    }
                    Err(error) => {
                        let error = Error::from(error);
                        assert_eq!(error.code, Code::StoreFull, "at {pages}: {error}");
                        true
                    }
                };
                assert_eq!(held().children, before.children, "at {pages}");
                fs::remove_file(&ballast).unwrap();
                let half: Vec<_> = paths(&data)
                    .into_iter()
                    .filter(|path| path.to_str().unwrap().contains("partial"))
                    .collect();
                assert_eq!(half, [] as [PathBuf; 0], "at {pages}");
                // What is there by now is fit to go on with.
                let vm: DynVm = boot(options(&name)).await.unwrap().vm;
                assert_eq!(stdout(&vm, "echo works > f; cat f").await, "works\n");
                vm.shutdown().await;
                let gone = options(&name);
                delete(&gone.dir, &gone.key).await.unwrap();
                if !full && pages > 0 {
                    assert!(failed > 1, "{failed}");
                    return;
                }
                failed += u32::from(full);
            }
            panic!("{STEPS} pages are not enough for a boot");
        });
    });
}

#[test]
fn a_boot_whose_pid_1_is_killed_at_any_moment_says_so_and_leaves_nothing() {
    const TEST: &str =
        "faults::a_boot_whose_pid_1_is_killed_at_any_moment_says_so_and_leaves_nothing";
    in_child(&[], TEST, || {
        block_on(async {
            let data = tempfile::tempdir().unwrap();
            booted(data.path(), "a").await.shutdown().await;
            let before = held();
            for delay in (0..40).map(|n| Duration::from_micros(n * 150)) {
                let booting = tokio::spawn(boot(options(data.path(), "a")));
                // PID 1 alone has this process for its parent.
                let pid = loop {
                    if let Some(pid) = children().pop() {
                        break Pid::from_raw(pid.parse().unwrap());
                    }
                    assert!(!booting.is_finished(), "it was not seen");
                    tokio::task::yield_now().await;
                };
                let until = Instant::now() + delay;
                while Instant::now() < until {}
                kill(pid, Signal::SIGKILL).unwrap();
                match booting.await.unwrap() {
                    // It was a VM already.
                    Ok(booted) => booted.vm.shutdown().await,
                    Err(error) => {
                        let error = Error::from(error);
                        assert_eq!(error.code, Code::VmExited, "{error}");
                    }
                }
                settles(&before).await;
            }
            let vm = booted(data.path(), "a").await;
            assert_eq!(stdout(&vm, "echo works").await, "works\n");
            vm.shutdown().await;
        });
    });
}

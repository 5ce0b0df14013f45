//! The host process dies, in whatever way and at whatever moment: nothing of its VMs outlives it,
//! and the next one goes on in the same directory.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use agentvm::agents::AgentStore;
use agentvm::error::{Code, Error};
use agentvm::ids::VmKey;
use agentvm::session::{Client, ClientOptions, Item, Notice, Settings};
use agentvm::vm::exec::{ExecOptions, exec};
use agentvm::vm::namespace::{boot, delete, sweep};
use agentvm::vm::{GuestPath, User, Vm as _, VmError};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::child::{again, block_on, in_child, role};
use super::vm::{booted, options, sh, stdout};

/// Set in the child: the data directory.
const DATA: &str = "AGENTVM_TEST_DATA";

/// Generous: it takes milliseconds.
const SOON: Duration = Duration::from_secs(20);

/// A host process that a test kills.
struct Host {
    process: Child,
    said: BufReader<ChildStdout>,
}

impl Host {
    fn start(test: &str, data: &Path) -> Self {
        let mut process = again(&[], test, "host")
            .env(DATA, data)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(process.stdout.take().unwrap());
        Self { process, said }
    }

    /// Reads until it says so.
    fn wait_for(&mut self, word: &str) {
        let mut line = String::new();
        while line.trim_end() != word {
            line.clear();
            let read = self.said.read_line(&mut line).unwrap();
            assert_ne!(read, 0, "the host process ended before it said {word:?}");
        }
    }

    /// Tells it to end, which takes as long as it takes.
    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap());
        kill(pid, signal).unwrap();
    }

    /// Kills it and waits for its end; its VMs may still be ending.
    fn kill(mut self, signal: Signal) {
        self.signal(signal);
        let status = self.process.wait().unwrap();
        assert_eq!(status.signal(), Some(signal as i32), "{status}");
        // A descriptor of it that was still open somewhere would keep this from ending.
        self.said.read_to_end(&mut Vec::new()).unwrap();
    }
}

fn data_of_host() -> PathBuf {
    PathBuf::from(std::env::var_os(DATA).unwrap())
}

fn say(word: &str) {
    // Not print!: the test harness would keep it.
    let line = format!("\n{word}\n");
    nix::unistd::write(std::io::stdout(), line.as_bytes()).unwrap();
}

/// Orphans of this process's descendants become its own children: so that it can see, and wait for,
/// what a killed host leaves.
fn adopt_orphans() {
    nix::sys::prctl::set_child_subreaper(true).unwrap();
}

/// Waits until every PID 1 that was left is gone, and with it, says the kernel, all its namespace's
/// processes.
fn reap_orphans() {
    let deadline = Instant::now() + SOON;
    loop {
        let mut status = 0;
        // SAFETY: waitpid writes the status. `__WALL`: a VM's PID 1 has no exit signal.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) };
        if pid < 0 {
            return; // ECHILD
        }
        assert!(
            Instant::now() < deadline,
            "a VM outlives its host: {}",
            tree()
        );
        if pid == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn tree() -> String {
    let output = std::process::Command::new("ps").args(["-ejf"]).output();
    String::from_utf8_lossy(&output.unwrap().stdout).into_owned()
}

/// Not the mount namespace: to hold one is to hold its mounts.
const KINDS: [&str; 3] = ["pid", "user", "net"];

/// Pids of this machine whose process is in one of these namespaces, those of `ignored` aside.
fn processes_in(namespaces: &BTreeSet<PathBuf>) -> Vec<i32> {
    pids()
        .filter(|pid| {
            KINDS
                .iter()
                .filter_map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok())
                .any(|namespace| namespaces.contains(&namespace))
        })
        .collect()
}

fn pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
}

/// The namespaces of all VM processes below `pid` that this process may look at. Held, so that their
/// numbers do not become those of another test's VM meanwhile.
fn namespaces_below(pid: u32) -> (BTreeSet<PathBuf>, Vec<File>) {
    let own: BTreeSet<_> = KINDS
        .iter()
        .map(|kind| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap())
        .collect();
    let mut below = vec![i32::try_from(pid).unwrap()];
    let (mut found, mut held) = (BTreeSet::new(), Vec::new());
    while let Some(pid) = below.pop() {
        for kind in KINDS {
            let path = format!("/proc/{pid}/ns/{kind}");
            held.extend(File::open(&path).ok());
            found.extend(fs::read_link(&path).ok());
        }
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        // Processes and threads may end while we look.
        for task in tasks.into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children"));
            below.extend(
                children
                    .unwrap_or_default()
                    .split_whitespace()
                    .map(|pid| pid.parse::<i32>().unwrap()),
            );
        }
    }
    (&found - &own, held)
}

/// Boots this VM and uses it: whatever was left of another one is not in the way.
async fn works(data: &Path) {
    let vm = booted(data, "a").await;
    assert_eq!(
        stdout(&vm, "echo works > proof; cat proof").await,
        "works\n"
    );
    vm.shutdown().await;
}

/// Processes that do not want to end: daemons, sessions of their own, deaf to signals, multiplying.
const STUBBORN: &str = "
    trap '' TERM HUP INT QUIT
    for n in 1 2 3 4 5; do
        setsid sh -c 'trap \"\" TERM HUP INT; (while :; do sleep 1000; done) & (sleep 1000 &) ; wait' &
        (setsid sleep 1000 > /dev/null 2>&1 &)
    done
    perl -e 'fork or exec \"sleep\", \"1000\"; $0 = \"renamed\"; $SIG{TERM} = \"IGNORE\"; sleep 1000' &
    (while :; do sleep 0.01 & wait; done) > /dev/null 2>&1 &
    echo kept > file
    true";

fn dies_while_programs_run(test: &str, signal: Signal) {
    if role().is_some() {
        block_on(async {
            let vm = booted(&data_of_host(), "a").await;
            sh(&vm, STUBBORN).await;
            say("running");
            std::future::pending::<()>().await;
        });
    }
    adopt_orphans();
    let data = tempfile::tempdir().unwrap();
    let mut host = Host::start(test, data.path());
    host.wait_for("running");
    let (namespaces, _held) = namespaces_below(host.process.id());
    assert!(!namespaces.is_empty());
    assert!(processes_in(&namespaces).len() >= 15, "{}", tree());
    host.kill(signal);
    block_on(async {
        // At once: it is the opener that waits.
        let vm = booted(data.path(), "a").await;
        let left: Vec<_> = processes_in(&namespaces)
            .into_iter()
            // PID 1 lets its lock go when everything else is gone, and then exits.
            .filter(|pid| {
                fs::read_to_string(format!("/proc/{pid}/comm"))
                    .is_ok_and(|name| name != "agentvm-guest\n")
            })
            .collect();
        assert_eq!(left, Vec::<i32>::new(), "{}", tree());
        assert_eq!(stdout(&vm, "cat file").await, "kept\n");
        vm.shutdown().await;
    });
    reap_orphans();
    assert_eq!(processes_in(&namespaces), Vec::<i32>::new());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(data.path().to_str().unwrap()), "{mounts}");
}

#[test]
fn sigkill_ends_every_program_and_the_next_opener_waits_for_that() {
    dies_while_programs_run(
        "death::sigkill_ends_every_program_and_the_next_opener_waits_for_that",
        Signal::SIGKILL,
    );
}

#[test]
fn sigterm_ends_every_program_and_the_next_opener_waits_for_that() {
    dies_while_programs_run(
        "death::sigterm_ends_every_program_and_the_next_opener_waits_for_that",
        Signal::SIGTERM,
    );
}

#[test]
fn sigint_ends_every_program_and_the_next_opener_waits_for_that() {
    dies_while_programs_run(
        "death::sigint_ends_every_program_and_the_next_opener_waits_for_that",
        Signal::SIGINT,
    );
}

/// Moments over `span`, spread evenly: no run of the test misses a part of it by chance.
fn moments(count: u32, span: Duration) -> impl Iterator<Item = Duration> {
    (0..count).map(move |n| span * n / count)
}

#[test]
fn a_kill_at_any_moment_of_the_boot_leaves_nothing() {
    const TEST: &str = "death::a_kill_at_any_moment_of_the_boot_leaves_nothing";
    if role().is_some() {
        block_on(async {
            say("booting");
            let _vm = booted(&data_of_host(), "a").await;
            std::future::pending::<()>().await;
        });
    }
    adopt_orphans();
    let data = tempfile::tempdir().unwrap();
    for (n, moment) in moments(50, Duration::from_millis(30)).enumerate() {
        let mut host = Host::start(TEST, data.path());
        host.wait_for("booting");
        // The moment is the point, not a wait for something.
        std::thread::sleep(moment);
        host.kill(Signal::SIGKILL);
        if n % 5 == 0 {
            block_on(works(data.path()));
        }
        reap_orphans();
    }
    block_on(works(data.path()));
}

#[test]
fn a_kill_at_any_moment_of_the_first_boot_leaves_a_usable_directory() {
    const TEST: &str = "death::a_kill_at_any_moment_of_the_first_boot_leaves_a_usable_directory";
    if role().is_some() {
        block_on(async {
            say("booting");
            let _vm = booted(&data_of_host(), "a").await;
            std::future::pending::<()>().await;
        });
    }
    adopt_orphans();
    // It makes the base of the host, too: slow, and killed in the middle most times.
    for moment in moments(6, Duration::from_millis(60)) {
        let data = tempfile::tempdir().unwrap();
        let mut host = Host::start(TEST, data.path());
        host.wait_for("booting");
        std::thread::sleep(moment);
        host.kill(Signal::SIGKILL);
        block_on(works(data.path()));
        reap_orphans();
    }
}

#[test]
fn a_kill_at_any_moment_of_the_shutdown_leaves_nothing() {
    const TEST: &str = "death::a_kill_at_any_moment_of_the_shutdown_leaves_nothing";
    if role().is_some() {
        block_on(async {
            let vm = booted(&data_of_host(), "a").await;
            sh(&vm, STUBBORN).await;
            say("ending");
            vm.shutdown().await;
            std::future::pending::<()>().await;
        });
    }
    adopt_orphans();
    let data = tempfile::tempdir().unwrap();
    for moment in moments(12, Duration::from_millis(24)) {
        let mut host = Host::start(TEST, data.path());
        host.wait_for("ending");
        std::thread::sleep(moment);
        host.kill(Signal::SIGKILL);
        block_on(works(data.path()));
        reap_orphans();
    }
}

#[test]
fn a_kill_at_any_moment_of_a_delete_leaves_nothing_after_the_next_sweep() {
    const TEST: &str =
        "death::a_kill_at_any_moment_of_a_delete_leaves_nothing_after_the_next_sweep";
    if role().is_some() {
        block_on(async {
            let data = data_of_host();
            let vm = booted(&data, "a").await;
            let tree = "for d in $(seq 10); do mkdir -p tree/$d && (cd tree/$d && seq 20 | xargs touch); done; chmod 0 tree/1";
            sh(&vm, tree).await;
            vm.shutdown().await;
            say("deleting");
            let gone = options(&data, "a");
            delete(&gone.dir, &gone.key).await.unwrap();
            std::future::pending::<()>().await;
        });
    }
    adopt_orphans();
    let data = tempfile::tempdir().unwrap();
    for moment in moments(10, Duration::from_millis(30)) {
        let mut host = Host::start(TEST, data.path());
        host.wait_for("deleting");
        std::thread::sleep(moment);
        host.kill(Signal::SIGKILL);
        sweep(&data.path().join("vms"));
        block_on(works(data.path()));
        let vms: Vec<_> = fs::read_dir(data.path().join("vms"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(vms, ["a"]);
        reap_orphans();
    }
}

/// What this process holds on to.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    children: String,
}

fn held() -> Held {
    Held {
        descriptors: fs::read_dir("/proc/self/fd").unwrap().count(),
        children: fs::read_dir("/proc/self/task")
            .unwrap()
            // A thread may end while we look.
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok())
            .collect(),
    }
}

/// Waits until this process holds no more than before: the last task of a VM may still be ending.
async fn settles(before: &Held) {
    let deadline = Instant::now() + SOON;
    loop {
        let now = held();
        if now.descriptors <= before.descriptors && now.children == before.children {
            return;
        }
        assert!(Instant::now() < deadline, "{now:?}, not {before:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.unwrap().trim().trim_end_matches(" kB");
    number.parse().unwrap()
}

#[test]
fn a_hundred_vms_leave_the_process_as_it_was() {
    block_on(async {
        let data = tempfile::tempdir().unwrap();
        let live_and_die = async |name: String| {
            let vm = booted(data.path(), &name).await;
            sh(&vm, "true").await;
            vm.shutdown().await;
            drop(vm);
            let gone = options(data.path(), &name);
            delete(&gone.dir, &gone.key).await.unwrap();
        };
        for n in 0..10 {
            live_and_die(format!("warm-{n}")).await;
        }
        let (before, memory) = (held(), resident_kib());
        for n in 0..100 {
            live_and_die(format!("vm-{n}")).await;
        }
        settles(&before).await;
        let grown = resident_kib().saturating_sub(memory);
        assert!(grown < 4096, "{grown} KiB after 100 VMs");
    });
}

#[test]
fn fifty_vms_boot_at_once() {
    block_on(async {
        let data = tempfile::tempdir().unwrap();
        let path = data.path().to_owned();
        booted(&path, "warm").await.shutdown().await;
        let before = held();
        let mut booting = tokio::task::JoinSet::new();
        for n in 0..50 {
            let path = path.clone();
            booting.spawn(async move { booted(&path, &format!("vm-{n}")).await });
        }
        let vms = booting.join_all().await;
        for vm in &vms {
            assert_eq!(stdout(vm, "echo up").await, "up\n");
        }
        for vm in vms {
            vm.shutdown().await;
        }
        settles(&before).await;
    });
}

#[test]
fn a_boot_that_nobody_waits_for_any_more_leaves_nothing() {
    block_on(async {
        let data = tempfile::tempdir().unwrap();
        booted(data.path(), "a").await.shutdown().await;
        let before = held();
        for moment in moments(30, Duration::from_millis(15)) {
            let boot = boot(options(data.path(), "a"));
            drop(tokio::time::timeout(moment, boot).await);
        }
        settles(&before).await;
        works(data.path()).await;
    });
}

/// A client without agents.
fn client(data: &Path) -> Client {
    let agents = AgentStore::new(data.join("agents"), "/none".into(), "/none".into());
    Client::new(ClientOptions {
        data_dir: data.to_owned(),
        settings: Settings::new(agents),
    })
}

fn a() -> VmKey {
    VmKey::new(vec!["a".to_owned()]).unwrap()
}

#[test]
fn an_aborted_call_is_not_in_the_way_of_the_next() {
    block_on(async {
        let data = tempfile::tempdir().unwrap();
        let client = client(data.path());
        let vm = client.vm(a()).unwrap();
        let run = || vm.exec("true", ExecOptions::default());
        run().await.unwrap();
        for moment in moments(20, Duration::from_millis(15)) {
            vm.sleep().await.unwrap();
            drop(tokio::time::timeout(moment, run()).await);
            run().await.unwrap();
        }
        client.close().await.unwrap();
    });
}

#[test]
fn a_program_that_has_a_copy_of_the_lock_is_waited_for_when_its_host_is_dead() {
    const TEST: &str =
        "death::a_program_that_has_a_copy_of_the_lock_is_waited_for_when_its_host_is_dead";
    if role().is_some() {
        block_on(async {
            let data = data_of_host();
            let _vm = booted(&data, "a").await;
            let lock = data.join("vms/a/host.lock");
            let descriptor = fs::read_dir("/proc/self/fd")
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .find(|fd| fs::read_link(fd).is_ok_and(|file| file == lock))
                .unwrap();
            let number: i32 = descriptor
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .parse()
                .unwrap();
            // SAFETY: a duplicate, which is left to the program that is started now.
            assert!(unsafe { libc::dup(number) } >= 0);
            #[expect(clippy::zombie_processes, reason = "it outlives this process")]
            let _waits_for_our_end = std::process::Command::new("sh")
                .args(["-c", "read line; sleep 0.1"])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            say("running");
            std::future::pending::<()>().await;
        });
    }
    adopt_orphans();
    let data = tempfile::tempdir().unwrap();
    let mut host = Host::start(TEST, data.path());
    host.wait_for("running");
    host.kill(Signal::SIGKILL);
    block_on(works(data.path()));
    reap_orphans();
}

#[test]
fn a_host_that_is_still_dying_is_waited_for() {
    const TEST: &str = "death::a_host_that_is_still_dying_is_waited_for";
    if role().is_some() {
        block_on(async {
            let _vm = booted(&data_of_host(), "a").await;
            // Whose memory the kernel first has to take back.
            let memory = vec![1_u8; 1 << 30];
            say("running");
            std::future::pending::<()>().await;
            drop(memory);
        });
    }
    adopt_orphans();
    let data = tempfile::tempdir().unwrap();
    let mut host = Host::start(TEST, data.path());
    host.wait_for("running");
    host.signal(Signal::SIGKILL);
    block_on(works(data.path()));
    host.kill(Signal::SIGKILL);
    reap_orphans();
}

#[test]
fn a_busy_vm_leaves_nothing_of_the_second_boot() {
    block_on(async {
        let data = tempfile::tempdir().unwrap();
        let vm = booted(data.path(), "a").await;
        let before = held();
        for _ in 0..5 {
            let busy = boot(options(data.path(), "a")).await;
            assert!(busy.is_err());
        }
        settles(&before).await;
        vm.shutdown().await;
    });
}

/// PID 1 of the one VM that this process has.
pub(super) fn pid_1() -> Pid {
    let guests: Vec<i32> = held()
        .children
        .split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect();
    let [guest] = guests[..] else {
        panic!("{guests:?}");
    };
    Pid::from_raw(guest)
}

#[test]
fn a_vm_that_died_stays_locked_until_what_is_kept_of_it_is_closed() {
    const TEST: &str = "death::a_vm_that_died_stays_locked_until_what_is_kept_of_it_is_closed";
    in_child(&[], TEST, || {
        block_on(async {
            let data = tempfile::tempdir().unwrap();
            let client = client(data.path());
            let vm = client.vm(a()).unwrap();
            vm.exec("true", ExecOptions::default()).await.unwrap();
            let events = vm.subscribe().unwrap();
            kill(pid_1(), Signal::SIGKILL).unwrap();
            let ended = |item: &_| matches!(item, Item::Notice(Notice::VmShutdown { .. }));
            while !events.next().await.unwrap().iter().any(ended) {}
            drop(events);
            let other_opener = || boot(options(data.path(), &a().id().to_string()));
            let error = Error::from(other_opener().await.err().unwrap());
            assert_eq!(error.code, Code::VmBusy, "{error}");
            client.close().await.unwrap();
            other_opener().await.unwrap().vm.shutdown().await;
        });
    });
}

/// Kills PID 1 and waits until it is dead, in which time nothing else runs in a runtime of one thread:
/// nobody can have noticed.
fn kill_unnoticed(pid: Pid) {
    kill(pid, Signal::SIGKILL).unwrap();
    let stat = format!("/proc/{pid}/stat");
    while !fs::read_to_string(&stat).unwrap().contains(") Z ") {}
}

#[test]
fn a_call_that_finds_its_vm_dead_is_made_in_the_next_one() {
    const TEST: &str = "death::a_call_that_finds_its_vm_dead_is_made_in_the_next_one";
    in_child(&[], TEST, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let data = tempfile::tempdir().unwrap();
            let client = client(data.path());
            let vm = client.vm(a()).unwrap();
            let path = GuestPath::new("file").unwrap();
            let content = b"content".to_vec();
            vm.wake().await.unwrap();
            kill_unnoticed(pid_1());
            vm.write_file(&path, content.clone(), User::User)
                .await
                .unwrap();
            kill_unnoticed(pid_1());
            assert_eq!(vm.read_file(&path, User::User).await.unwrap(), content);
            kill_unnoticed(pid_1());
            vm.exec("true", ExecOptions::default()).await.unwrap();
            client.close().await.unwrap();

            let vm = booted(data.path(), "b").await;
            kill_unnoticed(pid_1());
            let refused = exec(&vm, "true", ExecOptions::default()).await;
            let error = refused.unwrap_err();
            assert!(matches!(error, VmError::NotSent(_)), "{error}");
            assert_eq!(Error::from(error).code, Code::VmExited);
            assert!(!vm.still_runs().await);
            assert!(vm.ended().borrow().is_some());
        });
    });
}

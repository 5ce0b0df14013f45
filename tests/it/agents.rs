//! The agent store as a caller of the crate sees it: real packages, real VMs.
//!
//! One installation is kept in the target directory and shared by tests and runs: entries never
//! change. Tests that install for themselves take its runtime over and install Pi.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};

use agentvm::agents::{Agent, AgentError, AgentStore, BuiltIn, ClientAgents, InstallProgress};
use agentvm::agents::{Installed, Launch, SessionSpec, Step, Used, launch};
use agentvm::error::{Code, Error};
use agentvm::ids::SessionId;
use agentvm::net::Policy;
use agentvm::vm::exec::{ExecEnd, ExecOptions, exec};
use agentvm::vm::namespace::{AGENTS, BootOptions, boot};
use agentvm::vm::{self, DynVm, Exit, GuestPath, User};

const PI: Agent = Agent::BuiltIn(BuiltIn::Pi);

/// Stands where the build puts our adapter, and shows that the SDK is found from there.
const MAIN: &str = r#"
    import { VERSION } from "@earendil-works/pi-coding-agent";
    import { constants, accessSync } from "node:fs";
    accessSync(process.env.AGENTVM_STATE_DIR, constants.W_OK);
    console.log(VERSION, process.version, process.cwd());
"#;

fn package(at: &Path) -> PathBuf {
    package_of(at, MAIN)
}

/// Our npm package with this script as the adapter of Pi.
pub(super) fn package_of(at: &Path, main: &str) -> PathBuf {
    let dist = at.join("package/adapters/pi/dist");
    fs::create_dir_all(&dist).unwrap();
    fs::write(dist.join("main.js"), main).unwrap();
    at.join("package")
}

pub(super) fn node() -> PathBuf {
    let found = Command::new("sh").args(["-c", "command -v node"]).output();
    String::from_utf8(found.unwrap().stdout)
        .unwrap()
        .trim()
        .into()
}

fn store_in(directory: &Path) -> AgentStore {
    AgentStore::new(directory.join("agents"), package(directory), node())
}

/// The store that tests share. The first one to come installs.
pub(super) async fn shared() -> (AgentStore, Installed, tempfile::TempDir) {
    let own = tempfile::tempdir().unwrap();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let uid = nix::unistd::getuid();
    let name = format!("agentvm-test-agents-{uid}");
    let writable = nix::unistd::access(target, nix::unistd::AccessFlags::W_OK).is_ok();
    let root = if writable {
        target.join(name)
    } else {
        std::env::temp_dir().join(name)
    };
    let store = AgentStore::new(root, package(own.path()), node());
    let installed = store.ensure(&PI, true, &|_| {}).await.unwrap();
    (store, installed, own)
}

/// How an agent is started for some session: tells one installation from another.
fn plan_of(installed: &Installed) -> Launch {
    let session = SessionSpec {
        id: SessionId::parse("0190f5fe-7c00-7000-8000-000000000001").unwrap(),
        cwd: &GuestPath::home(),
        env: &[],
        asks: false,
    };
    launch(installed, &session)
}

/// A store in which only Pi is missing.
async fn store_with_runtime(directory: &Path) -> AgentStore {
    let (shared, _, _own) = shared().await;
    let store = store_in(directory);
    fs::create_dir_all(store.root()).unwrap();
    let runtime = entries(shared.root())
        .into_iter()
        .find(|name| name.starts_with("node-"))
        .unwrap();
    let runtime = shared.root().join(runtime);
    let copied = |how| {
        let copied = Command::new("cp")
            .args([how, runtime.as_os_str(), store.root().as_os_str()])
            .status();
        copied.unwrap().success()
    };
    // Links are quick; the temporary directory may be on another file system.
    assert!(copied("-al".as_ref()) || copied("-a".as_ref()));
    store
}

/// Names in the store, those of partial directories too; not the locks.
fn entries(root: &Path) -> Vec<String> {
    let found = fs::read_dir(root).unwrap();
    let mut names: Vec<_> = found
        .map(|found| found.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".locks")
        .collect();
    names.sort();
    names
}

async fn booted(data: &Path, agents: &Path) -> DynVm {
    let options = BootOptions {
        dir: data.join("vms/a"),
        key: "[\"a\"]".to_owned(),
        base_cache: data.join("base"),
        agents: agents.to_owned(),
        policy: Arc::new(Policy::new(&[])),
        denials: None,
        limits: agentvm::vm::Limits::default(),
        mounts: Vec::new(),
        private: Vec::new(),
        image: None,
        secrets: agentvm::net::secrets::Secrets::default(),
    };
    boot(options).await.unwrap().vm
}

async fn stdout(vm: &DynVm, command: &str) -> String {
    let end = exec(vm, command, ExecOptions::default()).await.unwrap();
    let ExecEnd::Exited(output) = end else {
        panic!("{end:?}")
    };
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.exit, Exit::Code(0), "{command}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn an_installed_agent_needs_no_second_installation() {
    let (store, installed, _own) = shared().await;
    let progress = Mutex::new(Vec::new());
    let again = store
        .ensure(&PI, false, &|now| progress.lock().unwrap().push(now))
        .await
        .unwrap();
    assert_eq!(plan_of(&again), plan_of(&installed));
    assert!(progress.lock().unwrap().is_empty());
}

#[tokio::test]
async fn the_store_lists_what_is_in_it_with_sizes() {
    let (store, _, _own) = shared().await;
    let entries = store.list().await.unwrap();
    let pinned: Vec<_> = entries
        .iter()
        .filter(|entry| entry.used == Used::Pinned)
        .collect();
    assert!(pinned[0].name.starts_with("node-22.23.3-"), "{pinned:?}");
    assert!(pinned[1].name.starts_with("pi-0.87.1-"), "{pinned:?}");
    assert!(pinned.iter().all(|entry| entry.bytes > 50_000_000));
    let available = store.available(&ClientAgents::default()).await.unwrap();
    let pi = available.iter().find(|agent| agent.name == "pi").unwrap();
    assert!(pi.is_installed && pi.is_pinned, "{pi:?}");
}

#[tokio::test]
async fn node_npm_and_npx_of_the_store_run_in_a_vm() {
    let (store, installed, own) = shared().await;
    let vm = booted(own.path(), store.root()).await;
    let session = SessionSpec {
        id: SessionId::generate(),
        cwd: &GuestPath::home(),
        env: &[("PATH".to_owned(), "/bin".to_owned())],
        asks: false,
    };
    let node = &launch(&installed, &session).argv[0];
    let bin = node.strip_suffix("/node").unwrap();
    let run = async |command| stdout(&vm, &format!("PATH={bin}:$PATH; {command}")).await;
    assert_eq!(run("id -un; node --version").await, "user\nv22.23.3\n");
    assert_eq!(
        run("npm --version; npx --version").await,
        "10.9.9\n10.9.9\n"
    );
    // Global packages go where `user` may write.
    assert_eq!(run("npm prefix --global").await, "/home/user/.local\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn nothing_in_the_store_is_writable_or_hidden_in_a_vm() {
    let (store, _, own) = shared().await;
    let vm = booted(own.path(), store.root()).await;
    let hidden = stdout(
        &vm,
        &format!("find {AGENTS} -path {AGENTS}/.locks -prune -o ! -readable -print"),
    )
    .await;
    assert_eq!(hidden, "");
    let written = stdout(&vm, &format!("touch {AGENTS}/x 2>&1 || true")).await;
    assert!(written.contains("Read-only file system"), "{written}");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_launch_plan_starts_the_adapter_which_finds_the_agents_packages() {
    let (store, installed, own) = shared().await;
    let vm = booted(own.path(), store.root()).await;
    let session = SessionSpec {
        id: SessionId::generate(),
        cwd: &GuestPath::new("/tmp").unwrap(),
        env: &[],
        asks: false,
    };
    let plan = launch(&installed, &session);
    vm.create_dir_all(&plan.state_dir, User::User)
        .await
        .unwrap();
    let mut process = vm
        .spawn(&vm::Command {
            argv: plan.argv,
            env: plan.env,
            cwd: plan.cwd,
            user: User::User,
        })
        .await
        .unwrap();
    let mut out = String::new();
    let mut err = String::new();
    let exit = vm::exited(&mut process.exit).await;
    for (pipe, text) in [(process.stdout, &mut out), (process.stderr, &mut err)] {
        fs::File::from(OwnedFd::from(pipe))
            .read_to_string(text)
            .ok();
    }
    assert_eq!(exit, Some(Exit::Code(0)), "{err}");
    assert_eq!(out, "0.87.1 v22.23.3 /tmp\n", "{err}");
    let cached = stdout(&vm, "ls /var/cache/agentvm/node").await;
    assert!(cached.starts_with("v22.23.3-"), "{cached}");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_missing_agent_is_not_installed_against_the_callers_will() {
    let directory = tempfile::tempdir().unwrap();
    let store = store_in(directory.path());
    let error = store.ensure(&PI, false, &|_| {}).await.unwrap_err();
    let error = Error::from(error);
    assert_eq!(error.code, Code::AgentNotInstalled);
    assert!(error.message.contains("npx agentvm install pi"), "{error}");
    assert!(!store.root().exists());
}

#[tokio::test]
async fn a_store_that_cannot_be_made_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let store = AgentStore::new("/dev/null/agents".into(), package(directory.path()), node());
    let error = store.ensure(&PI, true, &|_| {}).await.unwrap_err();
    let error = Error::from(error);
    assert_eq!(error.code, Code::InstallFailed);
    assert!(error.message.contains("/dev/null/agents"), "{error}");
    assert!(error.message.contains("AGENTVM_CACHE_DIR"), "{error}");
}

#[tokio::test]
async fn a_store_that_was_taken_for_a_private_directory_becomes_readable() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let store = store_with_runtime(directory.path()).await;
    let (shared, installed, _own) = shared().await;
    drop(shared);
    fs::set_permissions(store.root(), fs::Permissions::from_mode(0o700)).unwrap();
    let own = store.ensure(&PI, true, &|_| {}).await.unwrap();
    assert_eq!(plan_of(&own), plan_of(&installed));
    let mode = fs::metadata(store.root()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
}

/// An installer in a process of its own, which tells each step in a line.
struct Installer {
    process: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Installer {
    fn start(store: &AgentStore, env: &[(&str, &str)]) -> Self {
        Self::start_by(Command::new(std::env::current_exe().unwrap()), store, env)
    }

    fn start_by(mut command: Command, store: &AgentStore, env: &[(&str, &str)]) -> Self {
        let mut process = command
            .args(["--exact", "agents::installer_process", "--ignored"])
            .arg("--nocapture")
            .env("AGENTVM_TEST_STORE", store.root().parent().unwrap())
            .envs(env.iter().copied())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, lines }
    }

    /// The next line that starts with `prefix`; what else it told is lost.
    fn wait_for(&mut self, prefix: &str) -> String {
        let mut seen = Vec::new();
        for line in self.lines.by_ref() {
            let line = line.unwrap();
            if line.starts_with(prefix) {
                return line;
            }
            seen.push(line);
        }
        panic!("no line {prefix:?} in {seen:#?}")
    }

    fn rest(mut self) -> Vec<String> {
        let lines = self.lines.by_ref().map(Result::unwrap).collect();
        self.process.wait().unwrap();
        lines
    }
}

/// Not a test of its own.
#[tokio::test]
#[ignore = "an installer process that other tests start"]
async fn installer_process() {
    let Some(directory) = std::env::var_os("AGENTVM_TEST_STORE") else {
        return;
    };
    let store = store_in(Path::new(&directory));
    let tell = |now: InstallProgress| {
        println!("{} {}: {}", now.step.as_str(), now.done, now.message);
    };
    println!();
    match store.ensure(&PI, true, &tell).await {
        Ok(_) => println!("installed"),
        Err(error) => println!(
            "failed {}",
            Error::from(error).to_string().replace('\n', " ")
        ),
    }
    let left = store.root().exists().then(|| entries(store.root()));
    println!("left {:?}", left.unwrap_or_default());
}

#[tokio::test]
async fn of_two_processes_one_installs_and_the_other_waits_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = store_with_runtime(directory.path()).await;
    let mut first = Installer::start(&store, &[]);
    first.wait_for("agent ");
    let mut second = Installer::start(&store, &[]);
    second.wait_for("waiting ");
    assert!(first.rest().contains(&"installed".to_owned()));
    let second = second.rest();
    assert!(second.contains(&"installed".to_owned()), "{second:#?}");
    assert!(!second.iter().any(|line| line.starts_with("agent ")));
    assert_eq!(entries(store.root()).len(), 2);
}

#[tokio::test]
async fn an_installer_that_is_killed_leaves_nothing_that_the_next_one_minds() {
    let directory = tempfile::tempdir().unwrap();
    let store = store_with_runtime(directory.path()).await;
    let mut killed = Installer::start(&store, &[]);
    while killed.wait_for("agent ").starts_with("agent 0:") {}
    killed.process.kill().unwrap();
    killed.process.wait().unwrap();
    assert!(
        entries(store.root())
            .iter()
            .any(|name| name.starts_with(".partial-"))
    );
    let next = Installer::start(&store, &[]).rest();
    assert!(next.contains(&"installed".to_owned()), "{next:#?}");
    assert_eq!(entries(store.root()).len(), 2);
}

#[tokio::test]
async fn a_cancelled_installation_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = store_with_runtime(directory.path()).await;
    let (began, begun) = tokio::sync::oneshot::channel();
    let began = Mutex::new(Some(began));
    let tell = |now: InstallProgress| {
        if now.step == Step::Agent
            && now.done > 0
            && let Some(began) = began.lock().unwrap().take()
        {
            began.send(()).unwrap();
        }
    };
    tokio::select! {
        installed = store.ensure(&PI, true, &tell) => panic!("{installed:?}"),
        begun = begun => begun.unwrap(),
    }
    // The next one gets the lock when the cancelled one has cleared up.
    let error = AgentStore::new(store.root().into(), "/nowhere".into(), node());
    let error = error.ensure(&PI, true, &|_| {}).await.unwrap_err();
    assert!(
        matches!(error, AgentError::AdapterMissing { .. }),
        "{error}"
    );
    assert_eq!(entries(store.root()).len(), 2);
}

#[tokio::test]
async fn without_npm_the_error_says_where_it_was_looked_for() {
    let directory = tempfile::tempdir().unwrap();
    let store = store_in(directory.path());
    let mut installer = Installer::start(&store, &[("AGENTVM_NPM", "/nowhere/npm")]);
    let error = installer.wait_for("failed ");
    assert!(error.contains("INSTALL_FAILED"), "{error}");
    assert!(error.contains("/nowhere/npm (AGENTVM_NPM)"), "{error}");
    installer.rest();
}

#[tokio::test]
async fn a_registry_that_cannot_be_reached_is_told_as_such() {
    let directory = tempfile::tempdir().unwrap();
    let store = store_in(directory.path());
    let cache = directory.path().join("npm-cache");
    let mut installer = Installer::start(
        &store,
        &[
            // Port 9 (discard) of the loopback: nobody listens.
            ("npm_config_registry", "http://127.0.0.1:9"),
            ("npm_config_fetch_retries", "0"),
            ("npm_config_cache", cache.to_str().unwrap()),
        ],
    );
    let error = installer.wait_for("failed ");
    assert!(error.contains("INSTALL_FAILED"), "{error}");
    assert!(
        error.contains("could not be reached (ECONNREFUSED)"),
        "{error}"
    );
    installer.wait_for("left []");
    installer.rest();
}

#[tokio::test]
async fn a_full_disk_is_told_as_such_and_nothing_half_made_remains() {
    let directory = tempfile::tempdir().unwrap();
    let store = store_in(directory.path());
    fs::create_dir_all(store.root()).unwrap();
    let mut in_small_disk = Command::new("unshare");
    in_small_disk
        .args(["--map-root-user", "--mount", "sh", "-ec"])
        .arg("mount -t tmpfs -o size=64m,mode=755 none \"$AGENTVM_TEST_STORE/agents\"; exec \"$0\" \"$@\"")
        .arg(std::env::current_exe().unwrap());
    let mut installer = Installer::start_by(in_small_disk, &store, &[]);
    let error = installer.wait_for("failed ");
    assert!(error.contains("INSTALL_FAILED"), "{error}");
    assert!(error.contains("the disk is full"), "{error}");
    installer.wait_for("left []");
    installer.rest();
}

//! Tests that need a process of their own run again in a child: the test binary, told which test.

use std::process::{Command, Stdio};

/// Set in the child, to what it is there for.
const ROLE: &str = "AGENTVM_TEST_ROLE";

/// What this process was started for by [`again`]; `None` in the test's own process.
pub(super) fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// The same test (its module path and name) in another process, through `wrapper` if there is one.
pub(super) fn again(wrapper: &[&str], test: &str, role: &str) -> Command {
    let binary = std::env::current_exe().unwrap();
    let mut command = match wrapper.split_first() {
        Some((program, args)) => {
            let mut command = Command::new(program);
            command.args(args).arg(binary);
            command
        }
        None => Command::new(binary),
    };
    command
        .args([test, "--exact", "--nocapture"])
        .env(ROLE, role)
        .stdin(Stdio::null());
    command
}

/// Runs `body` in a child, and fails as it does. `wrapper` is the start of the child's command line.
pub(super) fn in_child(wrapper: &[&str], test: &str, body: impl FnOnce()) {
    if role().is_some() {
        body();
        return;
    }
    let status = again(wrapper, test, "body").status().unwrap();
    assert!(status.success(), "{status}: see above");
}

/// `unshare` with more namespaces; the caller keeps its id, and gets capabilities in them.
pub(super) fn unshare<'a>(namespaces: &[&'a str]) -> Vec<&'a str> {
    let mut command = vec!["unshare"];
    command.extend(namespaces);
    if !nix::unistd::geteuid().is_root() {
        command.extend(["--user", "--map-current-user", "--keep-caps"]);
    }
    command
}

pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

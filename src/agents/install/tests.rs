//! Installations of one small package: by the host's npm from its registry, or by a stand-in for npm
//! where npm itself does not matter.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use tokio::sync::oneshot;

use super::super::pinned::Pinned;
use super::super::version::Version;
use super::*;
use crate::error::{Code, Error};

const SMALL: Pinned = Pinned {
    name: "small",
    version: "2.0.0",
    package: "isexe",
    manifest: r#"{"name": "small", "private": true, "dependencies": {"isexe": "2.0.0"}}"#,
    lock: r#"{
        "name": "small", "lockfileVersion": 3, "requires": true,
        "packages": {
            "": {"name": "small", "dependencies": {"isexe": "2.0.0"}},
            "node_modules/isexe": {
                "version": "2.0.0",
                "integrity": "sha512-RHxMLp9lnKHGHRng9QFhRCMbYAcVpn69smSGcq3f36xjgVVWThj4qqLbTLlq7Ssj8B+fIQ1EuCEGI2lKsyQeIw=="
            }
        }
    }"#,
    files: &["node_modules/isexe/index.js"],
};

fn host_npm() -> Npm {
    let which = Command::new("sh").args(["-c", "command -v node"]).output();
    let node = String::from_utf8(which.unwrap().stdout).unwrap();
    Npm::of_host(Path::new(node.trim()), |name| std::env::var_os(name)).unwrap()
}

/// An npm that is this shell script; `$package` is where it is to install to.
fn npm_script(directory: &Path, script: &str) -> Npm {
    let program = directory.join("npm");
    let find =
        r"for option; do case $option in --prefix=*) package=${option#--prefix=};; esac; done";
    fs::write(&program, format!("#!/bin/sh\n{find}\n{script}\n")).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    Npm::of_host(Path::new("/nowhere/node"), |name| {
        (name == "AGENTVM_NPM").then(|| program.clone().into_os_string())
    })
    .unwrap()
}

async fn installed(root: &Path, pinned: Pinned, npm: &Npm) -> Result<(), AgentError> {
    installed_packages(root, pinned.packages(), npm).await
}

async fn installed_packages(root: &Path, packages: Packages, npm: &Npm) -> Result<(), AgentError> {
    let never = std::future::pending();
    install(root, packages, npm, |_| Ok(()), never, |_| {}).await
}

/// Names of what is in the store, without the locks.
fn content(root: &Path) -> Vec<String> {
    let found = fs::read_dir(root).unwrap();
    let names = found.map(|found| found.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != LOCKS).collect()
}

const INSTALLS: &str = r#"
    mkdir -p "$package/node_modules/isexe"
    echo '{"version": "2.0.0"}' > "$package/node_modules/isexe/package.json"
    echo > "$package/node_modules/isexe/index.js"
"#;

#[tokio::test]
async fn packages_come_from_the_registry_and_everyone_may_read_them() {
    let root = tempfile::tempdir().unwrap();
    installed(root.path(), SMALL, &host_npm()).await.unwrap();
    assert_eq!(content(root.path()), [SMALL.entry()]);
    let entry = root.path().join(SMALL.entry());
    assert!(marker(&entry).unwrap().bytes > 1000);
    for (path, mode) in [
        ("", 0o755),
        ("node_modules/isexe", 0o755),
        ("node_modules/isexe/index.js", 0o644),
        (MARKER, 0o644),
    ] {
        let data = fs::metadata(entry.join(path)).unwrap();
        assert_eq!(data.permissions().mode() & 0o7777, mode, "{path}");
    }
}

#[tokio::test]
async fn a_package_with_another_hash_than_the_locked_one_is_refused_and_nothing_is_left() {
    let root = tempfile::tempdir().unwrap();
    let tampered = Pinned {
        lock: Box::leak(SMALL.lock.replace("RHxMLp9l", "AAAALp9l").into_boxed_str()),
        ..SMALL
    };
    let error = installed(root.path(), tampered, &host_npm()).await;
    let error = Error::from(error.unwrap_err());
    assert_eq!(error.code, Code::InstallFailed);
    assert!(error.message.contains("EINTEGRITY"), "{error}");
    assert!(content(root.path()).is_empty());
}

#[tokio::test]
async fn an_npm_that_reports_success_without_the_packages_is_not_believed() {
    let (root, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (script, missing) in [
        ("exit 0", "node_modules/isexe"),
        (
            &*INSTALLS.replace("2.0.0", "2.0.1"),
            "version 2.0.1 instead of 2.0.0",
        ),
        (
            &*format!("{INSTALLS} rm -r \"$package/node_modules/isexe/index.js\""),
            "index.js is missing",
        ),
    ] {
        let npm = npm_script(host.path(), script);
        let error = installed(root.path(), SMALL, &npm).await.unwrap_err();
        let error = Error::from(error);
        assert_eq!(error.code, Code::InstallFailed);
        assert!(error.message.contains(missing), "{error}");
        assert!(content(root.path()).is_empty());
    }
}

#[tokio::test]
async fn a_failing_npm_is_quoted() {
    let (root, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let npm = npm_script(host.path(), "echo 'no tea left' >&2; exit 7");
    let error = Error::from(installed(root.path(), SMALL, &npm).await.unwrap_err());
    assert_eq!(error.code, Code::InstallFailed);
    assert!(error.message.contains("exit code 7"), "{error}");
    assert!(error.message.contains("no tea left"), "{error}");
    assert!(content(root.path()).is_empty());
}

#[tokio::test]
async fn a_cancelled_installation_ends_npm_and_what_it_started_and_leaves_nothing() {
    let (root, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // npm and its child hold the writing end of this until they are dead.
    let alive = host.path().join("alive");
    nix::unistd::mkfifo(&alive, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let script = format!(
        "exec 9> {}; sleep 1000 & echo up >&9; wait",
        alive.display()
    );
    let npm = npm_script(host.path(), &script);
    let (cancel, cancelled) = oneshot::channel();
    let watched = tokio::task::spawn_blocking(move || {
        let mut alive = BufReader::new(File::open(alive).unwrap());
        alive.read_line(&mut String::new()).unwrap();
        cancel.send(()).unwrap();
        alive.read_line(&mut String::new()).unwrap()
    });
    let cancelled = async { cancelled.await.unwrap() };
    let result = install(
        root.path(),
        SMALL.packages(),
        &npm,
        |_| Ok(()),
        cancelled,
        |_| {},
    )
    .await;
    assert_eq!(Error::from(result.unwrap_err()).code, Code::Aborted);
    assert!(content(root.path()).is_empty());
    assert_eq!(watched.await.unwrap(), 0, "the end of the pipe");
}

#[tokio::test]
async fn what_dead_installers_left_goes_and_what_live_ones_make_stays() {
    let (root, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let lock_of_live = lock(root.path(), "live-1-a", |_| {}).await.unwrap();
    let live = Partial::new(root.path(), "live-1-a", lock_of_live).unwrap();
    let left =
        [SMALL.entry(), "dead-1-a".to_owned()].map(|entry| partial_path(root.path(), &entry));
    for left in &left {
        fs::create_dir_all(left.join("node_modules")).unwrap();
    }
    let npm = npm_script(host.path(), INSTALLS);
    installed(root.path(), SMALL, &npm).await.unwrap();
    assert!(left.iter().all(|left| !left.exists()));
    assert!(live.path.exists());
}

#[tokio::test]
async fn an_entry_without_its_marker_is_made_again() {
    let (root, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::create_dir_all(root.path().join(SMALL.entry()).join("something")).unwrap();
    let npm = npm_script(host.path(), INSTALLS);
    installed(root.path(), SMALL, &npm).await.unwrap();
    assert!(is_installed(root.path(), &SMALL.entry()));
    assert_eq!(content(root.path()), [SMALL.entry()]);
}

#[tokio::test]
async fn an_installed_entry_is_not_touched() {
    let (root, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let npm = npm_script(host.path(), INSTALLS);
    installed(root.path(), SMALL, &npm).await.unwrap();
    let npm = npm_script(host.path(), "exit 1");
    installed(root.path(), SMALL, &npm).await.unwrap();
}

/// The packages of `SMALL` with its main one in another version.
fn in_version(version: &str) -> Packages {
    SMALL.in_version(&Version::parse(version).unwrap()).unwrap()
}

#[tokio::test]
async fn another_version_comes_with_a_lockfile_that_has_hashes_and_names_no_registry() {
    let root = tempfile::tempdir().unwrap();
    let packages = in_version("1.1.2");
    let entry = root.path().join(&packages.entry);
    installed_packages(root.path(), packages, &host_npm())
        .await
        .unwrap();
    let manifest = fs::read_to_string(entry.join("node_modules/isexe/package.json")).unwrap();
    assert!(manifest.contains("\"version\": \"1.1.2\""), "{manifest}");
    let lock = fs::read_to_string(entry.join("package-lock.json")).unwrap();
    assert!(lock.contains("\"integrity\": \"sha512-"), "{lock}");
    assert!(!lock.contains("://registry."), "{lock}");
}

#[tokio::test]
async fn a_version_that_does_not_exist_is_told_by_its_number_and_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let result = installed_packages(root.path(), in_version("99.99.99"), &host_npm()).await;
    let error = Error::from(result.unwrap_err());
    assert_eq!(error.code, Code::InstallFailed);
    assert!(
        error.message.contains("does not have isexe 99.99.99"),
        "{error}"
    );
    assert!(content(root.path()).is_empty());
}

#[tokio::test]
async fn an_unpinned_package_without_a_hash_is_refused() {
    let (root, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let lock = r#"echo '{"packages": {"node_modules/isexe": {"version": "2.0.0"}}}'"#;
    let script = format!("{INSTALLS} {lock} > \"$package/package-lock.json\"");
    let npm = npm_script(host.path(), &script);
    let result = installed_packages(root.path(), in_version("2.0.0"), &npm).await;
    let error = Error::from(result.unwrap_err());
    assert_eq!(error.code, Code::InstallFailed);
    assert!(error.message.contains("isexe has no hash"), "{error}");
    assert!(content(root.path()).is_empty());
}

#[tokio::test]
async fn npm_is_told_to_run_no_script_of_a_package() {
    let (root, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let script = format!(
        "echo \"$@\" > {}/arguments; {INSTALLS}",
        host.path().display()
    );
    let npm = npm_script(host.path(), &script);
    for packages in [SMALL.packages(), in_version("2.0.1")] {
        // The stand-in makes no lockfile, which the second one misses.
        drop(installed_packages(root.path(), packages, &npm).await);
        let arguments = fs::read_to_string(host.path().join("arguments")).unwrap();
        assert!(arguments.contains("--ignore-scripts"), "{arguments}");
    }
}

#[tokio::test]
async fn a_store_that_everybody_can_write_to_is_refused() {
    let root = tempfile::tempdir().unwrap();
    fs::set_permissions(root.path(), Permissions::from_mode(0o777)).unwrap();
    let result = installed_packages(root.path(), SMALL.packages(), &host_npm()).await;
    let error = Error::from(result.unwrap_err());
    assert_eq!(error.code, Code::InstallFailed);
    assert!(error.message.contains("chmod o-w"), "{error}");
}

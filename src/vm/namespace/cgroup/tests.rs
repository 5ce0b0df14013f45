use std::process::{Child, Command};

use super::hierarchy::Unified;
use super::*;

/// A process that this test may put anywhere.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().expect("sleep"))
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }

    fn cgroups(&self) -> String {
        fs::read_to_string(format!("/proc/{}/cgroup", self.pid())).expect("it runs")
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("it has ended");
    }
}

/// Files like those of a cgroup of v2 that was delegated: what is written to them can be read.
fn delegated(controllers: &str, enabled: &str, members: &str) -> (tempfile::TempDir, Hierarchies) {
    let mount = tempfile::tempdir().expect("a directory");
    let own = mount.path().join("app.scope");
    fs::create_dir(&own).expect("made");
    for (file, content) in [
        ("cgroup.controllers", controllers),
        ("cgroup.subtree_control", enabled),
        ("cgroup.procs", members),
    ] {
        fs::write(own.join(file), content).expect("written");
    }
    let mut hierarchies = Hierarchies::default();
    hierarchies.v2 = Some(Unified {
        mount: mount.path().to_owned(),
        own,
    });
    (mount, hierarchies)
}

fn limited(
    hierarchies: &Hierarchies,
    controller: Controller,
    value: u64,
    file: &str,
) -> Result<String, String> {
    let mut directories = Vec::new();
    let place = place::make(hierarchies, controller, "agentvm-test", &mut directories)?;
    place.limit(controller, value)?;
    assert_eq!(place.mechanism(), Mechanism::Cgroup2);
    Ok(fs::read_to_string(directories[0].join(file)).expect(file))
}

#[test]
fn limits_of_v2_are_written_as_the_kernel_reads_them() {
    let (_mount, hierarchies) = delegated("cpu memory pids", "cpu memory pids", "");
    for (controller, value, file, written) in [
        (Controller::Memory, 1 << 28, "memory.max", "268435456"),
        (Controller::Cpu, 1500, "cpu.max", "150000 100000"),
        (Controller::Pids, 64, "pids.max", "64"),
    ] {
        let own = hierarchies.v2.as_ref().expect("v2").own.clone();
        assert_eq!(
            limited(&hierarchies, controller, value, file).as_deref(),
            Ok(written)
        );
        fs::remove_dir_all(own.join("agentvm-test")).expect("removed");
    }
}

#[test]
fn a_controller_that_was_not_delegated_is_named() {
    let (_mount, hierarchies) = delegated("memory", "memory", "");
    let refused = limited(&hierarchies, Controller::Cpu, 1000, "cpu.max").expect_err("no cpu");
    assert!(refused.contains("no cpu controller"), "{refused}");
}

#[test]
fn a_cgroup_of_v1_limits_what_enters_it_and_is_gone_afterwards() {
    let hierarchies = Hierarchies::of_this_process();
    if !nix::unistd::geteuid().is_root() || hierarchies.v1(Controller::Memory).is_none() {
        return; // v1 has no delegation
    }
    let (cgroup, refused) = Cgroup::make(Wanted {
        memory_bytes: Some(64 << 20),
        milli_cpus: Some(500),
        pids: Some(7),
    });
    assert!(refused.is_empty(), "{refused:?}");
    let sleeper = Sleeper::start();
    cgroup.enter(sleeper.pid()).expect("entered");
    let directories = cgroup.directories.clone();
    let name = directories[0].file_name().expect("a name");
    let cgroups = sleeper.cgroups();
    assert!(cgroups.contains(name.to_str().expect("ASCII")), "{cgroups}");
    assert_eq!(cgroup.counted().pids, Some(1));
    assert!(cgroup.counted().memory_bytes.is_some());
    assert!(cgroup.counted().cpu_ms.is_some());
    drop(sleeper);
    drop(cgroup);
    for directory in directories {
        assert!(!directory.exists(), "{}", directory.display());
    }
}

/// Without controllers, as where v2 is mounted beside v1: what the kernel does with directories and
/// members is the same.
#[test]
fn a_cgroup_of_v2_takes_a_process_in_and_is_gone_afterwards() {
    let Some(Unified { own, .. }) = Hierarchies::of_this_process().v2 else {
        return;
    };
    let directory = own.join(name::next());
    if fs::create_dir(&directory).is_err() {
        return; // not delegated to this user
    }
    let mut cgroup = Cgroup::default();
    cgroup.directories.push(directory.clone());
    let sleeper = Sleeper::start();
    cgroup.enter(sleeper.pid()).expect("entered");
    let members = fs::read_to_string(directory.join("cgroup.procs")).expect("members");
    assert_eq!(members.trim(), sleeper.pid().to_string());
    drop(sleeper);
    drop(cgroup);
    assert!(!directory.exists());
}

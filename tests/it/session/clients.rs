//! Several clients and processes on one data directory.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use agentvm::error::Code;
use agentvm::store::Status;

use super::fixture::{Listener, Log, World, code, within};

#[tokio::test]
async fn two_clients_share_a_vm_and_the_first_close_does_not_end_it() {
    let world = World::new().await;
    let session = world.session().await;
    let (other, vm) = world.another_client();
    let pid = world.text(session, "pid").await;
    within(other.close()).await.unwrap();
    assert_eq!(code(vm.wake().await), Code::ClientClosed);
    assert_eq!(world.text(session, "pid").await, pid);
    world.close().await;
}

#[tokio::test]
async fn a_closed_client_refuses_and_another_goes_on_where_it_was() {
    let world = World::new().await;
    let session = world.session().await;
    world.run(session, "say one").await.unwrap();
    within(world.client.close()).await.unwrap();
    within(world.client.close()).await.unwrap();
    assert_eq!(code(world.run(session, "say x").await), Code::ClientClosed);
    let (client, vm) = world.another_client();
    assert_eq!(vm.sessions().await.unwrap()[0].status, Status::Suspended);
    let prompt = agentvm::session::text_prompt("remember");
    let turn = within(vm.send_prompt(session, prompt)).await.unwrap();
    assert_eq!(turn.text, "2");
    within(client.close()).await.unwrap();
}

#[tokio::test]
async fn closing_the_client_in_a_turn_cancels_it() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(session, "say working\ncancel");
    listener.said("working").await;
    within(world.client.close()).await.unwrap();
    assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
    let (client, vm) = world.another_client();
    let log = Log::read(&vm, session).await;
    assert_eq!(log.turn_ends()[0]["stopReason"], "cancelled");
    within(client.close()).await.unwrap();
}

#[tokio::test]
async fn a_client_that_is_closed_while_its_vm_boots_leaves_none_running() {
    let world = World::new().await;
    let vm = world.vm.clone();
    let waking = tokio::spawn(async move { vm.wake().await });
    tokio::task::yield_now().await;
    within(world.client.close()).await.unwrap();
    // It booted before the close, or was refused: either way nothing holds the VM now.
    drop(within(waking).await.unwrap());
    let mut host = Host::start(&world.data, "boot");
    host.line("booted");
}

/// Another process on the same data.
pub(super) struct Host {
    process: std::process::Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Host {
    pub(super) fn start(data: &Path, what: &str) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "session::clients::host_process", "--ignored"])
            .arg("--nocapture")
            .env("AGENTVM_TEST_DATA", data)
            .env("AGENTVM_TEST_DO", what)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, lines }
    }

    /// The rest of the next line that starts with `prefix`.
    pub(super) fn line(&mut self, prefix: &str) -> String {
        let mut seen = Vec::new();
        for line in self.lines.by_ref() {
            let line = line.unwrap();
            if let Some(rest) = line.strip_prefix(prefix) {
                return rest.trim().to_owned();
            }
            seen.push(line);
        }
        panic!("no line {prefix:?} in {seen:#?}")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Not a test of its own.
#[tokio::test]
#[ignore = "a host process that other tests start"]
async fn host_process() {
    let (Some(data), Ok(what)) = (
        std::env::var_os("AGENTVM_TEST_DATA"),
        std::env::var("AGENTVM_TEST_DO"),
    ) else {
        return;
    };
    let world = World::at(tempfile::tempdir().unwrap(), data.into()).await;
    println!();
    if what == "boot" {
        world.vm.wake().await.unwrap();
        println!("booted");
    } else if what == "files" {
        super::sleep::write_everywhere(&world).await;
        println!("written");
    } else if what == "create" {
        // One that hangs while it is made.
        let moment = [("SECRET", "x"), ("ON_NEW", "say started\nhang")];
        let listener = Listener::of(&world.vm);
        tokio::join!(async { drop(world.create(&moment).await) }, async {
            listener.said("started").await;
            println!("creating");
        });
    } else {
        let session = world.session().await;
        world.run(session, "say before").await.unwrap();
        let listener = Listener::of(&world.vm);
        let turn = world.start(session, "say working\nhang");
        listener.said("working").await;
        println!("session {session}");
        drop(turn.await);
    }
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_vm_that_another_process_has_open_is_busy_and_its_history_readable() {
    let world = World::new().await;
    let mut host = Host::start(&world.data, "turn");
    let session = agentvm::ids::SessionId::parse(&host.line("session")).unwrap();
    assert_eq!(code(world.run(session, "say x").await), Code::VmBusy);
    assert_eq!(
        world.log(session).await.agent_texts(),
        ["before", "working"]
    );
    drop(host);
    world.close().await;
}

#[tokio::test]
async fn history_in_a_data_directory_that_others_can_change_is_not_read() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new().await;
    let session = world.session().await;
    world.vm.sleep().await.unwrap();
    let mode = |mode| std::fs::set_permissions(&world.data, PermissionsExt::from_mode(mode));
    mode(0o777).unwrap();
    let error = world.vm.sessions().await.unwrap_err();
    assert_eq!(error.code, Code::Errno("EACCES"));
    assert!(error.message.contains("dataDir"), "{error}");
    mode(0o700).unwrap();
    assert_eq!(world.record(session).await.id, session);
    world.close().await;
}

#[tokio::test]
async fn a_turn_whose_host_process_was_killed_ends_once_as_interrupted() {
    let world = World::new().await;
    let mut host = Host::start(&world.data, "turn");
    let session = agentvm::ids::SessionId::parse(&host.line("session")).unwrap();
    drop(host);
    let before = world.log(session).await.0.len();
    assert_eq!(world.text(session, "remember").await, "3");
    world.vm.close_session(session).await.unwrap();
    assert_eq!(world.text(session, "remember").await, "4");
    let log = world.log(session).await;
    let ends = log.turn_ends();
    assert_eq!(ends.len(), 4);
    assert!(ends[1]["interrupted"]["reason"].is_string(), "{ends:?}");
    let interrupted = ends.iter().filter(|end| end.get("interrupted").is_some());
    assert_eq!(interrupted.count(), 1);
    assert_eq!(&*log.0[before].method, "_agentvm/turn_end");
    world.close().await;
}

#[tokio::test]
async fn a_session_whose_host_process_was_killed_while_it_was_made_is_cleared_away() {
    let world = World::new().await;
    let mut host = Host::start(&world.data, "create");
    host.line("creating");
    drop(host);
    assert_eq!(world.vm.sessions().await.unwrap(), []);
    let session = world.session().await;
    assert_eq!(world.env_files().len(), 1);
    assert_eq!(world.state_directories().await, format!("{session}\n"));
    world.close().await;
}

//! A client whose one agent is `agent.js`: a real VM, the real store and real pipes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agentvm::agents::AgentStore;
use agentvm::error::{Code, Error};
use agentvm::ids::{Seq, SessionId, VmKey};
use agentvm::session::{
    Client, ClientOptions, CreatedSession, Item, Notice, PermissionRequest, SessionOptions,
    Settings, TurnResult, VmHandle, text_prompt,
};
use agentvm::store::{Query, SessionRecord, StoredEvent};
use agentvm::vm::exec::{ExecEnd, ExecOptions};
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::agents::{node, package_of, shared};

/// Longest line that an agent of these tests may send.
pub(super) const LIMIT: usize = 1 << 20;

/// Nothing here takes so long, unless it hangs.
pub(super) const LONG: Duration = Duration::from_mins(1);

pub(super) struct World {
    pub(super) settings: Settings,
    pub(super) data: PathBuf,
    pub(super) client: Client,
    pub(super) vm: VmHandle,
    _directory: tempfile::TempDir,
}

impl World {
    /// The requests for permission that wait, the oldest first.
    pub(super) fn pending(&self) -> Vec<(SessionId, PermissionRequest)> {
        let mut after = Uuid::nil();
        let next = || {
            let next = self.vm.next_pending_permission(after).unwrap()?;
            after = next.1.permission_id;
            Some(next)
        };
        std::iter::from_fn(next).collect()
    }

    pub(super) async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        Self::at(directory, data).await
    }

    pub(super) async fn at(directory: tempfile::TempDir, data: PathBuf) -> Self {
        let (installed, _, _own) = shared().await;
        let package = package_of(directory.path(), include_str!("agent.js"));
        let settings = Settings {
            auto_install: false,
            max_message_bytes: LIMIT,
            ..Settings::new(AgentStore::new(
                installed.root().to_owned(),
                package,
                node(),
            ))
        };
        Self::with(directory, data, settings)
    }

    pub(super) fn with(directory: tempfile::TempDir, data: PathBuf, settings: Settings) -> Self {
        let client = open(&data, &settings);
        Self {
            vm: vm_of(&client),
            client,
            data,
            settings,
            _directory: directory,
        }
    }

    /// The same with a client of its own.
    pub(super) fn beside(&self) -> Self {
        let (client, vm) = self.another_client();
        Self {
            settings: self.settings.clone(),
            data: self.data.clone(),
            client,
            vm,
            _directory: tempfile::tempdir().unwrap(),
        }
    }

    /// Another client on the same data.
    pub(super) fn another_client(&self) -> (Client, VmHandle) {
        let client = open(&self.data, &self.settings);
        let vm = vm_of(&client);
        (client, vm)
    }

    pub(super) async fn create(&self, env: &[(&str, &str)]) -> Result<CreatedSession, Error> {
        let abort = std::future::pending();
        within(self.vm.create_session("pi", options(env), abort)).await
    }

    pub(super) async fn session(&self) -> SessionId {
        self.session_with(&[]).await
    }

    pub(super) async fn session_with(&self, env: &[(&str, &str)]) -> SessionId {
        self.create(env).await.unwrap().id
    }

    /// Runs a turn in which the agent does what `script` says.
    pub(super) async fn run(&self, session: SessionId, script: &str) -> Result<TurnResult, Error> {
        within(self.vm.send_prompt(session, text_prompt(script))).await
    }

    /// A turn that runs beside the test.
    pub(super) fn start(
        &self,
        session: SessionId,
        script: &str,
    ) -> JoinHandle<Result<TurnResult, Error>> {
        let (vm, prompt) = (self.vm.clone(), text_prompt(script));
        tokio::spawn(async move { within(vm.send_prompt(session, prompt)).await })
    }

    /// The text of a turn that has to succeed.
    pub(super) async fn text(&self, session: SessionId, script: &str) -> String {
        self.run(session, script).await.unwrap().text
    }

    pub(super) async fn log(&self, session: SessionId) -> Log {
        Log::read(&self.vm, session).await
    }

    pub(super) async fn record(&self, session: SessionId) -> SessionRecord {
        let records = self.vm.sessions().await.unwrap();
        let mut own = records.into_iter().filter(|record| record.id == session);
        own.next().unwrap()
    }

    pub(super) async fn sh(&self, command: &str) -> String {
        let run = self.vm.exec(command, ExecOptions::default());
        match within(run).await.unwrap() {
            ExecEnd::Exited(output) => String::from_utf8(output.stdout).unwrap(),
            ExecEnd::TimedOut(_) => unreachable!("no time limit was given"),
        }
    }

    /// Pids of the agents that run in the VM.
    pub(super) async fn agents(&self) -> Vec<String> {
        // The brackets keep the shell that looks from finding itself.
        let found = self.sh("pgrep -f '[m]ain.js' || true").await;
        found.lines().map(ToOwned::to_owned).collect()
    }

    /// The VM's directory on the host.
    pub(super) fn directory(&self) -> PathBuf {
        self.data.join("vms").join(key().id().to_string())
    }

    /// Files of kept environments.
    pub(super) fn env_files(&self) -> Vec<PathBuf> {
        let Ok(found) = fs::read_dir(self.directory().join("env")) else {
            return Vec::new();
        };
        found.map(|entry| entry.unwrap().path()).collect()
    }

    /// State directories of sessions in the VM.
    pub(super) async fn state_directories(&self) -> String {
        self.sh("ls -A /var/lib/agentvm/sessions 2>/dev/null || true")
            .await
    }

    /// Nothing is left of a session that could not be made.
    pub(super) async fn assert_nothing_half_made(&self) {
        assert_eq!(self.vm.sessions().await.unwrap(), []);
        assert_eq!(self.env_files(), Vec::<PathBuf>::new());
        assert_eq!(self.state_directories().await, "");
        assert_eq!(self.agents().await, Vec::<String>::new());
        self.vm.sleep().await.unwrap();
        if !self.directory().join("vm.db").exists() {
            return;
        }
        let file = rusqlite::Connection::open(self.directory().join("vm.db"));
        let rows = file
            .unwrap()
            .query_row("SELECT count(*) FROM sessions", [], |row| row.get(0));
        assert_eq!(rows, Ok(0), "records that nobody lists");
    }

    pub(super) async fn close(self) {
        within(self.client.close()).await.unwrap();
    }
}

pub(super) fn open(data: &Path, settings: &Settings) -> Client {
    Client::new(ClientOptions {
        data_dir: data.to_owned(),
        settings: settings.clone(),
    })
}

pub(super) fn key() -> VmKey {
    VmKey::new(vec!["test".to_owned()]).unwrap()
}

pub(super) fn vm_of(client: &Client) -> VmHandle {
    client.vm(key()).unwrap()
}

pub(super) fn options(env: &[(&str, &str)]) -> SessionOptions {
    let env = env.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
    SessionOptions {
        env: env.collect::<BTreeMap<_, _>>(),
        ..SessionOptions::default()
    }
}

/// A wait that fails instead of hanging.
pub(super) async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, work).await.expect("a hang")
}

pub(super) fn code<T>(result: Result<T, Error>) -> Code {
    result.err().expect("an error").code
}

/// The events of a session, which are checked to be numbered 1, 2, 3, ….
pub(super) struct Log(pub(super) Vec<StoredEvent>);

impl Log {
    pub(super) async fn read(vm: &VmHandle, session: SessionId) -> Self {
        let query = Query {
            since: Seq(0),
            method: None,
            limit: None,
            max_bytes: u64::MAX,
        };
        let page = within(vm.events(session, query)).await.unwrap();
        let numbers: Vec<_> = page.events.iter().map(|event| event.seq.0).collect();
        let count = numbers.len() as u64;
        assert_eq!(numbers, (1..=count).collect::<Vec<_>>());
        Self(page.events)
    }

    pub(super) fn events(&self) -> Vec<Value> {
        let parse = |event: &StoredEvent| serde_json::from_str(&event.json).unwrap();
        self.0.iter().map(parse).collect()
    }

    /// Params of the events of a method.
    pub(super) fn of(&self, method: &str) -> Vec<Value> {
        let own = |event: &Value| event["method"] == method;
        let events = self.events().into_iter().filter(own);
        events.map(|event| event["params"].clone()).collect()
    }

    /// Texts of all updates of this kind.
    pub(super) fn texts(&self, kind: &str) -> Vec<String> {
        let updates = self.of("session/update").into_iter();
        updates
            .filter(|params| params["update"]["sessionUpdate"] == kind)
            .map(|params| {
                params["update"]["content"]["text"]
                    .as_str()
                    .unwrap()
                    .to_owned()
            })
            .collect()
    }

    pub(super) fn agent_texts(&self) -> Vec<String> {
        self.texts("agent_message_chunk")
    }

    pub(super) fn turn_ends(&self) -> Vec<Value> {
        self.of("_agentvm/turn_end")
    }
}

/// Takes everything that a subscription tells.
pub(super) struct Listener {
    seen: Arc<Mutex<Vec<Item>>>,
    count: watch::Receiver<usize>,
    task: JoinHandle<()>,
}

impl Listener {
    pub(super) fn of(vm: &VmHandle) -> Self {
        let subscription = vm.subscribe().unwrap();
        let seen: Arc<Mutex<Vec<Item>>> = Arc::default();
        let (counted, count) = watch::channel(0);
        let own = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            while let Ok(items) = subscription.next().await {
                own.lock().unwrap().extend(items.iter().cloned());
                subscription.taken(&items);
                counted.send_modify(|count| *count += items.len());
            }
        });
        Self { seen, count, task }
    }

    pub(super) fn numbers(&self, session: SessionId) -> Vec<u64> {
        let seen = self.seen.lock().unwrap();
        let numbers = seen.iter().filter_map(|item| match item {
            Item::Event {
                session: own, seq, ..
            } if *own == session => Some(seq.0),
            _ => None,
        });
        numbers.collect()
    }

    pub(super) fn items(&self) -> Vec<Item> {
        self.seen.lock().unwrap().clone()
    }

    pub(super) fn notices(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        let notices = seen.iter().filter_map(|item| match item {
            Item::Notice(Notice::VmBooted { .. }) => Some("booted".to_owned()),
            Item::Notice(Notice::VmShutdown { reason }) => Some(format!("{reason:?}")),
            _ => None,
        });
        notices.collect()
    }

    /// Waits until the agent has said `text`; a prompt that contains it does not count.
    pub(super) async fn said(&self, text: &str) {
        let text = format!("\"text\":\"{text}\"");
        self.heard(&text).await;
    }

    /// Waits until an event contains `text`.
    pub(super) async fn heard(&self, text: &str) {
        self.until(|item| matches!(item, Item::Event { json, .. } if json.contains(text)))
            .await;
    }

    pub(super) async fn until(&self, is_it: impl Fn(&Item) -> bool + Send + Sync) {
        let mut count = self.count.clone();
        within(async {
            while !self.seen.lock().unwrap().iter().any(&is_it) {
                count.changed().await.unwrap();
            }
        })
        .await;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

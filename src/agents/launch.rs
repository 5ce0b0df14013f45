//! How an agent is started for a session.

use std::collections::BTreeMap;
use std::path::Path;

use super::runtime;
use super::store::{InStore, Installed};
use crate::ids::SessionId;
use crate::vm::namespace::AGENTS;
use crate::vm::{GuestPath, User, environment};

/// Where an agent keeps its compiled scripts that has none in the store: durable, and `user`'s in every
/// VM.
const COMPILE_CACHE: &str = "/var/cache/agentvm/node";

/// What of a session an agent's start depends on.
#[derive(Debug, Clone, Copy)]
pub struct SessionSpec<'a> {
    pub id: SessionId,
    pub cwd: &'a GuestPath,
    /// The session's own environment.
    pub env: &'a [(String, String)],
    /// Whether the agent has to ask before it changes anything; else it never should.
    pub asks: bool,
}

impl SessionSpec<'_> {
    /// A variable of the session's own environment.
    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        // The last of a name counts.
        let named = self.env.iter().rev().find(|(own, _)| own == name);
        named.map(|(_, value)| value.as_str())
    }
}

/// What to start, as `user`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    pub argv: Vec<String>,
    /// Everything, down to HOME and PATH: nothing has to be added.
    pub env: Vec<(String, String)>,
    pub cwd: GuestPath,
    /// For what the agent must keep between two starts for this session; it is told in
    /// `AGENTVM_STATE_DIR`. To be made before the start, and to be removed with the session.
    pub state_dir: GuestPath,
    /// To be there, in `state_dir`, before every start.
    pub links: Vec<Link>,
    /// The file, in `state_dir`, from which the agent reads the session's instructions; `None`: it takes
    /// them when a conversation is opened.
    pub instructions: Option<&'static str>,
    /// Directories of the VM in which an agent that was killed leaves locks, `*.lock`, which would keep the
    /// next one waiting. What lies there since before the VM booted is nobody's: to be removed before the
    /// start.
    pub lock_dirs: Vec<String>,
    /// Directory, in the VM, of the agent's own programs; `None`: it is not known.
    pub programs: Option<String>,
    /// The Node, in the VM, with which is found out what transport a remote MCP server speaks, if its
    /// caller did not say. `None`: the agent does it itself, as `_meta.agentvm.transport` asks it to, or
    /// is not ours.
    pub transports_are_found_by: Option<String>,
}

/// A symbolic link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Relative to the state directory.
    pub path: &'static str,
    /// A path of the VM, where nothing need be.
    pub target: String,
}

impl Launch {
    /// What a variable is set to; empty if it is not.
    pub(super) fn variable(&self, name: &str) -> &str {
        let named = self.env.iter().find(|(own, _)| own == name);
        named.map_or("", |(_, value)| value)
    }

    /// Sets a variable, unless the session has one of that name.
    pub(super) fn default_variable(
        &mut self,
        session: &SessionSpec<'_>,
        name: &str,
        value: impl Into<String>,
    ) {
        if session.variable(name).is_none() {
            self.set_variable(name, value);
        }
    }

    fn set_variable(&mut self, name: &str, value: impl Into<String>) {
        self.env.retain(|(own, _)| own != name);
        self.env.push((name.to_owned(), value.into()));
    }

    /// An absolute path for one that is relative to the state directory.
    pub(super) fn in_state_dir(&self, path: &str) -> String {
        format!("{}/{path}", self.state_dir.as_str())
    }
}

/// The plan for a session of an agent.
///
/// The session's own environment comes before the agent's, and this before the VM's. Only the `PATH` of
/// a built-in agent is put together: the session's, or the VM's default, and the store's Node and npm
/// *last*, so that a Node of the VM's own stays the one that the agent's tools find.
#[must_use]
pub fn launch(agent: &Installed, session: &SessionSpec<'_>) -> Launch {
    match agent {
        Installed::BuiltIn(agent) => launch_from_store(agent, session),
        Installed::Own(agent) => {
            let mut argv = vec![agent.command.clone()];
            argv.extend_from_slice(&agent.args);
            plan(argv, agent.env.clone(), session)
        }
    }
}

fn launch_from_store(agent: &InStore, session: &SessionSpec<'_>) -> Launch {
    let definition = agent.agent.definition();
    let store = Path::new(AGENTS);
    let runtime = store.join(&agent.runtime);
    let program = text(&store.join(&agent.entry).join(&agent.program));
    let argv = vec![text(&runtime::node(&runtime)), program];
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    let mut defaults: Vec<_> = definition.env.iter().map(owned).collect();
    let cache = &agent.compile_cache;
    let directory = if cache.is_there {
        // Read-only: Node takes what is there, and compiles the rest each time.
        text(&store.join(&agent.entry).join(&cache.name))
    } else {
        COMPILE_CACHE.to_owned()
    };
    defaults.push(("NODE_COMPILE_CACHE".to_owned(), directory));
    let mut launch = plan(argv, defaults, session);
    launch.programs = Some(text(&store.join(&agent.entry)));
    let bin = text(&runtime.join(runtime::BIN));
    if let Some((_, path)) = launch.env.iter_mut().find(|(name, _)| name == "PATH") {
        *path = format!("{path}:{bin}");
    }
    if !definition.finds_transports {
        launch.transports_are_found_by = Some(text(&runtime::node(&runtime)));
    }
    (definition.configure)(session, &mut launch);
    launch
}

/// `defaults`: of the agent, unless the session sets them otherwise.
fn plan(argv: Vec<String>, defaults: Vec<(String, String)>, session: &SessionSpec<'_>) -> Launch {
    let state_dir = state_dir(session.id);
    // The last of a name counts.
    let state = state_dir.as_str().to_owned();
    let layers = std::iter::once(("AGENTVM_STATE_DIR".to_owned(), state))
        .chain(defaults)
        .chain(session.env.iter().cloned());
    let env: BTreeMap<_, _> = layers.collect();
    Launch {
        argv,
        env: environment::merge(User::User, env.into_iter().collect()),
        cwd: session.cwd.clone(),
        state_dir,
        links: Vec::new(),
        instructions: None,
        lock_dirs: Vec::new(),
        programs: None,
        transports_are_found_by: None,
    }
}

/// Where in the VM an agent keeps its state of a session.
#[must_use]
pub fn state_dir(session: SessionId) -> GuestPath {
    let path = format!("/var/lib/agentvm/sessions/{session}");
    GuestPath::new(&path).unwrap_or_else(|_| GuestPath::home())
}

/// Paths inside the store are our own ASCII names.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;
    use crate::agents::store::CompileCache;
    use crate::agents::{BuiltIn, OwnAgent};

    fn variables(env: &[(&str, &str)]) -> Vec<(String, String)> {
        let variable = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        env.iter().map(variable).collect()
    }

    fn plan(env: &[(&str, &str)]) -> Launch {
        plan_with(false, env)
    }

    fn plan_with(is_compiled: bool, env: &[(&str, &str)]) -> Launch {
        let installed = Installed::BuiltIn(InStore {
            agent: BuiltIn::Pi,
            runtime: "node-1".to_owned(),
            entry: "pi-1".to_owned(),
            program: "adapter-1/main.js".into(),
            compile_cache: CompileCache {
                name: "compile-cache-1".to_owned(),
                is_there: is_compiled,
            },
            leases: Vec::new(),
            is_new: false,
        });
        plan_of(&installed, env)
    }

    fn plan_of(installed: &Installed, env: &[(&str, &str)]) -> Launch {
        let env = variables(env);
        let session = SessionSpec {
            id: SessionId::parse("0190f5fe-7c00-7000-8000-000000000001").unwrap(),
            cwd: &GuestPath::new("/srv").unwrap(),
            env: &env,
            asks: false,
        };
        launch(installed, &session)
    }

    fn variable<'a>(launch: &'a Launch, name: &str) -> Vec<&'a str> {
        let named = launch.env.iter().filter(|(own, _)| own == name);
        named.map(|(_, value)| value.as_str()).collect()
    }

    #[test]
    fn the_adapter_runs_on_the_stores_node() {
        let launch = plan(&[]);
        assert_eq!(
            launch.argv,
            [
                "/opt/agentvm/agents/node-1/bin/node",
                "/opt/agentvm/agents/pi-1/adapter-1/main.js"
            ]
        );
        assert_eq!(launch.cwd.as_str(), "/srv");
    }

    #[test]
    fn each_session_has_a_state_directory_of_its_own() {
        let launch = plan(&[]);
        let directory = "/var/lib/agentvm/sessions/0190f5fe-7c00-7000-8000-000000000001";
        assert_eq!(launch.state_dir.as_str(), directory);
        assert_eq!(variable(&launch, "AGENTVM_STATE_DIR"), [directory]);
    }

    #[test]
    fn the_sessions_environment_wins_over_the_agents_and_the_vms() {
        let launch = plan(&[("PI_OFFLINE", "0"), ("HOME", "/srv"), ("MINE", "1")]);
        assert_eq!(variable(&launch, "PI_OFFLINE"), ["0"]);
        assert_eq!(variable(&launch, "PI_TELEMETRY"), ["0"]);
        assert_eq!(variable(&launch, "HOME"), ["/srv"]);
        assert_eq!(variable(&launch, "MINE"), ["1"]);
        assert_eq!(variable(&launch, "USER"), ["user"]);
    }

    #[test]
    fn the_stores_node_is_last_on_the_path() {
        let bin = "/opt/agentvm/agents/node-1/bin";
        let default = format!("{}:{bin}", environment::path(User::User));
        assert_eq!(variable(&plan(&[]), "PATH"), [default.as_str()]);
        let own = format!("/srv/bin:{bin}");
        assert_eq!(
            variable(&plan(&[("PATH", "/srv/bin")]), "PATH"),
            [own.as_str()]
        );
    }

    #[test]
    fn node_takes_compiled_scripts_from_the_store_or_keeps_its_own_in_the_vm() {
        for (is_there, directory) in [
            (true, "/opt/agentvm/agents/pi-1/compile-cache-1"),
            (false, COMPILE_CACHE),
        ] {
            let launch = plan_with(is_there, &[]);
            assert_eq!(variable(&launch, "NODE_COMPILE_CACHE"), [directory]);
        }
    }

    #[test]
    fn an_own_agent_is_its_command_with_nothing_of_the_store() {
        let env = variables(&[("A", "agent"), ("B", "agent"), ("LANG", "agent")]);
        let args = vec!["--acp".to_owned()];
        let agent = OwnAgent::new("bot".to_owned(), "botd".to_owned(), args, env).unwrap();
        let launch = plan_of(&Installed::Own(agent.into()), &[("B", "session")]);
        assert_eq!(launch.argv, ["botd", "--acp"]);
        assert_eq!(variable(&launch, "A"), ["agent"]);
        assert_eq!(variable(&launch, "B"), ["session"]);
        assert_eq!(variable(&launch, "LANG"), ["agent"]);
        assert_eq!(variable(&launch, "PATH"), [&*environment::path(User::User)]);
        assert_eq!(variable(&launch, "HOME"), [GuestPath::HOME]);
        assert_eq!(
            variable(&launch, "AGENTVM_STATE_DIR"),
            [launch.state_dir.as_str()]
        );
        let of_store = launch.env.iter().find(|(_, value)| value.contains(AGENTS));
        assert_eq!(of_store, None);
    }
}

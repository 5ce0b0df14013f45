//! How an agent is started for a session.

use std::path::Path;

use super::adapter;
use super::runtime;
use super::store::Installed;
use crate::ids::SessionId;
use crate::vm::namespace::AGENTS;
use crate::vm::{GuestPath, User, environment};

/// Where agents keep compiled scripts: durable, and `user`'s in every VM.
const COMPILE_CACHE: &str = "/var/cache/agentvm/node";

/// What of a session an agent's start depends on.
#[derive(Debug, Clone, Copy)]
pub struct SessionSpec<'a> {
    pub id: SessionId,
    pub cwd: &'a GuestPath,
    /// The session's own environment.
    pub env: &'a [(String, String)],
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
}

/// The plan for a session of an installed agent.
///
/// The session's own environment comes before the agent's defaults, and these before the VM's. Only
/// `PATH` is put together: the session's, or the VM's default, and the store's Node and npm *last*, so
/// that a Node of the VM's own stays the one that the agent's tools find.
#[must_use]
pub fn launch(installed: &Installed, session: &SessionSpec<'_>) -> Launch {
    let definition = installed.agent.definition();
    let store = Path::new(AGENTS);
    let runtime = store.join(&installed.runtime);
    let main = store
        .join(&installed.entry)
        .join(&installed.adapter)
        .join(adapter::MAIN);
    let state_dir = state_dir(session.id);

    let own = |name: &str| session.env.iter().rfind(|(own, _)| own == name);
    let path = own("PATH").map_or(environment::PATH, |(_, path)| path);
    let path = format!("{path}:{}", text(&runtime.join(runtime::BIN)));
    let defaults = definition
        .env
        .iter()
        .copied()
        .chain([
            ("AGENTVM_STATE_DIR", state_dir.as_str()),
            ("NODE_COMPILE_CACHE", COMPILE_CACHE),
        ])
        .filter(|(name, _)| own(name).is_none())
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let given = session.env.iter().filter(|(name, _)| name != "PATH");
    let mut env: Vec<_> = defaults.chain(given.cloned()).collect();
    env.push(("PATH".to_owned(), path));
    Launch {
        argv: vec![text(&runtime::node(&runtime)), text(&main)],
        env: environment::merge(User::User, env),
        cwd: session.cwd.clone(),
        state_dir,
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
    use crate::agents::Agent;

    fn plan(env: &[(&str, &str)]) -> Launch {
        let installed = Installed {
            agent: Agent::Pi,
            runtime: "node-1".to_owned(),
            entry: "pi-1".to_owned(),
            adapter: "adapter-1".to_owned(),
        };
        let env: Vec<_> = env
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let session = SessionSpec {
            id: SessionId::parse("0190f5fe-7c00-7000-8000-000000000001").unwrap(),
            cwd: &GuestPath::new("/srv").unwrap(),
            env: &env,
        };
        launch(&installed, &session)
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
        let default = format!("{}:{bin}", environment::PATH);
        assert_eq!(variable(&plan(&[]), "PATH"), [default.as_str()]);
        let own = format!("/srv/bin:{bin}");
        assert_eq!(
            variable(&plan(&[("PATH", "/srv/bin")]), "PATH"),
            [own.as_str()]
        );
    }
}

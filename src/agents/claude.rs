//! Claude Code: our adapter runs Anthropic's SDK through `claude-agent-acp`, which starts the native
//! program `claude` for each session.

use std::sync::LazyLock;

use super::catalog::Definition;
use super::launch::{Launch, Link, SessionSpec};
use super::pinned::Pinned;

pub(super) const PACKAGES: Pinned = Pinned {
    name: "claude",
    version: "0.101.0",
    package: "@agentclientprotocol/claude-agent-acp",
    manifest: include_str!("locks/claude/package.json"),
    lock: include_str!("locks/claude/package-lock.json"),
    files: &[
        "node_modules/@agentclientprotocol/claude-agent-acp/dist/acp-agent.js",
        #[cfg(target_arch = "x86_64")]
        "node_modules/@anthropic-ai/claude-agent-sdk-linux-x64/claude",
        #[cfg(target_arch = "aarch64")]
        "node_modules/@anthropic-ai/claude-agent-sdk-linux-arm64/claude",
    ],
};

pub(super) static CLAUDE: Definition = Definition {
    name: "claude",
    packages: PACKAGES,
    entry: LazyLock::new(|| PACKAGES.entry()),
    adapter: "claude",
    env: &[
        // It asks nobody but the model's provider, unless it is told to.
        ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"),
        ("CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL", "1"),
        ("DISABLE_AUTOUPDATER", "1"),
        ("DISABLE_ERROR_REPORTING", "1"),
        ("DISABLE_TELEMETRY", "1"),
        // Another request to the model after each turn, for what the user might say next.
        ("CLAUDE_CODE_ENABLE_PROMPT_SUGGESTION", "false"),
        // The model sees the tools of MCP servers, not a tool that searches for them.
        ("ENABLE_TOOL_SEARCH", "false"),
        // Milliseconds: `npx` may have to download a server first.
        ("MCP_TIMEOUT", "120000"),
        // The VM is one: no further question where it is told not to ask.
        ("IS_SANDBOX", "1"),
    ],
    finds_transports: false,
    configure,
};

const CONFIG_DIR: &str = "CLAUDE_CONFIG_DIR";

/// What a user keeps for all sessions in `~/.claude`. The rest of that directory is what Claude Code keeps
/// of sessions.
const OF_THE_USER: [&str; 9] = [
    "claude/.credentials.json",
    "claude/CLAUDE.md",
    "claude/agents",
    "claude/commands",
    "claude/output-styles",
    "claude/plugins",
    "claude/rules",
    "claude/settings.json",
    "claude/skills",
];

/// The name that all agents here share, and Claude Code's own.
const MAX_RETRIES: (&str, &str) = ("AGENTVM_MAX_RETRIES", "CLAUDE_CODE_MAX_RETRIES");

/// Each session has a directory of its own, with links to what is the user's: it goes with the session,
/// and no session writes over what another one remembers.
fn configure(session: &SessionSpec<'_>, launch: &mut Launch) {
    if let Some(retries) = session.variable(MAX_RETRIES.0) {
        launch.default_variable(session, MAX_RETRIES.1, retries);
    }
    if session.variable(CONFIG_DIR).is_some() {
        return;
    }
    let of_user = format!("{}/.claude", launch.variable("HOME"));
    launch.links.extend(OF_THE_USER.map(|path| Link {
        path,
        target: path.replacen("claude", &of_user, 1),
    }));
    let directory = launch.in_state_dir("claude");
    launch.default_variable(session, CONFIG_DIR, directory);
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;
    use crate::agents::catalog::BuiltIn;
    use crate::agents::launch::launch;
    use crate::agents::store::{CompileCache, InStore, Installed};
    use crate::ids::SessionId;
    use crate::vm::GuestPath;

    fn plan(env: &[(&str, &str)]) -> Launch {
        let installed = Installed::BuiltIn(InStore {
            agent: BuiltIn::Claude,
            runtime: "node-1".to_owned(),
            entry: "claude-1".to_owned(),
            program: "adapter-1/main.js".into(),
            compile_cache: CompileCache {
                name: "compiled-1".to_owned(),
                is_there: true,
            },
            leases: Vec::new(),
            is_new: false,
        });
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let env: Vec<_> = env.iter().map(owned).collect();
        let session = SessionSpec {
            id: SessionId::parse("0190f5fe-7c00-7000-8000-000000000001").unwrap(),
            cwd: &GuestPath::home(),
            env: &env,
            asks: true,
        };
        launch(&installed, &session)
    }

    #[test]
    fn a_session_has_its_own_directory_with_what_the_user_keeps() {
        let plan = plan(&[("HOME", "/srv/me")]);
        let directory = format!("{}/claude", plan.state_dir.as_str());
        assert_eq!(plan.variable(CONFIG_DIR), directory);
        let skills = plan.links.iter().find(|link| link.path == "claude/skills");
        assert_eq!(skills.unwrap().target, "/srv/me/.claude/skills");
    }

    #[test]
    fn the_limit_of_retries_has_the_name_that_it_has_for_all_agents() {
        let (own, of_claude) = MAX_RETRIES;
        assert_eq!(plan(&[(own, "0")]).variable(of_claude), "0");
        let both = plan(&[(own, "0"), (of_claude, "2")]);
        assert_eq!(both.variable(of_claude), "2");
    }

    #[test]
    fn a_directory_that_the_session_names_is_left_alone() {
        let plan = plan(&[(CONFIG_DIR, "/srv/claude")]);
        assert_eq!(plan.variable(CONFIG_DIR), "/srv/claude");
        assert_eq!(plan.links, []);
    }
}

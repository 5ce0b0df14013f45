//! What agentvm adds to an agent's system prompt.

use std::fmt::Write as _;

use super::mcp::McpServer;
use crate::error::Result;
use crate::vm::exec::{ExecEnd, ExecOptions, exec};
use crate::vm::{DynVm, INSTRUCTIONS};

/// Programs that agents want and that not every machine has. What every Linux has goes without saying.
const PROGRAMS: &str = "git gh node npm npx pnpm yarn bun deno python3 pip3 uv gcc g++ clang make cmake \
    ninja pkg-config gdb cargo rustc go java mvn gradle dotnet ruby gem php perl lua Rscript sqlite3 psql \
    mysql redis-cli curl wget ssh rsync jq yq rg fd fzf tree tmux vim nano zip unzip xz zstd ffmpeg convert \
    pandoc pdftotext aws gcloud az terraform kubectl helm";

/// Which of [`PROGRAMS`] a process with this environment finds in the VM.
pub(super) async fn programs(vm: &DynVm, env: &[(String, String)]) -> Result<Vec<String>> {
    let path = env.iter().filter(|(name, _)| name == "PATH").cloned();
    let command = format!(
        "for name in {PROGRAMS}; do command -v \"$name\" > /dev/null && echo \"$name\"; done; true"
    );
    let options = ExecOptions {
        env: path.collect(),
        ..ExecOptions::default()
    };
    let ExecEnd::Exited(output) = exec(vm, &command, options).await? else {
        return Ok(Vec::new()); // without a time limit there is no other end
    };
    let found = String::from_utf8_lossy(&output.stdout);
    Ok(found.lines().map(str::to_owned).collect())
}

/// The text that an agent of a session gets, if there is anything to say.
///
/// `of_client` comes before `of_session`: what is general before what is particular.
pub(super) fn compose(
    skip_os: bool,
    servers: &[McpServer],
    programs: &[String],
    of_client: Option<&str>,
    of_session: Option<&str>,
) -> Option<String> {
    let (programs, tools) = (commands(programs), tools(servers));
    let parts: Vec<&str> = [
        (!skip_os).then_some(INSTRUCTIONS),
        programs.as_deref(),
        tools.as_deref(),
        of_client,
        of_session,
    ]
    .into_iter()
    .flatten()
    .map(str::trim)
    .filter(|part| !part.is_empty())
    .collect();
    (!parts.is_empty()).then(|| parts.join("\n\n"))
}

/// The tool documentation: which commands the VM has.
fn commands(programs: &[String]) -> Option<String> {
    let list = programs.join(", ");
    (!list.is_empty()).then(|| format!("Commands that are installed in this machine: {list}."))
}

/// The tool documentation: which servers the session has. Their tools describe themselves.
fn tools(servers: &[McpServer]) -> Option<String> {
    if servers.is_empty() {
        return None;
    }
    let mut text = String::from("MCP servers whose tools you have in this session:");
    for server in servers {
        let place = match server {
            // Without its arguments, which may hold secrets.
            McpServer::Local { command, .. } => format!("runs in this machine: {command}"),
            McpServer::Remote { url, .. } => format!("remote: {}", without_secrets(url)),
        };
        // Writing to a String can't fail.
        let _ = write!(text, "\n- {} ({place})", server.name());
    }
    Some(text)
}

/// A URL's query and user are where tokens are.
fn without_secrets(url: &str) -> String {
    let Ok(mut url) = url::Url::parse(url) else {
        return String::new();
    };
    url.set_query(None);
    url.set_fragment(None);
    // Fails for URLs without a host only, which have neither.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> McpServer {
        McpServer::Remote {
            name: Some("files".to_owned()),
            url: "https://me:secret@mcp.example.com/sse?token=secret".to_owned(),
            headers: [("Authorization".to_owned(), "secret".to_owned())].into(),
            transport: None,
        }
    }

    #[test]
    fn tools_are_documented_though_the_base_is_skipped() {
        let text = compose(true, &[server()], &["git".to_owned()], None, None).expect("a text");
        assert!(
            text.contains("files (remote: https://mcp.example.com/sse)"),
            "{text}"
        );
        assert!(text.contains("installed in this machine: git."), "{text}");
        assert!(!text.contains("sudo"));
        assert!(!text.contains("secret"));
        assert_eq!(compose(true, &[], &[], None, Some(" ")), None);
    }

    #[test]
    fn the_callers_words_come_last() {
        let text = compose(
            false,
            &[server()],
            &[],
            Some("Be brief."),
            Some("Write tests."),
        );
        let text = text.expect("a text");
        let place = |part| text.find(part).expect(part);
        assert!(place("agentvm") < place("files"));
        assert!(place("files") < place("Be brief."));
        assert!(text.ends_with("Be brief.\n\nWrite tests."));
    }
}

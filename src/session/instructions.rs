//! What agentvm adds to an agent's system prompt.

use std::fmt::Write as _;

use super::mcp::McpServer;

/// What is special about this machine; what every Linux has goes without saying.
const OS: &str = "\
You work in agentvm: a Linux virtual machine of your own, isolated from the machine of the person you \
work for. You can run any command and change any file here without harming anything outside.

- You are `user` (home: /home/user). There is no sudo and no way to become root.
- Files outside of /tmp, /run and /dev/shm persist. Running processes do not survive when the machine \
sleeps between turns: start what you need again.
- The public internet can be reached over TCP. Private networks and the host cannot, except through \
ports of 127.0.0.1 that were opened for you. There is no ICMP (ping) and no UDP except DNS.
- There is no systemd, no Docker, no display and no clipboard.";

/// The text that an agent of a session gets, if there is anything to say.
///
/// `of_client` comes before `of_session`: what is general before what is particular.
pub(super) fn compose(
    skip_os: bool,
    servers: &[McpServer],
    of_client: Option<&str>,
    of_session: Option<&str>,
) -> Option<String> {
    let tools = tools(servers);
    let parts: Vec<&str> = [
        (!skip_os).then_some(OS),
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
        let text = compose(true, &[server()], None, None).expect("a text");
        assert!(
            text.contains("files (remote: https://mcp.example.com/sse)"),
            "{text}"
        );
        assert!(!text.contains("sudo"));
        assert!(!text.contains("secret"));
        assert_eq!(compose(true, &[], None, Some(" ")), None);
    }

    #[test]
    fn the_callers_words_come_last() {
        let text = compose(false, &[server()], Some("Be brief."), Some("Write tests."));
        let text = text.expect("a text");
        let place = |part| text.find(part).expect(part);
        assert!(place("agentvm") < place("files"));
        assert!(place("files") < place("Be brief."));
        assert!(text.ends_with("Be brief.\n\nWrite tests."));
    }
}

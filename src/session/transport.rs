//! Which transport a remote MCP server speaks, where its caller has not said so.

use std::time::Duration;

use serde_json::json;

use super::mcp::{McpServer, Transport};
use crate::agents::Launch;
use crate::error::Result;
use crate::vm::DynVm;
use crate::vm::exec::{ExecEnd, ExecOptions, exec};

/// What serves is asked with limits of its own. Programs of the VM may stop who asks, but not what waits for it.
const LIMIT: Duration = Duration::from_mins(1);

const SCRIPT: &str = include_str!("transport.mjs");

/// Sets the transport of the servers that have none, unless the agent finds out itself.
pub(super) async fn settle(
    vm: &DynVm,
    launch: &Launch,
    mut servers: Vec<McpServer>,
) -> Result<Vec<McpServer>> {
    let Some(node) = &launch.transports_are_found_by else {
        return Ok(servers);
    };
    let open: Vec<_> = servers.iter().filter_map(unsettled).collect();
    if open.is_empty() {
        return Ok(servers);
    }
    // Headers are secrets: not on a command line.
    let options = ExecOptions {
        env: vec![("AGENTVM_SCRIPT".to_owned(), SCRIPT.to_owned())],
        stdin: json!(open).to_string().into_bytes(),
        timeout: Some(LIMIT),
        ..ExecOptions::default()
    };
    let command = format!("exec '{node}' --input-type=module --eval \"$AGENTVM_SCRIPT\"");
    let ended = exec(vm, &command, options).await?;
    let sse: Vec<String> = match ended {
        ExecEnd::Exited(output) => serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            let said = String::from_utf8_lossy(&output.stderr);
            tracing::warn!(%error, %said, "can't find out the transport of MCP servers");
            Vec::new()
        }),
        ExecEnd::TimedOut(_) => {
            tracing::warn!("the transport of MCP servers is not found in time");
            Vec::new()
        }
    };
    for server in &mut servers {
        let is_sse = sse.iter().any(|name| name == server.name());
        if let McpServer::Remote { transport, .. } = server {
            let found = if is_sse {
                Transport::Sse
            } else {
                Transport::Http
            };
            transport.get_or_insert(found);
        }
    }
    Ok(servers)
}

fn unsettled(server: &McpServer) -> Option<serde_json::Value> {
    match server {
        McpServer::Remote {
            url,
            headers,
            transport: None,
            ..
        } => Some(json!({ "name": server.name(), "url": url, "headers": headers })),
        _ => None,
    }
}

//! MCP servers of a session: what the caller writes, and what the agent is told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use url::{Host, Url};

use super::options::check_environment;
use crate::error::{Code, Error, Result};
use crate::net::{Policy, Reason, Scope, Verdict};

/// A server of tools that the agent's model calls. Kept with the session's environment, because its
/// variables and headers are secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "lowercase",
    rename_all_fields = "camelCase",
    deny_unknown_fields
)]
pub enum McpServer {
    /// A program inside the VM that speaks MCP on its stdio.
    Local {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        command: String,
        #[serde(default)]
        args: Vec<String>,
        #[serde(default)]
        env: BTreeMap<String, String>,
    },
    /// A server that the VM's network reaches.
    Remote {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        url: String,
        #[serde(default)]
        headers: BTreeMap<String, String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        transport: Option<Transport>,
    },
}

/// How a remote server is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Streamable HTTP.
    Http,
    Sse,
}

/// Which transports an agent offers: its `mcpCapabilities`.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(default)]
pub(super) struct McpCapabilities {
    http: bool,
    sse: bool,
}

/// Servers under names that are there once, and checked as far as that goes without connecting.
pub(crate) fn check(mut servers: Vec<McpServer>) -> Result<Vec<McpServer>> {
    let field = |index: usize, name: &str| format!("mcpServers[{index}].{name}");
    let mut taken = BTreeSet::new();
    for (index, server) in servers.iter().enumerate() {
        match server {
            McpServer::Local {
                command, args, env, ..
            } => {
                if command.is_empty() {
                    let problem = "must not be empty";
                    return Err(Error::invalid_argument(&field(index, "command"), problem));
                }
                if command.contains('\0') || args.iter().any(|arg| arg.contains('\0')) {
                    let problem = "command and args must not contain a NUL byte";
                    return Err(Error::invalid_argument(&field(index, "command"), problem));
                }
                check_environment(&field(index, "env"), env)?;
            }
            McpServer::Remote { url, headers, .. } => {
                address(url)
                    .map_err(|problem| Error::invalid_argument(&field(index, "url"), problem))?;
                let unsendable = headers.iter().find(|(name, value)| {
                    name.is_empty()
                        || !name
                            .bytes()
                            .all(|byte| byte.is_ascii_graphic() && byte != b':')
                        || value.contains(['\r', '\n', '\0'])
                });
                if let Some((name, _)) = unsendable {
                    return Err(Error::invalid_argument(
                        &field(index, "headers"),
                        format!("{name:?} can't be sent as a header of one line"),
                    ));
                }
            }
        }
        if let Some(name) = server.given_name() {
            if name.is_empty() {
                return Err(Error::invalid_argument(
                    &field(index, "name"),
                    "must not be empty",
                ));
            }
            if !taken.insert(name.to_owned()) {
                return Err(Error::invalid_argument(
                    &field(index, "name"),
                    format!("{name:?} is the name of another server of this session"),
                ));
            }
        }
    }
    for server in &mut servers {
        if server.given_name().is_none() {
            let derived = server.derived_name();
            let mut free = derived.clone();
            // Of as many names as there are servers, and one more, one is free.
            for number in 2..=taken.len() + 2 {
                if !taken.contains(&free) {
                    break;
                }
                free = format!("{derived}-{number}");
            }
            taken.insert(free.clone());
            match server {
                McpServer::Local { name, .. } | McpServer::Remote { name, .. } => {
                    *name = Some(free);
                }
            }
        }
    }
    Ok(servers)
}

/// Scheme and port are what a connection needs.
fn address(url: &str) -> std::result::Result<Url, String> {
    let url = Url::parse(url).map_err(|error| format!("{url:?} is no URL: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(format!("{:?} is no http or https URL", url.as_str()));
    }
    Ok(url)
}

/// Refuses a server that the VM's network would not let through, as far as its URL tells: a name that
/// may be asked for is looked up as the VM would. One that can't be looked up now is for the agent to
/// report.
pub(super) async fn check_reachable(servers: &[McpServer], policy: &Policy) -> Result<()> {
    for server in servers {
        let McpServer::Remote { url, .. } = server else {
            continue;
        };
        let parsed =
            address(url).map_err(|problem| Error::invalid_argument("mcpServers", problem))?;
        let port = parsed.port_or_known_default().unwrap_or_default();
        let refusal = match parsed.host() {
            Some(Host::Ipv4(address)) => refusal_of(policy, port, None, &[address.into()]),
            Some(Host::Ipv6(address)) => refusal_of(policy, port, None, &[address.into()]),
            Some(Host::Domain(name)) => refusal_of_name(policy, port, name).await,
            None => None,
        };
        if let Some(Refusal { host, reason }) = refusal {
            let remedy = remedy(&host, port, &reason);
            return Err(Error::new(
                Code::NetworkDenied,
                format!(
                    "the MCP server {} ({url}) can't be reached from the VM: {host} is denied \
                     ({reason}); {remedy}",
                    server.name()
                ),
            ));
        }
    }
    Ok(())
}

/// What of a server is denied, and why.
struct Refusal {
    host: String,
    reason: Reason,
}

async fn refusal_of_name(policy: &Policy, port: u16, name: &str) -> Option<Refusal> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_localhost = name == "localhost" || name.ends_with(".localhost");
    if !is_localhost && let Some(reason) = policy.judge_name(name) {
        let host = name.to_owned();
        return Some(Refusal { host, reason });
    }
    let found = tokio::net::lookup_host((name, port)).await.ok()?;
    let addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    refusal_of(policy, port, Some(name), &addresses)
}

/// `None`: one of the addresses is allowed.
fn refusal_of(
    policy: &Policy,
    port: u16,
    name: Option<&str>,
    addresses: &[IpAddr],
) -> Option<Refusal> {
    let names: Vec<&str> = name.into_iter().collect();
    let mut first = None;
    for address in addresses {
        match policy.judge(SocketAddr::new(*address, port), &names) {
            Verdict::Allow(_) => return None,
            Verdict::Deny(reason) => {
                // What is denied for its name is named so.
                let host = match (&reason, name) {
                    (Reason::Rule(_) | Reason::Allowlist | Reason::Nothing, Some(name)) => {
                        name.to_owned()
                    }
                    _ => address.to_string(),
                };
                first.get_or_insert(Refusal { host, reason });
            }
        }
    }
    first
}

/// What opens it.
fn remedy(host: &str, port: u16, reason: &Reason) -> String {
    let rule = if host.contains(':') {
        format!("\"[{host}]:{port}\"")
    } else {
        format!("\"{host}:{port}\"")
    };
    match reason {
        Reason::NotPublic(Scope::Loopback) => format!(
            "add {port} to loopbackExemptPorts of createClient or getOrCreate if it is a server on \
             this host"
        ),
        Reason::Rule(_) => {
            "take that rule out of network.deny of createClient, getOrCreate or setNetwork"
                .to_owned()
        }
        Reason::Nothing => format!(
            "use network: {{ default: \"allowlist\", allow: [{rule}] }} of createClient, getOrCreate \
             or setNetwork"
        ),
        _ => format!("add {rule} to network.allow of createClient, getOrCreate or setNetwork"),
    }
}

impl McpServer {
    fn given_name(&self) -> Option<&str> {
        match self {
            Self::Local { name, .. } | Self::Remote { name, .. } => name.as_deref(),
        }
    }

    /// Unique within the session, once checked.
    pub(super) fn name(&self) -> &str {
        self.given_name().unwrap_or("mcp")
    }

    /// Program and arguments of a local server.
    pub(super) fn command_line(&self) -> Option<Vec<String>> {
        match self {
            Self::Local { command, args, .. } => {
                Some(std::iter::once(command).chain(args).cloned().collect())
            }
            Self::Remote { .. } => None,
        }
    }

    /// From the package or the host, the same for the same server.
    fn derived_name(&self) -> String {
        let text = match self {
            // `npx -y @scope/server-name@1 /path`: the package says more than the runner.
            Self::Local { command, args, .. } => {
                let runner = base_name(command);
                let package = args.iter().find(|arg| !arg.starts_with('-'));
                let runs_package = matches!(
                    runner,
                    "npx"
                        | "bunx"
                        | "uvx"
                        | "pnpx"
                        | "node"
                        | "python"
                        | "python3"
                        | "deno"
                        | "bun"
                );
                match package {
                    Some(package) if runs_package => package_name(package),
                    _ => runner.to_owned(),
                }
            }
            Self::Remote { url, .. } => address(url)
                .ok()
                .and_then(|url| url.host_str().map(ToOwned::to_owned))
                .unwrap_or_default(),
        };
        let plain: String = text
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        let name = plain.trim_matches('-');
        if name.is_empty() { "mcp" } else { name }.to_owned()
    }

    /// As ACP's `session/new` has it.
    ///
    /// A remote server without a stated transport is HTTP for an agent that offers it, marked so that
    /// an adapter of ours tries SSE when HTTP does not work.
    pub(super) fn to_acp(&self, agent: &str, offered: McpCapabilities) -> Result<Value> {
        let pairs = |map: &BTreeMap<String, String>| -> Vec<Value> {
            map.iter()
                .map(|(name, value)| json!({ "name": name, "value": value }))
                .collect()
        };
        match self {
            Self::Local {
                command, args, env, ..
            } => Ok(json!({
                "name": self.name(),
                "command": command,
                "args": args,
                "env": pairs(env),
            })),
            Self::Remote {
                url,
                headers,
                transport,
                ..
            } => {
                let chosen = match transport {
                    Some(transport) => *transport,
                    None if !offered.http && offered.sse => Transport::Sse,
                    None => Transport::Http,
                };
                let is_offered = match chosen {
                    Transport::Http => offered.http,
                    Transport::Sse => offered.sse,
                };
                if !is_offered {
                    return Err(Error::new(
                        Code::AgentUnsupported,
                        format!(
                            "{agent} can't use the MCP server {}: it offers no MCP over {}",
                            self.name(),
                            match chosen {
                                Transport::Http => "streamable HTTP",
                                Transport::Sse => "SSE",
                            }
                        ),
                    ));
                }
                let mut server = json!({
                    "type": chosen,
                    "name": self.name(),
                    "url": url,
                    "headers": pairs(headers),
                });
                if transport.is_none() {
                    server["_meta"] = json!({ "agentvm": { "transport": "auto" } });
                }
                Ok(server)
            }
        }
    }
}

fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// `@modelcontextprotocol/server-filesystem@1.2` → `server-filesystem`; `/srv/tools.mjs` → `tools`.
fn package_name(package: &str) -> String {
    let last = base_name(package);
    let unversioned = last.split('@').next().unwrap_or(last);
    let script = [".js", ".mjs", ".cjs", ".ts", ".py"];
    let stem = script.iter().find_map(|end| unversioned.strip_suffix(end));
    stem.unwrap_or(unversioned).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{Otherwise, Rule, Rules};

    fn parse(json: Value) -> Vec<McpServer> {
        serde_json::from_value(json).expect("servers")
    }

    fn names(json: Value) -> Vec<String> {
        let servers = check(parse(json)).expect("valid");
        servers
            .iter()
            .map(|server| server.name().to_owned())
            .collect()
    }

    #[test]
    fn a_missing_name_comes_from_package_or_host_and_is_unique() {
        let servers = json!([
            { "type": "local", "command": "npx", "args": ["-y", "@modelcontextprotocol/server-filesystem@2026.1", "/home/user"] },
            { "type": "local", "command": "/usr/local/bin/my-server" },
            { "type": "local", "command": "node", "args": ["/srv/tools.mjs"] },
            { "type": "remote", "url": "https://mcp.example.com/sse" },
            { "type": "remote", "url": "https://mcp.example.com/other" },
            { "type": "local", "name": "tools-2", "command": "x" },
            { "type": "local", "command": "tools" },
        ]);
        assert_eq!(
            names(servers),
            [
                "server-filesystem",
                "my-server",
                "tools",
                "mcp-example-com",
                "mcp-example-com-2",
                "tools-2",
                "tools-3",
            ]
        );
    }

    #[test]
    fn what_cannot_work_is_refused_by_its_place() {
        for (server, named) in [
            (
                json!({ "type": "local", "command": "" }),
                "mcpServers[0].command",
            ),
            (
                json!({ "type": "local", "command": "a\0" }),
                "mcpServers[0].command",
            ),
            (
                json!({ "type": "local", "command": "a", "env": { "A=B": "" } }),
                "mcpServers[0].env",
            ),
            (
                json!({ "type": "remote", "url": "mcp.example.com" }),
                "mcpServers[0].url",
            ),
            (
                json!({ "type": "remote", "url": "ftp://example.com" }),
                "mcpServers[0].url",
            ),
            (
                json!({ "type": "remote", "url": "http://a.com", "headers": { "A": "x\ny" } }),
                "mcpServers[0].headers",
            ),
        ] {
            let error = check(parse(json!([server]))).expect_err(named);
            assert!(error.message.starts_with(named), "{error}");
        }
        let twice = json!([
            { "type": "local", "name": "a", "command": "x" },
            { "type": "local", "name": "a", "command": "y" },
        ]);
        let error = check(parse(twice)).expect_err("a name twice");
        assert!(error.message.starts_with("mcpServers[1].name"), "{error}");
    }

    #[test]
    fn the_agent_is_told_in_the_words_of_acp() {
        let both = McpCapabilities {
            http: true,
            sse: true,
        };
        let servers = check(parse(json!([
            { "type": "local", "name": "l", "command": "x", "args": ["-a"], "env": { "K": "v" } },
            { "type": "remote", "name": "r", "url": "https://a.com/mcp", "headers": { "H": "v" } },
            { "type": "remote", "name": "s", "url": "https://a.com/sse", "transport": "sse" },
        ])))
        .expect("valid");
        let told: Vec<_> = servers
            .iter()
            .map(|server| server.to_acp("test", both).expect("offered"))
            .collect();
        assert_eq!(
            json!(told),
            json!([
                { "name": "l", "command": "x", "args": ["-a"], "env": [{ "name": "K", "value": "v" }] },
                {
                    "type": "http", "name": "r", "url": "https://a.com/mcp",
                    "headers": [{ "name": "H", "value": "v" }],
                    "_meta": { "agentvm": { "transport": "auto" } },
                },
                { "type": "sse", "name": "s", "url": "https://a.com/sse", "headers": [] },
            ])
        );
        let none = McpCapabilities::default();
        let error = servers[2].to_acp("test", none).expect_err("not offered");
        assert_eq!(error.code, Code::AgentUnsupported);
        let sse = McpCapabilities {
            http: false,
            sse: true,
        };
        assert_eq!(
            servers[1].to_acp("test", sse).expect("offered")["type"],
            "sse"
        );
    }

    #[tokio::test]
    async fn a_server_that_the_network_denies_is_refused_with_the_option_that_opens_it() {
        let servers =
            |url: &str| check(parse(json!([{ "type": "remote", "url": url }]))).expect("valid");
        let policy = Policy::new(&[3000]);
        for (denied, option) in [
            (
                "http://127.0.0.1:8080/mcp",
                "add 8080 to loopbackExemptPorts",
            ),
            (
                "http://localhost:8080/mcp",
                "add 8080 to loopbackExemptPorts",
            ),
            ("http://[::1]:8080/mcp", "add 8080 to loopbackExemptPorts"),
            (
                "http://10.0.0.1/mcp",
                "add \"10.0.0.1:80\" to network.allow",
            ),
            (
                "https://[fd00::1]/",
                "add \"[fd00::1]:443\" to network.allow",
            ),
        ] {
            let error = check_reachable(&servers(denied), &policy)
                .await
                .expect_err(denied);
            assert_eq!(error.code, Code::NetworkDenied);
            assert!(error.message.contains(option), "{error}");
        }
        let rules = |otherwise, allow: &[&str], deny: &[&str]| {
            let parse = |texts: &[&str]| {
                let rules = texts.iter().map(|text| Rule::parse(text).expect("a rule"));
                rules.collect()
            };
            policy.with_rules(Rules {
                otherwise,
                allow: parse(allow),
                deny: parse(deny),
            })
        };
        let url = "https://mcp.example.com/";
        for (rules, option) in [
            (
                rules(Otherwise::Allowlist, &["example.com"], &[]),
                "add \"mcp.example.com:443\" to network.allow",
            ),
            (
                rules(Otherwise::None, &[], &[]),
                "allow: [\"mcp.example.com:443\"]",
            ),
            (
                rules(Otherwise::Public, &[], &["*.example.com"]),
                "(*.example.com); take that rule out of network.deny",
            ),
        ] {
            let error = check_reachable(&servers(url), &rules).await.expect_err(url);
            assert!(error.message.contains(option), "{error}");
        }
        for allowed in [
            "http://127.0.0.1:3000/mcp",
            "https://1.1.1.1/",
            "https://no.such.name.invalid/",
        ] {
            check_reachable(&servers(allowed), &policy)
                .await
                .expect(allowed);
        }
    }
}

// Finds out which transport remote MCP servers speak, as MCP asks clients to: a server that answers
// the first request of streamable HTTP with 400, 404 or 405 is tried over SSE.
// Runs inside the VM, whose network, names and certificates count. Input: [{ name, url, headers }].
// Output: the names of those that speak SSE. Of a server that can't be reached the agent tells.

import { text } from "node:stream/consumers";

const TIMEOUT_MS = 10_000;

const initialize = JSON.stringify({
  jsonrpc: "2.0",
  id: 0,
  method: "initialize",
  params: {
    protocolVersion: "2025-06-18",
    capabilities: {},
    clientInfo: { name: "agentvm", version: "1" },
  },
});

async function speaksSse({ url, headers }) {
  // Headers are for this server, not for one that it sends us to.
  const ask = (init) =>
    fetch(url, { ...init, redirect: "manual", signal: AbortSignal.timeout(TIMEOUT_MS) });
  const posted = await ask({
    method: "POST",
    headers: {
      ...headers,
      "content-type": "application/json",
      accept: "application/json, text/event-stream",
    },
    body: initialize,
  });
  const session = posted.headers.get("mcp-session-id");
  await posted.body?.cancel();
  if (session) {
    const ended = await ask({
      method: "DELETE",
      headers: { ...headers, "mcp-session-id": session },
    });
    await ended.body?.cancel();
  }
  if (![400, 404, 405].includes(posted.status)) return false;
  const got = await ask({ headers: { ...headers, accept: "text/event-stream" } });
  await got.body?.cancel();
  return got.ok && !!got.headers.get("content-type")?.startsWith("text/event-stream");
}

const servers = JSON.parse(await text(process.stdin));
const found = await Promise.all(servers.map((server) => speaksSse(server).catch(() => false)));
process.stdout.write(JSON.stringify(servers.map(({ name }) => name).filter((_, i) => found[i])));
process.exit(0); // whatever connections are still open

import { stat } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { startModelServer } from "../../../__test__/model-server.js";
import { Adapter, NODE, service } from "./adapter.js";

const GREETER = join(import.meta.dirname, "../../../__test__/mcp-server.mjs");
const greeter = {
  name: "greeter",
  command: NODE,
  args: [GREETER],
  env: [{ name: "GREETING", value: "Good morning" }],
};

test("the model calls the tools of a server", async () => {
  const call = { id: "g", name: "mcp__greeter__greet", input: { name: "Ada" } };
  await using server = await startModelServer({
    script: [{ toolCalls: [call] }, { text: "Greeted." }],
  });
  await using amp = await Adapter.start({ env: service(server) });
  await amp.prompt(await amp.newSession({ mcpServers: [greeter] }), "Greet Ada");

  expect(server.requests[0]?.toolNames).toContain("mcp__greeter__greet");
  expect(server.requests[1]?.toolResults).toEqual(["Good morning, Ada!"]);
  expect(amp.updatesOf("tool_call")).toMatchObject([
    { title: "mcp__greeter__greet Ada", kind: "other", rawInput: { name: "Ada" } },
  ]);
});

test("servers are written for Amp to a file of the session alone, which goes with it", async () => {
  await using amp = await Adapter.start();
  const headers = [{ name: "Authorization", value: "Bearer my-token" }];
  const guessed = { _meta: { agentvm: { transport: "auto" } } };
  const sessionId = await amp.newSession({
    mcpServers: [
      greeter,
      { type: "http", name: "new", url: "https://mcp.example.com/mcp", headers, ...guessed },
      { type: "sse", name: "old", url: "https://mcp.example.com/sse", headers: [] },
    ],
  });
  const { "mcp.json": config } = await amp.kept(sessionId);
  expect(JSON.parse(config ?? "")).toEqual({
    greeter: { command: NODE, args: [GREETER], env: { GREETING: "Good morning" } },
    new: { url: "https://mcp.example.com/mcp", headers: { Authorization: "Bearer my-token" } },
    old: { url: "https://mcp.example.com/sse", headers: {}, transport: "sse" },
  });
  const path = join(amp.home, "state/amp", sessionId);
  expect((await stat(join(path, "mcp.json"))).mode & 0o777).toBe(0o600);
  expect((await stat(path)).mode & 0o777).toBe(0o700);

  await amp.request("session/close", { sessionId });
  expect(Object.keys(await amp.kept(sessionId))).toEqual(["session.json"]);
});

test("a server that Amp can't use fails the turn, by name, before the model is believed", async () => {
  await using server = await startModelServer({ script: [{ text: "No tools here." }] });
  await using amp = await Adapter.start({ env: service(server) });
  const mcpServers = [{ name: "broken", command: "/nonexistent", args: [], env: [] }];
  const { error } = await amp.prompt(await amp.newSession({ mcpServers }), "Greet");
  expect(error).toEqual({
    code: -32603,
    message: 'MCP server "broken" can\'t be used: Amp says "failed"',
    data: { type: "mcp_server_failed", server: "broken", reason: "failed" },
  });
  expect(amp.updates).toEqual([]);
});

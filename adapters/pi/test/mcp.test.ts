import { readdirSync, readFileSync } from "node:fs";
import { readFile, rm } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { json } from "node:stream/consumers";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";
import { type ModelRequest, type Reply, startModelServer } from "../../../__test__/model-server.js";
import { toolName } from "../src/mcp-tools.js";
import { Adapter, anthropic, isAlive, NODE, type RpcMessage } from "./adapter.js";
import { everythingStdio, RemoteEverything } from "./everything.js";

const TEST_SERVER = fileURLToPath(new URL("mcp-server.mjs", import.meta.url));

/** For `mcpServers`: the server of mcp-server.mjs. */
function testServer(...habits: string[]) {
  return { name: "test", command: NODE, args: [TEST_SERVER, ...habits], env: [] as object[] };
}

/** A script that makes the calls, one a turn's request, and then says "Done.". */
function calling(...calls: [name: string, input: Record<string, unknown>][]) {
  return ({ toolResults }: { toolResults: string[] }): Reply => {
    const call = calls[toolResults.length];
    return call ? { toolCalls: [{ name: call[0], input: call[1] }] } : { text: "Done." };
  };
}

function childrenOf({ child: { pid } }: Adapter): string {
  return readdirSync(`/proc/${pid}/task`)
    .map((thread) => readFileSync(`/proc/${pid}/task/${thread}/children`, "utf8"))
    .join("");
}

/** The tools that the model has in the end: Pi takes them away where the conversation has got to. */
function offered({ toolNames, body }: ModelRequest): string[] {
  const names = new Set(toolNames);
  for (const { role, content } of body.messages) {
    if (role !== "system") continue;
    for (const { type, tool } of content) {
      if (type === "tool_removal") names.delete(tool.name);
      else if (type === "tool_addition") names.add(tool.name);
    }
  }
  return [...names];
}

async function everything(type: "stdio" | "http" | "sse") {
  if (type !== "stdio") return await RemoteEverything.start(type);
  return { settings: () => everythingStdio, received: [], [Symbol.asyncDispose]: async () => {} };
}

test("initialize says which transports there are", async () => {
  await using pi = await Adapter.start();
  const { agentCapabilities } = await pi.request("initialize", { protocolVersion: 1 });
  expect(agentCapabilities.mcpCapabilities).toEqual({ http: true, sse: true });
});

test("a server whose transport is a guess is spoken to over SSE if it does not know HTTP", async () => {
  await using mcp = await everything("sse");
  const guess = { ...mcp.settings(), type: "http", _meta: { agentvm: { transport: "auto" } } };
  await using server = await startModelServer({ script: [{ text: "hi" }] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession({ mcpServers: [guess] });
  await pi.prompt(sessionId, "Hello");
  expect(server.requests[0]?.toolNames).toContain("everything_echo");
});

test("a server that knows neither transport is told with both reasons", async () => {
  await using nothing = await startModelServer({ script: [] });
  const guess = {
    type: "http",
    name: "nothing",
    url: `${nothing.url}/mcp`,
    headers: [],
    _meta: { agentvm: { transport: "auto" } },
  };
  await using pi = await Adapter.start({ env: anthropic(nothing) });
  const error = await pi.newSession({ mcpServers: [guess] }).catch((error) => error);
  expect(error.message).toMatch(/over streamable HTTP: .*over SSE: /);
});

test.for([["stdio"], ["http"], ["sse"]] as const)(
  "tools of a server over %s are tools of the model, typed by their schema",
  async ([type]) => {
    await using mcp = await everything(type);
    const script = calling(["everything_get-sum", { a: 17, b: 25 }], ["everything_get-sum", {}]);
    await using server = await startModelServer({ script });
    await using pi = await Adapter.start({ env: anthropic(server) });
    const sessionId = await pi.newSession({ mcpServers: [mcp.settings()] });
    const { result } = await pi.prompt(sessionId, "Add them");

    expect(result).toEqual({ stopReason: "end_turn" });
    const tools: { name: string; input_schema: unknown }[] = server.requests[0]?.body.tools;
    expect(tools.map(({ name }) => name)).toEqual(
      expect.arrayContaining(["read", "bash", "everything_echo", "everything_get-sum"]),
    );
    expect(tools.find(({ name }) => name === "everything_get-sum")).toMatchObject({
      description: "Returns the sum of two numbers",
      input_schema: { type: "object", properties: { a: { type: "number" } }, required: ["a", "b"] },
    });
    expect(server.requests[1]?.toolResults).toEqual(["The sum of 17 and 25 is 42."]);
    expect(server.requests[2]?.toolResults[1]).toContain("Validation failed");
    expect(pi.updatesOf("tool_call")[0]).toMatchObject({
      title: "everything_get-sum",
      kind: "other",
      rawInput: { a: 17, b: 25 },
    });
    const ends = pi.updatesOf("tool_call_update").filter(({ status }) => status !== "in_progress");
    expect(ends.map(({ status }) => status)).toEqual(["completed", "failed"]);
  },
);

test("images, resources, links and structured content reach model and client", async () => {
  const script = calling(
    ["everything_get-tiny-image", {}],
    ["everything_get-resource-reference", { resourceType: "Text", resourceId: 1 }],
    ["everything_get-resource-reference", { resourceType: "Blob", resourceId: 2 }],
    ["everything_get-resource-links", { count: 1 }],
    ["everything_get-structured-content", { location: "Chicago" }],
  );
  await using server = await startModelServer({ script });
  await using pi = await Adapter.start({ env: anthropic(server) });
  await pi.prompt(await pi.newSession({ mcpServers: [everythingStdio] }), "Show me");

  const results = server.requests[5]?.toolResults ?? [];
  expect(JSON.stringify(server.requests[1]?.body.messages)).toContain('"media_type":"image/png"');
  expect(results[1]).toContain('<resource uri="demo://resource/dynamic/text/1">');
  expect(results[2]).toContain("can't be shown to the model");
  expect(results[3]).toMatch(/\[.*\]\(demo:\/\/resource/);
  expect(JSON.parse(results[4] ?? "")).toMatchObject({ temperature: 36, humidity: 82 });
  const ends = pi.updatesOf("tool_call_update").filter(({ status }) => status === "completed");
  expect(ends[0].content).toContainEqual({
    type: "content",
    content: { type: "image", mimeType: "image/png", data: expect.any(String) },
  });
  expect(ends[4].rawOutput.details).toMatchObject({ structuredContent: { temperature: 36 } });
});

test("a long text is cut for the model, which is told where all of it is", async () => {
  await using server = await startModelServer({ script: calling(["test_long", {}]) });
  await using pi = await Adapter.start({ env: anthropic(server) });
  await pi.prompt(await pi.newSession({ mcpServers: [testServer()] }), "Tell me");
  const [result = ""] = server.requests[1]?.toolResults ?? [];
  const [, path = ""] =
    /^é{25600}\n\n\[The first 51200 of 200000 bytes. All of it is in (.*)\]$/.exec(result) ?? [];
  expect(await readFile(path, "utf8")).toBe("é".repeat(100_000));
  await rm(path);
});

test("what a server reports as an error is a failed tool call, not a failed turn", async () => {
  const script = calling(["everything_get-resource-reference", { resourceId: -1 }]);
  await using server = await startModelServer({ script });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession({ mcpServers: [everythingStdio] });
  expect((await pi.prompt(sessionId, "Go")).result).toEqual({ stopReason: "end_turn" });
  expect(server.requests[1]?.toolResults[0]).toContain("Invalid resourceId: -1");
  expect(pi.updatesOf("tool_call_update").at(-1)).toMatchObject({ status: "failed" });
});

test("progress of a tool is output of its call", async () => {
  const script = calling(["everything_trigger-long-running-operation", { duration: 1, steps: 2 }]);
  await using server = await startModelServer({ script });
  await using pi = await Adapter.start({ env: anthropic(server) });
  await pi.prompt(await pi.newSession({ mcpServers: [everythingStdio] }), "Go");
  const outputs = pi.updatesOf("tool_call_update").filter(({ status }) => status === "in_progress");
  expect(outputs.map(({ content }) => content?.[0].content.text)).toContain("1 of 2");
});

test.for([["http"], ["sse"]] as const)("headers go with every request over %s", async ([type]) => {
  await using mcp = await RemoteEverything.start(type);
  await using server = await startModelServer({
    script: calling(["everything_echo", { message: "hi" }]),
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const headers = [{ name: "Authorization", value: "Bearer my-token" }];
  await pi.prompt(await pi.newSession({ mcpServers: [mcp.settings(headers)] }), "Echo");
  expect(mcp.received.length).toBeGreaterThan(3);
  for (const request of mcp.received) expect(request.headers.authorization).toBe("Bearer my-token");
});

test("closing the session ends the one at a server over http", async () => {
  await using mcp = await RemoteEverything.start("http");
  await using pi = await Adapter.start();
  const sessionId = await pi.newSession({ mcpServers: [mcp.settings()] });
  await pi.request("session/close", { sessionId });
  expect(mcp.received.map(({ method }) => method)).toContain("DELETE");
});

test("a server that does not answer the end of its session does not keep ours open", async () => {
  const answers: Record<string, (params: { protocolVersion?: string }) => object> = {
    initialize: ({ protocolVersion }) => {
      return {
        protocolVersion,
        serverInfo: { name: "x", version: "1" },
        capabilities: { tools: {} },
      };
    },
    "tools/list": () => ({ tools: [] }),
  };
  const silent = createServer(async (incoming, response) => {
    if (incoming.method !== "POST") return; // no answer, ever
    const { id, method, params } = (await json(incoming)) as Required<RpcMessage>;
    const headers = { "content-type": "application/json", "mcp-session-id": "1" };
    const result = answers[method]?.(params);
    response.writeHead(result ? 200 : 202, headers);
    response.end(result && JSON.stringify({ jsonrpc: "2.0", id, result }));
  });
  await new Promise<void>((resolve) => silent.listen(0, "127.0.0.1", resolve));
  const url = `http://127.0.0.1:${(silent.address() as AddressInfo).port}/mcp`;
  await using pi = await Adapter.start();
  const mcpServers = [{ type: "http", name: "silent", url, headers: [] }];
  const sessionId = await pi.newSession({ mcpServers });
  expect(await pi.request("session/close", { sessionId })).toEqual({});
  silent.closeAllConnections();
  silent.close();
});

test.for([["http"], ["sse"]] as const)(
  "cancel cancels the call at a server over %s",
  async ([type]) => {
    await using mcp = await RemoteEverything.start(type);
    const input = { duration: 60, steps: 60 };
    const script = calling(["everything_trigger-long-running-operation", input]);
    await using server = await startModelServer({ script });
    await using pi = await Adapter.start({ env: anthropic(server) });
    const sessionId = await pi.newSession({ mcpServers: [mcp.settings()] });
    const turn = pi.prompt(sessionId, "Go");
    await pi.update(({ content }) => content?.[0]?.content?.text === "1 of 60");
    pi.send({ method: "session/cancel", params: { sessionId } });
    expect((await turn).result).toEqual({ stopReason: "cancelled" });
    await pi.request("session/close", { sessionId });
    expect(mcp.received.map(({ body }) => body).join("\n")).toContain("notifications/cancelled");
  },
);

test("cancel cancels the call at a child process, which lives on", async () => {
  const script: Reply[] = [
    { toolCalls: [{ name: "test_wait", input: {} }] },
    { toolCalls: [{ name: "test_cancelled", input: {} }] },
    { text: "Done." },
  ];
  await using server = await startModelServer({ script });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession({ mcpServers: [testServer()] });
  const turn = pi.prompt(sessionId, "Wait");
  await pi.update(({ status }) => status === "in_progress");
  pi.send({ method: "session/cancel", params: { sessionId } });
  expect((await turn).result).toEqual({ stopReason: "cancelled" });
  await pi.prompt(sessionId, "Was it cancelled?");
  expect(server.requests[2]?.toolResults).toEqual(["cancelled: 1"]);
});

test("a child process lives as long as its session, with all that it has started", async () => {
  const script = calling(["test_pid", {}]);
  await using server = await startModelServer({ script });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession({ mcpServers: [testServer("noisy")] });
  await pi.prompt(sessionId, "Which process?");
  await pi.prompt(sessionId, "And now?");
  const [first, second] = [1, 3].map((index) => server.requests[index]?.toolResults[0]);
  expect(first).toBe(second);
  const pids = first?.split(" ").map(Number) ?? [];
  expect(pids.map(isAlive)).toEqual([true, true]);
  await pi.request("session/close", { sessionId });
  expect(pids.map(isAlive)).toEqual([false, false]);
  expect(pi.stderr).toBe("");
});

test.for([["session/close"], ["SIGTERM"], ["end of input"]])(
  "a child process that does not want to end is ended by %s",
  async ([end]) => {
    await using server = await startModelServer({ script: calling(["test_pid", {}]) });
    await using pi = await Adapter.start({ env: anthropic(server) });
    const sessionId = await pi.newSession({ mcpServers: [testServer("stubborn")] });
    await pi.prompt(sessionId, "Which process?");
    const pids = server.requests[1]?.toolResults[0]?.split(" ").map(Number) ?? [];
    if (end === "session/close") await pi.request("session/close", { sessionId });
    else if (end === "SIGTERM") pi.child.kill("SIGTERM");
    else pi.child.stdin?.end();
    if (end !== "session/close") await pi.exited;
    expect(pids.map(isAlive)).toEqual([false, false]);
  },
);

test("a child process has the agent's environment and its own on top", async () => {
  await using server = await startModelServer({ script: calling(["test_environment", {}]) });
  await using pi = await Adapter.start({ env: { ...anthropic(server), ONE: "1", TWO: "2" } });
  const mcp = { ...testServer(), env: [{ name: "TWO", value: "zwei" }] };
  await pi.prompt(await pi.newSession({ mcpServers: [mcp] }), "Environment?");
  const environment = JSON.parse(server.requests[1]?.toolResults[0] ?? "");
  expect(environment).toMatchObject({ ONE: "1", TWO: "zwei", HOME: pi.home });
});

test("a server that has died says so in the calls of its tools", async () => {
  const script = calling(["test_die", {}], ["test_pid", {}]);
  await using server = await startModelServer({ script });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession({ mcpServers: [testServer()] });
  expect((await pi.prompt(sessionId, "Die")).result).toEqual({ stopReason: "end_turn" });
  const died = 'MCP server "test" is not running: exited with code 3: out of cheese';
  expect(server.requests[2]?.toolResults).toEqual([died, died]);
});

test("tools that a server adds and removes are the model's from the next request on", async () => {
  const script = ({ index, userText, toolResults }: ModelRequest): Reply => {
    if (index === 0) return { toolCalls: [{ name: "test_replace", input: {} }] };
    if (userText !== "Use it" || toolResults.length > 0) return { text: "Done." };
    return { toolCalls: [{ name: "test_fresh", input: {} }] };
  };
  await using server = await startModelServer({ script });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession({ mcpServers: [testServer()] });
  await pi.prompt(sessionId, "Replace");
  const tools = async () => {
    await pi.prompt(sessionId, "Use it");
    return offered(server.requests.at(-1) as ModelRequest);
  };
  await expect.poll(tools).toContain("test_fresh");
  expect(await tools()).not.toContain("test_wait");
  expect(server.requests.at(-1)?.toolResults).toEqual(["still warm"]);
});

test.for<[string, object, object]>([
  [
    "has no such command",
    { command: "/no/such/server" },
    { reason: "command not found: /no/such/server" },
  ],
  [
    "ends at once",
    { command: "sh", args: ["-c", "echo no licence >&2; exit 7"] },
    { reason: "exited with code 7: no licence" },
  ],
  [
    "never answers",
    { command: NODE, args: [TEST_SERVER, "silent"] },
    { reason: expect.stringContaining("not ready after 2000 ms (AGENTVM_MCP_TIMEOUT_MS)") },
  ],
  [
    "can't be reached",
    { type: "http", url: "http://127.0.0.1:65533/mcp?key=secret", headers: [] },
    { transport: "http", reason: expect.stringContaining("ECONNREFUSED") },
  ],
  [
    "can't be reached by sse",
    { type: "sse", url: "http://127.0.0.1:65533/sse", headers: [] },
    { transport: "sse", reason: expect.stringContaining("ECONNREFUSED") },
  ],
])("a server that %s fails session/new, by name", async ([, settings, data]) => {
  await using pi = await Adapter.start({ env: { AGENTVM_MCP_TIMEOUT_MS: "2000" } });
  const server = { name: "broken", args: [], env: [], ...settings };
  const params = { cwd: pi.home, mcpServers: [testServer("stubborn"), server] };
  const { error } = await pi.call("session/new", params);
  expect(error).toMatchObject({
    code: -32603,
    message: expect.stringMatching(/^MCP server "broken" \(.*\) can't be used: /),
    data: { type: "mcp_server_failed", server: "broken", transport: "stdio", ...data },
  });
  expect(error?.message).not.toContain("secret");
  expect(childrenOf(pi)).toBe("");
});

test("a session that has no key leaves no server behind", async () => {
  await using pi = await Adapter.start({ env: { ANTHROPIC_API_KEY: undefined } });
  const { error } = await pi.call("session/new", { cwd: pi.home, mcpServers: [testServer()] });
  expect(error).toMatchObject({ code: -32000, data: { type: "missing_api_key" } });
  expect(childrenOf(pi)).toBe("");
});

test("a server that refuses the headers fails session/new, with the status", async () => {
  const refusing = createServer((_, response) => response.writeHead(401).end("who are you?"));
  await new Promise<void>((resolve) => refusing.listen(0, "127.0.0.1", resolve));
  const url = `http://127.0.0.1:${(refusing.address() as AddressInfo).port}/mcp`;
  await using pi = await Adapter.start();
  for (const type of ["http", "sse"]) {
    const mcpServers = [{ type, name: "private", url, headers: [] }];
    const { error } = await pi.call("session/new", { cwd: pi.home, mcpServers });
    expect(error?.message).toMatch(/MCP server "private" .*401/);
  }
  refusing.close();
});

test.for<[object, string]>([
  [{ name: "x" }, "mcpServers[0].command must be a string"],
  [{ command: "x" }, "mcpServers[0].name must be a string"],
  [{ name: "", command: "x" }, "mcpServers[0].name must not be empty"],
  [{ name: "x", command: "x", args: [1] }, "mcpServers[0].args must be an array of strings"],
  [{ name: "x", command: "x", env: [{ name: "A" }] }, "mcpServers[0].env[0].value"],
  [{ type: "http", name: "x", url: "ftp://x" }, "mcpServers[0].url must be an http or https URL"],
  [
    { type: "http", name: "x", url: "http://x", headers: [{ name: "a b", value: "" }] },
    'mcpServers[0].headers: "a b"',
  ],
  [{ type: "ws", name: "x", url: "ws://x" }, 'mcpServers[0].type must be "stdio", "http" or "sse"'],
])("the server %j is invalid: %s", async ([server, message]) => {
  await using pi = await Adapter.start();
  const { error } = await pi.call("session/new", { cwd: pi.home, mcpServers: [server] });
  expect(error).toMatchObject({ code: -32602, message: expect.stringContaining(message) });
});

test("two servers of one name are invalid", async () => {
  await using pi = await Adapter.start();
  const mcpServers = [testServer(), testServer()];
  const { error } = await pi.call("session/new", { cwd: pi.home, mcpServers });
  expect(error).toMatchObject({ code: -32602, message: expect.stringContaining('named "test"') });
});

test.for([["session/load"], ["session/resume"]] as const)(
  "%s gives a session its servers again",
  async ([method]) => {
    await using server = await startModelServer({ script: calling(["test_pid", {}]) });
    await using pi = await Adapter.start({ env: anthropic(server) });
    const sessionId = await pi.newSession({ mcpServers: [testServer()] });
    const pidIn = async (index: number, settings: object) => {
      await pi.request(method, { sessionId, cwd: pi.home, ...settings });
      await pi.prompt(sessionId, "Which process?");
      return server.requests[index]?.toolResults[0] ?? "";
    };
    const first = await pidIn(1, { mcpServers: [testServer()] });
    expect(await pidIn(3, { mcpServers: [testServer()] }), "the same settings").toBe(first);
    expect(await pidIn(5, { mcpServers: [testServer("noisy")] }), "others").not.toBe(first);
    await pi.request("session/close", { sessionId });
    await pi.request(method, { sessionId, cwd: pi.home, mcpServers: [] });
    await pi.prompt(sessionId, "And without servers?");
    expect(offered(server.requests[6] as ModelRequest)).not.toContain("test_pid");
  },
);

test("names of tools are what model APIs take, unique, and the same every time", () => {
  const none = new Set<string>();
  expect(toolName("files", "read_file", none)).toBe("files_read_file");
  expect(toolName("my server", "get.it/now", none)).toBe("my_server_get_it_now");
  expect(toolName("7zip", "list", none)).toBe("_7zip_list");
  const long = toolName("server", "t".repeat(100), none);
  expect(long).toMatch(/^server_t{48}_[0-9a-f]{8}$/);
  expect(toolName("server", "t".repeat(100), none)).toBe(long);
  expect(toolName("server", `${"t".repeat(100)}2`, none)).not.toBe(long);
  expect(toolName("a b", "c", new Set(["a_b_c"]))).toMatch(/^a_b_c_[0-9a-f]{8}$/);
});

/** The bridge between a client and a stand-in for OpenCode: what goes through, and what does not. */

import { PassThrough } from "node:stream";
import { setImmediate as turnOfLoop } from "node:timers/promises";
import { expect, test } from "vitest";
import { Bridge, type BridgeOptions } from "../src/bridge.js";
import type { Server } from "../src/server.js";

// biome-ignore-start lint/suspicious/noExplicitAny: messages of any shape
class End {
  readonly lines: string[] = [];
  readonly #waiting = new Set<() => void>();
  #seen = 0;

  constructor(
    readonly reads: PassThrough,
    readonly writes: PassThrough,
  ) {
    let pending = "";
    reads.setEncoding("utf8").on("data", (text: string) => {
      const parts = (pending + text).split("\n");
      pending = parts.pop() ?? "";
      this.lines.push(...parts);
      for (const check of this.#waiting) check();
    });
  }

  send(message: object | string): void {
    this.writes.write(`${typeof message === "string" ? message : JSON.stringify(message)}\n`);
  }

  /** The next message that has not been read yet. */
  async next(): Promise<any> {
    const at = this.#seen++;
    while (this.lines.length <= at) {
      await new Promise<void>((resolve) => {
        this.#waiting.add(resolve);
      });
    }
    return JSON.parse(this.lines[at] ?? "");
  }
}

function bridged(
  server: Partial<Record<keyof Server, any>> = {},
  options: Partial<BridgeOptions> = {},
) {
  const [input, output, stdin, stdout] = Array.from({ length: 4 }, () => new PassThrough());
  if (!input || !output || !stdin || !stdout) throw new Error("four streams");
  const bridge = new Bridge({
    server: server as unknown as Server,
    input,
    output,
    child: { stdin, stdout },
    asks: false,
    ...options,
  });
  void bridge.serveClient();
  void bridge.serveAgent();
  return { bridge, client: new End(output, input), agent: new End(stdin, stdout) };
}

async function opened(ends: ReturnType<typeof bridged>, model = "anthropic/claude") {
  const { client, agent } = ends;
  client.send({ id: 1, method: "session/new", params: { cwd: "/home/user", mcpServers: [] } });
  await agent.next();
  const configOptions = [
    { id: "model", currentValue: model },
    { id: "mode", currentValue: "build" },
  ];
  agent.send({ id: 1, result: { sessionId: "s", configOptions } });
  await client.next();
  const availableCommands = [{ name: "init" }];
  const update = { sessionUpdate: "available_commands_update", availableCommands };
  agent.send({ method: "session/update", params: { sessionId: "s", update } });
  await client.next();
  return ends;
}

const prompt = (text: string) => ({
  id: 2,
  method: "session/prompt",
  params: { sessionId: "s", prompt: [{ type: "text", text }] },
});

test("lines go through byte by byte, also those that are no protocol", async () => {
  const { client, agent } = bridged();
  const line = '{"id":7,  "method":"session/unknown","params":{"n":1e400,"x":"\\u00e9"}}';
  for (const [from, to] of [
    [client, agent],
    [agent, client],
  ] as const) {
    from.send(line);
    await to.next();
    expect(to.lines).toEqual([line]);
  }
  agent.send("starting up ...");
  while (client.lines.length < 2) await turnOfLoop();
  expect(client.lines[1]).toBe("starting up ...");
});

test("a slash before what is no command is hidden from OpenCode, and no other", async () => {
  const { client, agent } = await opened(bridged());
  client.send(prompt("/etc/hosts?"));
  const hidden = await agent.next();
  expect(hidden.params.prompt).toEqual([
    { type: "text", text: expect.any(String), annotations: { audience: ["user"] } },
    { type: "text", text: "/etc/hosts?" },
  ]);
  for (const text of ["/init now", "/compact", "a / b"]) {
    client.send(prompt(text));
    expect((await agent.next()).params.prompt).toEqual([{ type: "text", text }]);
  }
});

test("a failed turn is told with what OpenCode has kept of it", async () => {
  const error = { name: "APIError", data: { message: "bad key", statusCode: 401 } };
  const info = { id: "m", role: "assistant", providerID: "anthropic", modelID: "claude", error };
  const { client, agent } = await opened(bridged({ lastMessage: async () => ({ info }) }));
  client.send(prompt("Go"));
  await agent.next();
  agent.send({ id: 2, error: { code: -32603, message: "bad key" } });
  expect((await client.next()).error).toEqual({
    code: -32000,
    message: "anthropic/claude failed (HTTP 401): bad key",
    data: {
      provider: "anthropic",
      model: "claude",
      status: 401,
      type: "APIError",
      message: "bad key",
    },
  });
});

test("without a model a prompt is answered at once: a key is missing", async () => {
  const { client, agent } = await opened(bridged(), "unknown/unknown");
  client.send(prompt("Go"));
  expect((await client.next()).error).toMatchObject({ code: -32000 });
  expect(agent.lines).toHaveLength(1);
});

test("retries are told, and end the turn when there are too many", async () => {
  const aborted: string[] = [];
  const abort = async (id: string) => void aborted.push(id);
  const ends = await opened(bridged({ abort }, { maxRetries: 1 }));
  const { bridge, client, agent } = ends;
  client.send(prompt("Go"));
  await agent.next();
  const retry = (attempt: number) => {
    const status = { type: "retry", attempt, message: "Overloaded", next: Date.now() };
    bridge.onEvent({ type: "session.status", properties: { sessionID: "s", status } });
  };
  const update = { sessionUpdate: "agent_message_chunk", messageId: "m1" };
  agent.send({ method: "session/update", params: { sessionId: "s", update } });
  await client.next();

  retry(1);
  expect(await client.next()).toEqual({
    jsonrpc: "2.0",
    method: "_agentvm/retry",
    params: {
      sessionId: "s",
      attempt: 1,
      maxAttempts: 1,
      delayMs: expect.any(Number),
      discardedMessageId: "m1",
      error: { message: "Overloaded" },
    },
  });
  retry(2);
  agent.send({ id: 2, result: { stopReason: "cancelled" } });
  expect((await client.next()).error).toMatchObject({
    code: -32603,
    data: { message: "Overloaded" },
  });
  expect(aborted).toEqual(["s"]);
});

test("a subagent's question reaches the client as the session's, and the answer OpenCode", async () => {
  const answers: unknown[] = [];
  const answerPermission = async (...answer: unknown[]) => void answers.push(answer);
  const { bridge, client, agent } = await opened(bridged({ answerPermission }));
  bridge.onEvent({
    type: "session.created",
    properties: { info: { id: "child", parentID: "s" } },
  });
  const asked = {
    id: "per_1",
    sessionID: "child",
    permission: "bash",
    patterns: ["ls"],
    metadata: { command: "ls" },
    tool: { messageID: "m", callID: "c1" },
  };
  bridge.onEvent({ type: "permission.asked", properties: asked });
  const { id, method, params } = await client.next();
  expect({ method, params }).toMatchObject({
    method: "session/request_permission",
    params: { sessionId: "s", toolCall: { toolCallId: "c1", title: "ls", kind: "execute" } },
  });

  client.send({ id, result: { outcome: { outcome: "selected", optionId: "always" } } });
  while (answers.length === 0) await turnOfLoop();
  expect(answers).toEqual([["per_1", "/home/user", "always"]]);
  expect(agent.lines).toHaveLength(1);
});

test("a file that the client has not offered to write is left to OpenCode", async () => {
  const { client, agent } = bridged();
  const write = { id: 9, method: "fs/write_text_file", params: { path: "/a", content: "x" } };
  agent.send(write);
  expect(await agent.next()).toMatchObject({ id: 9, error: { code: -32601 } });
  const fs = { writeTextFile: true };
  client.send({ id: 1, method: "initialize", params: { clientCapabilities: { fs } } });
  await agent.next();
  agent.send(write);
  expect(await client.next()).toEqual(write);
});

test("a session whose MCP server can't be used is not opened", async () => {
  const mcpStatus = async () => ({
    good: { status: "connected" },
    bad: { status: "failed", error: "gone" },
  });
  const { client, agent } = bridged({ mcpStatus });
  const mcpServers = [{ name: "good" }, { name: "bad" }];
  client.send({ id: 1, method: "session/new", params: { cwd: "/home/user", mcpServers } });
  await agent.next();
  agent.send({ id: 1, result: { sessionId: "s" } });
  expect((await client.next()).error).toMatchObject({
    code: -32603,
    data: { type: "mcp_server_failed", server: "bad", reason: "gone" },
  });
});
// biome-ignore-end lint/suspicious/noExplicitAny: messages of any shape

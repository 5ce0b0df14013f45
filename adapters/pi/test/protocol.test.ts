import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { startModelServer } from "../../../__test__/model-server.js";
import { Adapter, anthropic, gate } from "./adapter.js";

test.for<[string, number]>([
  ["not json", -32700],
  ['{"jsonrpc":"2.0","id":1,', -32700],
  ["\u0000\u0001", -32700],
  ["[]", -32600],
  ["null", -32600],
  ["42", -32600],
  ['{"id":1,"method":"initialize"}', -32600],
  ['{"jsonrpc":"2.0","id":{},"method":"initialize"}', -32600],
  ['{"jsonrpc":"2.0","id":1,"method":7}', -32600],
])("the line %s is answered with the error %i and the adapter goes on", async ([line, code]) => {
  await using pi = await Adapter.start();
  pi.write(`${line}\n`);
  const { id, error } = await pi.message((message) => message.error !== undefined);
  expect({ id, code: error?.code }).toEqual({ id: null, code });
  expect(await pi.request("initialize", { protocolVersion: 1 })).toBeDefined();
});

test("bytes that are not UTF-8 are a parse error", async () => {
  await using pi = await Adapter.start();
  pi.child.stdin?.write(Buffer.from([0x22, 0xff, 0xfe, 0x22, 0x0a]));
  const { error } = await pi.message((message) => message.error !== undefined);
  expect(error?.code).toBe(-32700);
});

test("unknown methods are refused, unknown notifications and stray responses are ignored", async () => {
  await using pi = await Adapter.start();
  pi.send({ method: "no/such" });
  pi.send({ id: 77, result: {} });
  pi.write("\n\n");
  expect((await pi.call("no/such")).error).toMatchObject({
    code: -32601,
    message: "Method not found: no/such",
  });
  expect((await pi.call("constructor")).error?.code).toBe(-32601);
  expect(pi.lines).toHaveLength(2);
});

test.for<[string, object, string]>([
  ["session/new", {}, "cwd must be a string"],
  ["session/new", { cwd: "relative" }, "cwd must be an absolute path, not relative"],
  ["session/new", { cwd: "/no/such/dir" }, "cwd is not a directory: /no/such/dir"],
  ["session/new", { cwd: "/", mcpServers: {} }, "mcpServers must be an array"],
  ["session/prompt", {}, "sessionId must be a string"],
  ["session/load", { sessionId: 7 }, "sessionId must be a string"],
])("%s with %j is invalid: %s", async ([method, params, message]) => {
  await using pi = await Adapter.start();
  const { error } = await pi.call(method, params);
  expect(error).toMatchObject({ code: -32602, message: expect.stringContaining(message) });
});

test.for<[unknown, string]>([
  [undefined, "prompt must be a non-empty array"],
  [[], "prompt must be a non-empty array"],
  [[{ type: "text" }], "prompt[0].text must be a string"],
  [[{ type: "hologram" }], 'prompt[0].type "hologram" is not supported'],
  [[{ type: "audio", data: "", mimeType: "audio/wav" }], "audio is not supported"],
])("the prompt %j is invalid: %s", async ([prompt, message]) => {
  await using pi = await Adapter.start();
  const sessionId = await pi.newSession();
  const { error } = await pi.call("session/prompt", { sessionId, prompt });
  expect(error).toMatchObject({ code: -32602, message: expect.stringContaining(message) });
});

test("a prompt for a session that is not open is an error that names it", async () => {
  await using pi = await Adapter.start();
  const { error } = await pi.prompt("nobody", "Hello");
  expect(error).toMatchObject({ code: -32002, message: "Session not open: nobody" });
});

test("a second prompt on a busy session is refused and the first one goes on", async () => {
  const { opened, open } = gate();
  await using server = await startModelServer({
    script: [{ text: "First.", hold: { afterChunks: 0, until: opened } }],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession();
  const first = pi.prompt(sessionId, "One");
  await server.request(0);
  expect((await pi.prompt(sessionId, "Two")).error).toMatchObject({
    code: -32600,
    data: { type: "session_busy" },
  });
  open();
  expect((await first).result).toEqual({ stopReason: "end_turn" });
  expect(server.requests).toHaveLength(1);
});

test("what extensions and their tools print goes to standard error", async () => {
  await using server = await startModelServer({
    script: [{ toolCalls: [{ name: "shout", input: {} }] }, { text: "Done." }],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const dir = join(pi.home, ".pi/agent/extensions");
  await mkdir(dir, { recursive: true });
  await writeFile(
    join(dir, "shout.js"),
    `export default function (pi) {
      console.log("extension loaded");
      pi.registerTool({
        name: "shout", label: "Shout", description: "Prints",
        parameters: { type: "object", properties: {} },
        async execute() {
          console.log("from console.log");
          console.info("from console.info");
          process.stdout.write("from process.stdout\\n");
          return { content: [{ type: "text", text: "shouted" }], details: {} };
        },
      });
    }`,
  );
  expect((await pi.prompt(await pi.newSession(), "Shout")).result).toEqual({
    stopReason: "end_turn",
  });
  expect(server.requests[1]?.toolResults).toEqual(["shouted"]);
  for (const line of pi.lines) expect(JSON.parse(line)).toMatchObject({ jsonrpc: "2.0" });
  for (const printed of ["extension loaded", "console.log", "console.info", "process.stdout"]) {
    expect(pi.stderr).toContain(printed);
  }
});

test("a client that does not read can still cancel, and nothing sent before is lost", async () => {
  const streamed = gate();
  await using server = await startModelServer({
    script: [
      {
        text: "x".repeat(1024 * 1024),
        chunkSize: 1024,
        hold: {
          afterChunks: 1000,
          until: () => {
            streamed.open();
            return gate().opened;
          },
        },
      },
    ],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession();
  pi.child.stdout?.pause();
  const turn = pi.prompt(sessionId, "Talk");
  await streamed.opened;
  pi.send({ method: "session/cancel", params: { sessionId } });
  expect(await server.requests[0]?.closed).toBe("aborted");

  pi.child.stdout?.resume();
  expect((await turn).result).toEqual({ stopReason: "cancelled" });
  expect(pi.textOf("agent_message_chunk")).toMatch(/^x+$/);
});

test("an uncaught exception ends the process with status 1 and says why", async () => {
  await using server = await startModelServer({ script: [{ text: "Hello." }] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const dir = join(pi.home, ".pi/agent/extensions");
  await mkdir(dir, { recursive: true });
  await writeFile(
    join(dir, "bomb.js"),
    `export default function (pi) {
      pi.on("agent_start", () => { setImmediate(() => { throw new Error("boom"); }); });
    }`,
  );
  await pi.prompt(await pi.newSession(), "Hello").catch(() => {});
  expect(await pi.exited).toEqual({ code: 1, signal: null });
  expect(pi.stderr).toContain("boom");
});

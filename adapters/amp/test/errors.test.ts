import { chmod, mkdir, readdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { type Reply, startModelServer } from "../../../__test__/model-server.js";
import { Adapter, run, service } from "./adapter.js";

test("without a key no session is made", async () => {
  await using amp = await Adapter.start({ env: { AMP_API_KEY: undefined } });
  const { error } = await amp.call("session/new", { cwd: amp.home, mcpServers: [] });
  expect(error).toEqual({
    code: -32000,
    message: "Amp has no API key: set AMP_API_KEY (https://ampcode.com/settings)",
    data: { type: "missing_api_key", variable: "AMP_API_KEY" },
  });
  expect(await readdir(join(amp.home, "state/amp"))).toEqual([]);
});

test("a key that a login has left is enough", async () => {
  await using server = await startModelServer({ script: [{ text: "Hello." }] });
  const env = { ...service(server), AMP_API_KEY: undefined };
  await using amp = await Adapter.start({ env });
  await mkdir(join(amp.home, ".local/share/amp"), { recursive: true });
  await writeFile(
    join(amp.home, ".local/share/amp/secrets.json"),
    JSON.stringify({ [`apiKey@${server.url}`]: "sgamp_stored" }),
  );
  const { result } = await amp.prompt(await amp.newSession(), "Hello");
  expect(result).toEqual({ stopReason: "end_turn" });
});

test("a key that the service refuses is auth_required", async () => {
  const refused = { status: 401, type: "authentication_error", message: "invalid key" };
  await using server = await startModelServer({ script: [{ error: refused }] });
  await using amp = await Adapter.start({ env: service(server) });
  const { error } = await amp.prompt(await amp.newSession(), "Hello");
  expect(error).toMatchObject({
    code: -32000,
    message: expect.stringContaining("Invalid or missing API key"),
    data: { type: "api_key_refused", exitCode: 1 },
  });
});

test.for<[string, Reply, string]>([
  ["429", { error: { status: 429, type: "rate_limit_error", message: "slow down" } }, "slow down"],
  ["500", { error: { status: 500, type: "api_error", message: "out of order" } }, "out of order"],
  ["a dropped connection", { text: "Some text", dropConnection: { afterChunks: 1 } }, "broke off"],
  [
    "a malformed stream",
    { text: "Some text", malformed: { afterChunks: 1, data: "data: {broken\n\n" } },
    "broke off",
  ],
])("%s is an error with Amp's words, and the session goes on", async ([, reply, words]) => {
  await using server = await startModelServer({ script: [reply, { text: "Still here." }] });
  await using amp = await Adapter.start({ env: service(server) });
  const sessionId = await amp.newSession();
  const { error } = await amp.prompt(sessionId, "Hello");
  expect(error).toMatchObject({
    code: -32603,
    message: expect.stringContaining(words),
    data: { type: "error_during_execution", message: expect.stringContaining(words) },
  });
  expect((await amp.prompt(sessionId, "Again")).result).toEqual({ stopReason: "end_turn" });
});

test("an error in the middle of a turn closes its calls first", async () => {
  await using server = await startModelServer({
    script: [
      { toolCalls: [run("echo one")] },
      { error: { status: 500, type: "api_error", message: "out of order" } },
    ],
  });
  await using amp = await Adapter.start({ env: service(server) });
  const { error } = await amp.prompt(await amp.newSession(), "Go");
  expect(error).toMatchObject({ code: -32603 });
  expect(amp.updatesOf("tool_call_update").at(-1)).toMatchObject({ status: "completed" });
});

test("a service that can't be reached is an error with Amp's words", async () => {
  await using amp = await Adapter.start({ env: { AMP_URL: "http://127.0.0.1:9" } });
  const { error } = await amp.prompt(await amp.newSession(), "Hello");
  expect(error).toMatchObject({
    code: -32603,
    message: expect.stringContaining("Couldn't connect to the Amp server at http://127.0.0.1:9"),
    data: { type: "amp_exited", exitCode: 1, signal: null },
  });
});

test.for<["max_tokens" | "refusal"]>([["max_tokens"], ["refusal"]])(
  "the model's %s is a stop reason",
  async ([stopReason]) => {
    await using server = await startModelServer({ script: [{ text: "Well,", stopReason }] });
    await using amp = await Adapter.start({ env: service(server) });
    expect((await amp.prompt(await amp.newSession(), "Go")).result).toEqual({ stopReason });
  },
);

test("a run of too many turns has a stop reason of its own", async () => {
  await using server = await startModelServer({
    script: ({ index }) => ({ toolCalls: [{ name: "Read", input: { path: `${index}` } }] }),
  });
  await using amp = await Adapter.start({ env: service(server) });
  const { result } = await amp.prompt(await amp.newSession(), "Go");
  expect(result).toEqual({ stopReason: "max_turn_requests" });
});

/** An adapter whose Amp is this shell script. */
async function startWith(script: string): Promise<Adapter> {
  const amp = await Adapter.start({ env: { AMP_CLI_PATH: undefined } });
  amp.child.stdin?.end();
  await amp.exited;
  const program = join(amp.home, "amp");
  await writeFile(program, `#!/bin/sh\n${script}\n`);
  await chmod(program, 0o755);
  return await Adapter.start({ env: { AMP_CLI_PATH: program } });
}

const INIT = JSON.stringify({ type: "system", subtype: "init", session_id: "T-1" });

test.for<[string, string, object]>([
  [
    "dies",
    `echo '${INIT}'; echo 'out of memory' >&2; kill -9 $$`,
    {
      message: "Amp was killed by SIGKILL before its turn had a result: out of memory",
      data: { type: "amp_exited", exitCode: null, signal: "SIGKILL", stderr: "out of memory" },
    },
  ],
  [
    "ends without a result",
    `echo '${INIT}'`,
    { message: "Amp has ended with exit code 0 before its turn had a result" },
  ],
  ["writes something else", "echo Hello; sleep 600", { data: { type: "amp_protocol" } }],
])("an Amp that %s is an error", async ([, script, error]) => {
  await using amp = await startWith(script);
  const response = await amp.prompt(await amp.newSession(), "Hello");
  expect(response.error).toMatchObject({ code: -32603, ...error });
});

test("an Amp that is not there is an error of session/new", async () => {
  const env = { AMP_CLI_PATH: "/nonexistent/amp" };
  await using amp = await Adapter.start({ env });
  const { error } = await amp.call("session/new", { cwd: amp.home, mcpServers: [] });
  expect(error).toMatchObject({ code: -32603, data: { type: "amp_not_found" } });
  expect(error?.message).toContain("/nonexistent/amp");
});

test("messages that nobody knows yet are passed over", async () => {
  const result = { type: "result", subtype: "success", is_error: false, session_id: "T-1" };
  const lines = [INIT, '{"type":"weather"}', JSON.stringify(result)];
  await using amp = await startWith(lines.map((line) => `echo '${line}'`).join("\n"));
  const response = await amp.prompt(await amp.newSession(), "Hello");
  expect(response.result).toEqual({ stopReason: "end_turn" });
});

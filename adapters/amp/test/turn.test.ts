import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { startModelServer } from "../../../__test__/model-server.js";
import { Adapter, NODE, run, service } from "./adapter.js";

test("initialize says what Amp can do", async () => {
  await using amp = await Adapter.start();
  expect(await amp.request("initialize", { protocolVersion: 1 })).toEqual({
    protocolVersion: 1,
    agentInfo: { name: "amp", title: "Amp", version: "unknown" },
    agentCapabilities: {
      loadSession: true,
      promptCapabilities: { image: true, audio: false, embeddedContext: true },
      mcpCapabilities: { http: true, sse: true },
      sessionCapabilities: { resume: {}, close: {} },
    },
    authMethods: [],
  });
});

test("thoughts, text, tool calls and usage are told in their order", async () => {
  await using server = await startModelServer({
    script: [
      { thinking: "A look first.", text: "I look.", toolCalls: [run("echo one")] },
      { text: "It says one." },
    ],
  });
  await using amp = await Adapter.start({ env: service(server) });
  const { result } = await amp.prompt(await amp.newSession(), "Look");

  expect(result).toEqual({ stopReason: "end_turn" });
  const messageId = expect.any(String);
  expect(amp.updates).toEqual([
    {
      sessionUpdate: "agent_thought_chunk",
      content: { type: "text", text: "A look first." },
      messageId,
    },
    { sessionUpdate: "agent_message_chunk", content: { type: "text", text: "I look." }, messageId },
    {
      sessionUpdate: "tool_call",
      toolCallId: "run",
      status: "pending",
      title: "echo one",
      kind: "execute",
      rawInput: { command: "echo one" },
    },
    { sessionUpdate: "tool_call_update", toolCallId: "run", status: "in_progress" },
    {
      sessionUpdate: "tool_call_update",
      toolCallId: "run",
      status: "completed",
      content: [{ type: "content", content: { type: "text", text: "one\n" } }],
      rawOutput: '{"output":"one\\n","exitCode":0}',
    },
    {
      sessionUpdate: "agent_message_chunk",
      content: { type: "text", text: "It says one." },
      messageId,
    },
    { sessionUpdate: "usage_update", used: 20, size: 200_000 },
  ]);
});

test("a session remembers its earlier turns", async () => {
  await using server = await startModelServer({ script: [{ text: "Noted." }, { text: "Blue." }] });
  await using amp = await Adapter.start({ env: service(server) });
  const sessionId = await amp.newSession();
  await amp.prompt(sessionId, "My colour is blue");
  await amp.prompt(sessionId, "Which one is it?");

  expect(server.requests[1]?.body.messages).toMatchObject([
    { role: "user", content: [{ text: "My colour is blue" }] },
    { role: "assistant", content: [{ text: "Noted." }] },
    { role: "user", content: [{ text: "Which one is it?" }] },
  ]);
});

test("edits show what they change", async () => {
  await using server = await startModelServer({
    script: [
      {
        toolCalls: [
          { id: "c", name: "create_file", input: { path: "new.txt", content: "one\n" } },
          {
            id: "e",
            name: "edit_file",
            input: { path: "old.txt", old_str: "two", new_str: "three" },
          },
          {
            id: "p",
            name: "apply_patch",
            input: {
              patchText:
                "*** Begin Patch\n*** Update File: patched.txt\n@@\n a\n-b\n+c\n*** End Patch",
            },
          },
        ],
      },
      { text: "Done." },
    ],
  });
  await using amp = await Adapter.start({ env: service(server) });
  await writeFile(join(amp.home, "old.txt"), "two\n");
  await writeFile(join(amp.home, "patched.txt"), "a\nb\n");
  await amp.prompt(await amp.newSession(), "Edit");

  const at = (name: string) => join(amp.home, name);
  expect(amp.updatesOf("tool_call")).toMatchObject([
    { toolCallId: "c", title: "create_file new.txt", locations: [{ path: at("new.txt") }] },
    { toolCallId: "e", kind: "edit", locations: [{ path: at("old.txt") }] },
    { toolCallId: "p", title: "apply_patch patched.txt", locations: [{ path: at("patched.txt") }] },
  ]);
  const diffs = amp
    .updatesOf("tool_call_update")
    .filter(({ status }) => status === "completed")
    .map(({ content }) => content[0]);
  expect(diffs).toEqual([
    { type: "diff", path: at("new.txt"), oldText: null, newText: "one\n" },
    { type: "diff", path: at("old.txt"), oldText: "two", newText: "three" },
    { type: "diff", path: at("patched.txt"), oldText: "a\nb\n", newText: "a\nc\n" },
  ]);
  expect(await readFile(at("patched.txt"), "utf8")).toBe("a\nc\n");
});

test("todos become a plan", async () => {
  const todos = [
    { id: "1", content: "Look", status: "completed", priority: "high" },
    { id: "2", content: "Act", status: "in-progress", priority: "medium" },
    { id: "3", content: "Tell", status: "todo" },
  ];
  await using server = await startModelServer({
    script: [{ toolCalls: [{ name: "todo_write", input: { todos } }] }, { text: "Planned." }],
  });
  await using amp = await Adapter.start({ env: service(server) });
  await amp.prompt(await amp.newSession(), "Plan");
  expect(amp.updatesOf("plan")).toEqual([
    {
      sessionUpdate: "plan",
      entries: [
        { content: "Look", priority: "high", status: "completed" },
        { content: "Act", priority: "medium", status: "in_progress" },
        { content: "Tell", priority: "medium", status: "pending" },
      ],
    },
  ]);
});

test("what a subagent says belongs to its call, and its calls name theirs", async () => {
  await using server = await startModelServer({
    script: [
      { toolCalls: [{ id: "task", name: "Task", input: { prompt: "Count" } }] },
      { text: "Counting.", toolCalls: [run("echo 1", "inner")] },
      { text: "It is one." },
      { text: "The task says one." },
    ],
  });
  await using amp = await Adapter.start({ env: service(server) });
  await amp.prompt(await amp.newSession(), "Delegate");

  expect(amp.textOf("agent_message_chunk")).toBe("The task says one.");
  expect(amp.updatesOf("tool_call")).toMatchObject([
    { toolCallId: "task", kind: "think", title: "Task Count" },
    { toolCallId: "inner", _meta: { agentvm: { parentToolCallId: "task" } } },
  ]);
  const ofTask = amp
    .updatesOf("tool_call_update")
    .filter(({ toolCallId, content }) => toolCallId === "task" && content);
  expect(ofTask.map(({ content }) => content[0].content.text)).toEqual([
    "Counting.",
    "It is one.",
    "It is one.",
  ]);
});

test("images and embedded text reach the model", async () => {
  await using server = await startModelServer({ script: [{ text: "Seen." }] });
  await using amp = await Adapter.start({ env: service(server) });
  const sessionId = await amp.newSession();
  const prompt = [
    { type: "text", text: "Look at this" },
    { type: "image", data: "aGk=", mimeType: "image/png" },
    { type: "resource", resource: { uri: "file:///a.txt", text: "inside" } },
  ];
  await amp.request("session/prompt", { sessionId, prompt });
  expect(server.requests[0]?.body.messages[0].content).toEqual([
    { type: "text", text: "Look at this" },
    { type: "image", source: { type: "base64", media_type: "image/png", data: "aGk=" } },
    { type: "text", text: '<resource uri="file:///a.txt">\ninside\n</resource>' },
  ]);
});

test("instructions come before the first prompt, once, and again when they are others", async () => {
  await using server = await startModelServer({
    script: [{ text: "1" }, { text: "2" }, { text: "3" }],
  });
  await using amp = await Adapter.start({ env: service(server) });
  const append = (text: string) => ({ _meta: { systemPrompt: { append: text } } });
  const sessionId = await amp.newSession(append("Be brief."));
  await amp.prompt(sessionId, "One");
  await amp.prompt(sessionId, "Two");
  const again = { sessionId, cwd: amp.home, mcpServers: [], ...append("Be long.") };
  await amp.request("session/resume", again);
  await amp.prompt(sessionId, "Three");

  const texts = (index: number): string[] =>
    server.requests[index]?.body.messages
      .filter(({ role }: { role: string }) => role === "user")
      .at(-1)
      .content.map(({ text }: { text: string }) => text);
  expect(texts(0)).toEqual([expect.stringContaining("\nBe brief.\n"), "One"]);
  expect(texts(1)).toEqual(["Two"]);
  expect(texts(2)).toEqual([expect.stringContaining("\nBe long.\n"), "Three"]);
});

test("the mode takes effect with the next turn", async () => {
  await using server = await startModelServer({ script: [{ text: "1" }, { text: "2" }] });
  await using amp = await Adapter.start({ env: service(server) });
  const { sessionId, modes } = await amp.request("session/new", { cwd: amp.home, mcpServers: [] });
  expect(modes).toMatchObject({ currentModeId: "default", availableModes: { length: 5 } });
  await amp.prompt(sessionId, "One");
  expect(await amp.request("session/set_mode", { sessionId, modeId: "ultra" })).toEqual({});
  await amp.prompt(sessionId, "Two");

  expect(server.requests.map(({ body }) => body.model)).toEqual(["amp-medium", "amp-ultra"]);
  const { error } = await amp.call("session/set_mode", { sessionId, modeId: "free" });
  expect(error).toMatchObject({
    code: -32602,
    message: expect.stringContaining("default, low, medium, high, ultra"),
  });
});

test("sessions run their turns at the same time, each on its own thread", async () => {
  await using server = await startModelServer({
    script: ({ userText }) => ({ text: `You said ${userText}` }),
  });
  await using amp = await Adapter.start({ env: service(server) });
  const sessions = [await amp.newSession(), await amp.newSession()];
  await Promise.all(sessions.map((sessionId, index) => amp.prompt(sessionId, `word ${index}`)));
  for (const [index, sessionId] of sessions.entries()) {
    const own = amp.messages.filter(
      ({ params }) =>
        params?.sessionId === sessionId && params.update.sessionUpdate === "agent_message_chunk",
    );
    expect(own.map(({ params }) => params.update.content.text)).toEqual([`You said word ${index}`]);
  }
});

test("a session runs one prompt at a time", async () => {
  await using server = await startModelServer({ script: [{ text: "Hello." }] });
  await using amp = await Adapter.start({ env: service(server) });
  const sessionId = await amp.newSession();
  const first = amp.prompt(sessionId, "One");
  const { error } = await amp.prompt(sessionId, "Two");
  expect(error).toMatchObject({ code: -32600, data: { type: "session_busy", sessionId } });
  expect((await first).result).toEqual({ stopReason: "end_turn" });
});

test("keys and prompts are not on Amp's command line", async () => {
  const list = `${NODE} -e 'console.log(require("fs").readFileSync("/proc/"+process.ppid+"/stat","utf8").split(" ")[3])' | xargs -I{} cat /proc/{}/cmdline | tr "\\0" " "`;
  await using server = await startModelServer({
    script: [{ toolCalls: [run(list)] }, { text: "Seen." }],
  });
  await using amp = await Adapter.start({ env: service(server) });
  const env = [{ name: "TOKEN", value: "my-secret" }];
  const mcpServers = [{ name: "greeter", command: NODE, args: [GREETER], env }];
  await amp.prompt(await amp.newSession({ mcpServers }), "My word is xyzzy");

  const commandLine = server.requests[1]?.toolResults[0] ?? "";
  expect(commandLine).toContain("--dangerously-allow-all");
  expect(commandLine).toContain("--mcp-config");
  for (const secret of ["my-secret", "sgamp_test", "xyzzy"]) {
    expect(commandLine).not.toContain(secret);
  }
});

const GREETER = join(import.meta.dirname, "../../../__test__/mcp-server.mjs");

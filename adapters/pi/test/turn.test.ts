import { mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { quickstartScript, startModelServer } from "../../../__test__/model-server.js";
import { Adapter, anthropic } from "./adapter.js";

test("initialize says who the agent is and what it can do", async () => {
  await using pi = await Adapter.start();
  const result = await pi.request("initialize", { protocolVersion: 1, clientCapabilities: {} });
  expect(result).toMatchObject({
    protocolVersion: 1,
    agentInfo: { name: "pi", title: "Pi", version: "0.87.1" },
    agentCapabilities: {
      loadSession: true,
      promptCapabilities: { image: true, audio: false, embeddedContext: true },
    },
    authMethods: [],
  });
});

test("text and thoughts stream in pieces and the turn ends with end_turn", async () => {
  const text = "The answer is forty-two, as it has always been, more or less.";
  await using server = await startModelServer({ script: [{ thinking: "Let me think.", text }] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const { result } = await pi.prompt(await pi.newSession(), "What is the answer?");

  expect(result).toEqual({ stopReason: "end_turn" });
  expect(pi.textOf("agent_thought_chunk")).toBe("Let me think.");
  expect(pi.textOf("agent_message_chunk")).toBe(text);
  expect(pi.updatesOf("agent_message_chunk").length).toBeGreaterThan(1);
  expect(server.requests[0]?.userText).toBe("What is the answer?");
  expect(server.requests[0]?.headers["x-api-key"]).toBe("test-key");
  expect(server.unexpected).toEqual([]);
});

test("tool calls are announced, started and finished, and their results reach the model", async () => {
  await using server = await startModelServer({
    script: ({ toolResults }) => {
      if (toolResults.length === 0) {
        const input = { path: "hello.js", content: "console.log('hi')\n" };
        return { text: "Writing.", toolCalls: [{ name: "write", input, id: "w" }] };
      }
      if (toolResults.length === 1) {
        return { toolCalls: [{ name: "bash", input: { command: "cat hello.js" }, id: "b" }] };
      }
      return { text: "Done." };
    },
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const { result } = await pi.prompt(await pi.newSession(), "Write hello.js");

  expect(result).toEqual({ stopReason: "end_turn" });
  const path = join(pi.home, "hello.js");
  expect(await readFile(path, "utf8")).toBe("console.log('hi')\n");
  expect(server.requests[2]?.toolResults.at(-1)).toContain("console.log('hi')");

  const tools = pi.updates.filter((update) => update.sessionUpdate.startsWith("tool_call"));
  expect(tools.filter(({ toolCallId }) => toolCallId === "w")).toMatchObject([
    {
      sessionUpdate: "tool_call",
      status: "pending",
      kind: "edit",
      title: "write hello.js",
      locations: [{ path }],
      rawInput: { path: "hello.js", content: "console.log('hi')\n" },
    },
    { sessionUpdate: "tool_call_update", status: "in_progress" },
    {
      sessionUpdate: "tool_call_update",
      status: "completed",
      content: [
        { type: "diff", path, oldText: null, newText: "console.log('hi')\n" },
        { type: "content", content: { type: "text" } },
      ],
      rawOutput: { output: expect.any(String) },
    },
  ]);
  const bash = tools.filter(({ toolCallId }) => toolCallId === "b");
  expect(bash[0]).toMatchObject({ kind: "execute", title: "cat hello.js", status: "pending" });
  expect(bash.at(-1)).toMatchObject({
    status: "completed",
    content: [{ type: "content", content: { type: "text", text: "console.log('hi')\n" } }],
  });
  const order = pi.updates.map(({ sessionUpdate }) => sessionUpdate);
  expect(order.indexOf("agent_message_chunk")).toBeLessThan(order.indexOf("tool_call"));
});

test("an edit shows the passage that it replaced", async () => {
  const edits = [{ oldText: "one", newText: "two" }];
  await using server = await startModelServer({
    script: [
      { toolCalls: [{ name: "edit", input: { path: "a.txt", edits } }] },
      { text: "Edited." },
    ],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const path = join(pi.home, "a.txt");
  await writeFile(path, "zero\none\n");
  await pi.prompt(await pi.newSession(), "Edit it");

  expect(await readFile(path, "utf8")).toBe("zero\ntwo\n");
  expect(pi.updatesOf("tool_call_update").at(-1)).toMatchObject({
    status: "completed",
    content: [{ type: "diff", path, oldText: "one", newText: "two" }, { type: "content" }],
    locations: [{ path, line: 2 }],
  });
});

test("a failing command is a failed tool call, not a failed turn", async () => {
  await using server = await startModelServer({
    script: [
      { toolCalls: [{ name: "bash", input: { command: "echo no >&2; exit 3" } }] },
      { text: "It failed." },
    ],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const { result } = await pi.prompt(await pi.newSession(), "Run it");

  expect(result).toEqual({ stopReason: "end_turn" });
  const end = pi.updatesOf("tool_call_update").at(-1);
  expect(end.status).toBe("failed");
  expect(end.content[0].content.text).toContain("Command exited with code 3");
});

test("the model gets the earlier turns with the next one", async () => {
  await using server = await startModelServer({ script: [{ text: "Hi Ada." }, { text: "Ada." }] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession();
  await pi.prompt(sessionId, "I am Ada");
  await pi.prompt(sessionId, "Who am I?");

  const conversation = JSON.stringify(server.requests[1]?.body.messages);
  expect(conversation).toContain("I am Ada");
  expect(conversation).toContain("Hi Ada.");
  expect(conversation).toContain("Who am I?");
});

test("two sessions of one process keep their conversations apart", async () => {
  await using server = await startModelServer({
    script: ({ userText }) => ({ text: `You said ${userText}` }),
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const [a, b] = await Promise.all([pi.newSession(), pi.newSession()]);
  expect(a).not.toBe(b);
  await Promise.all([pi.prompt(a, "apple"), pi.prompt(b, "banana")]);
  await pi.prompt(a, "again");

  const textOf = (sessionId: string) =>
    pi.messages
      .filter(({ params }) => params?.sessionId === sessionId)
      .filter(({ params }) => params.update?.sessionUpdate === "agent_message_chunk")
      .map(({ params }) => params.update.content.text)
      .join("");
  expect(textOf(a)).toBe("You said appleYou said again");
  expect(textOf(b)).toBe("You said banana");
  expect(JSON.stringify(server.requests[2]?.body)).not.toContain("banana");
});

test("images, links and embedded files reach the model", async () => {
  await using server = await startModelServer({ script: [{ text: "Seen." }] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession();
  const pixel =
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg==";
  const prompt = [
    { type: "text", text: "Look" },
    { type: "image", data: pixel, mimeType: "image/png" },
    { type: "resource_link", uri: "file:///home/user/a%20b.txt", name: "a b.txt" },
    { type: "resource", resource: { uri: "file:///notes.md", text: "remember the milk" } },
  ];
  expect(await pi.request("session/prompt", { sessionId, prompt })).toEqual({
    stopReason: "end_turn",
  });

  const [request] = server.requests;
  expect(request?.userText).toContain("[a b.txt](/home/user/a b.txt)");
  expect(request?.userText).toContain("remember the milk");
  expect(JSON.stringify(request?.body.messages)).toContain('"media_type":"image/png"');
});

test.for([
  ["max_tokens", "max_tokens"],
  ["refusal", "refusal"],
] as const)("the model's stop reason %s ends the turn with %s", async ([stopReason, expected]) => {
  await using server = await startModelServer({ script: [{ text: "Well,", stopReason }] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const { result } = await pi.prompt(await pi.newSession(), "Go on");
  expect(result).toEqual({ stopReason: expected });
});

test("OPENAI_API_KEY and OPENAI_BASE_URL lead to an OpenAI model", async () => {
  await using server = await startModelServer({
    script: [
      { thinking: "Hm.", toolCalls: [{ name: "bash", input: { command: "echo $((6 * 7))" } }] },
      { text: "It is 42." },
    ],
  });
  await using pi = await Adapter.start({
    env: {
      ANTHROPIC_API_KEY: undefined,
      OPENAI_API_KEY: "openai-key",
      OPENAI_BASE_URL: server.openaiUrl,
    },
  });
  const { result } = await pi.prompt(await pi.newSession(), "Six times seven?");

  expect(result).toEqual({ stopReason: "end_turn" });
  expect(pi.textOf("agent_thought_chunk").trim()).toBe("Hm.");
  expect(pi.textOf("agent_message_chunk")).toBe("It is 42.");
  expect(server.requests[0]?.headers.authorization).toBe("Bearer openai-key");
  expect(server.requests[1]?.toolResults).toEqual(["42\n"]);
});

test("Pi's own models.json and settings.json choose the model", async () => {
  await using server = await startModelServer({
    script: [
      { toolCalls: [{ name: "bash", input: { command: "echo $((6 * 7))" } }] },
      { text: "Local." },
    ],
  });
  await using pi = await Adapter.start({ env: { ANTHROPIC_API_KEY: undefined } });
  const dir = join(pi.home, ".pi/agent");
  await mkdir(dir, { recursive: true });
  const provider = {
    baseUrl: server.openaiUrl,
    apiKey: "local-key",
    api: "openai-completions",
    models: [{ id: "tiny" }],
  };
  await writeFile(join(dir, "models.json"), JSON.stringify({ providers: { local: provider } }));
  await writeFile(
    join(dir, "settings.json"),
    JSON.stringify({ defaultProvider: "local", defaultModel: "tiny" }),
  );
  const { result } = await pi.prompt(await pi.newSession(), "Hello");

  expect(result).toEqual({ stopReason: "end_turn" });
  expect(pi.textOf("agent_message_chunk")).toBe("Local.");
  expect(server.requests[0]).toMatchObject({ api: "openai-chat", body: { model: "tiny" } });
  expect(server.requests[1]?.toolResults).toEqual(["42\n"]);
});

test("the quickstart's script writes a program, runs it and says what it printed", async () => {
  const home = await mkdtemp(join(tmpdir(), "pi-adapter-home-"));
  await using server = await startModelServer({ script: quickstartScript(home) });
  {
    await using pi = await Adapter.start({ env: anthropic(server), home });
    const { result } = await pi.prompt(await pi.newSession(), "Write hello.js and run it");
    expect(result).toEqual({ stopReason: "end_turn" });
    expect(await readFile(join(home, "hello.js"), "utf8")).toContain("Hello from inside the VM");
    expect(pi.textOf("agent_message_chunk")).toContain('it printed "Hello from inside the VM"');
  }
  await rm(home, { recursive: true });
});

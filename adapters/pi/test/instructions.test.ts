import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { type ModelRequest, startModelServer } from "../../../__test__/model-server.js";
import { Adapter, anthropic } from "./adapter.js";

const INSTRUCTIONS = "Always answer in Latin.";

/** ACP's own way. */
function append(text: string): object {
  return { systemPrompt: { mode: "append", content: [{ type: "text", text }] } };
}

/** All that the model is told beside the conversation, wherever Pi puts it. */
function systemOf({ body }: ModelRequest): string {
  const later = body.messages.filter(({ role }: { role: string }) => role === "system");
  return [...body.system, ...later.flatMap(({ content }: { content: object[] }) => content)]
    .map(({ text }) => text ?? "")
    .join("\n");
}

test("initialize says that instructions can be appended", async () => {
  await using pi = await Adapter.start();
  const { agentCapabilities } = await pi.request("initialize", { protocolVersion: 1 });
  expect(agentCapabilities.sessionCapabilities).toEqual({
    resume: {},
    close: {},
    systemPrompt: {},
  });
});

test.for<[string, object]>([
  ["systemPrompt", append(INSTRUCTIONS)],
  ["_meta.systemPrompt", { _meta: { systemPrompt: { append: INSTRUCTIONS } } }],
  [
    "systemPrompt, if both are there,",
    { ...append(INSTRUCTIONS), _meta: { systemPrompt: { append: "Answer in Greek." } } },
  ],
])("%s is appended to Pi's system prompt", async ([, settings]) => {
  await using server = await startModelServer({ script: [{ text: "Salve." }] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  await pi.prompt(await pi.newSession(settings), "Hello");
  const system = systemOf(server.requests[0] as ModelRequest);
  expect(system).toContain("coding assistant");
  expect(system).toContain(INSTRUCTIONS);
  expect(system).not.toContain("Greek");
});

test("several blocks are paragraphs, and Pi's own APPEND_SYSTEM.md stays", async () => {
  await using server = await startModelServer({ script: [{ text: "Salve." }] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  await mkdir(join(pi.home, ".pi/agent"), { recursive: true });
  await writeFile(join(pi.home, ".pi/agent/APPEND_SYSTEM.md"), "Be brief.");
  const content = ["One.", "Two."].map((text) => ({ type: "text", text }));
  await pi.prompt(await pi.newSession({ systemPrompt: { mode: "append", content } }), "Hello");
  const system = systemOf(server.requests[0] as ModelRequest);
  expect(system).toContain("Be brief.");
  expect(system).toContain("One.\n\nTwo.");
});

test.for([["session/load"], ["session/resume"]] as const)(
  "%s says which instructions hold from then on",
  async ([method]) => {
    await using server = await startModelServer({ script: () => ({ text: "Salve." }) });
    await using pi = await Adapter.start({ env: anthropic(server) });
    const sessionId = await pi.newSession(append(INSTRUCTIONS));
    await pi.prompt(sessionId, "Hello");
    for (const settings of [append(INSTRUCTIONS), append("Answer in Greek.")]) {
      await pi.request("session/close", { sessionId });
      await pi.request(method, { sessionId, cwd: pi.home, mcpServers: [], ...settings });
      await pi.prompt(sessionId, "Hello again");
    }
    expect(systemOf(server.requests[1] as ModelRequest)).toContain(INSTRUCTIONS);
    expect(systemOf(server.requests[2] as ModelRequest)).toContain("Answer in Greek.");
  },
);

test("sessions of one process have their own instructions", async () => {
  await using server = await startModelServer({ script: () => ({ text: "Salve." }) });
  await using pi = await Adapter.start({ env: anthropic(server) });
  await pi.prompt(await pi.newSession(append(INSTRUCTIONS)), "Hello");
  await pi.prompt(await pi.newSession(), "Hello");
  expect(systemOf(server.requests[1] as ModelRequest)).not.toContain(INSTRUCTIONS);
});

test.for<[object, string]>([
  [
    { systemPrompt: { mode: "replace", content: [] } },
    'systemPrompt.mode must be "append", not "replace"',
  ],
  [{ systemPrompt: "Hello" }, "systemPrompt must be an object"],
  [{ systemPrompt: { mode: "append", content: "Hello" } }, "systemPrompt.content must be an array"],
  [
    { systemPrompt: { mode: "append", content: [{ type: "text" }] } },
    "systemPrompt.content[0].text",
  ],
  [
    { systemPrompt: { mode: "append", content: [{ type: "audio", data: "", mimeType: "" }] } },
    'systemPrompt.content[0].type must be "text", not "audio"',
  ],
  [{ _meta: { systemPrompt: { append: 7 } } }, "_meta.systemPrompt.append must be a string"],
])("%j is invalid: %s", async ([settings, message]) => {
  await using pi = await Adapter.start();
  const { error } = await pi.call("session/new", { cwd: pi.home, ...settings });
  expect(error).toMatchObject({ code: -32602, message: expect.stringContaining(message) });
});

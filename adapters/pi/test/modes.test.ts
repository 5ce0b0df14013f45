import { existsSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { type ModelRequest, startModelServer } from "../../../__test__/model-server.js";
import { Adapter, anthropic, startLocal } from "./adapter.js";
import { everythingStdio } from "./everything.js";

function toolsOf({ body }: ModelRequest): string[] {
  return body.tools.map((tool: { function: { name: string } }) => tool.function.name).sort();
}

test("a session is in the mode build, and can plan", async () => {
  await using server = await startModelServer({ script: [] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const { modes } = await pi.request("session/new", { cwd: pi.home, mcpServers: [] });
  expect(modes).toEqual({
    currentModeId: "build",
    availableModes: [
      { id: "build", name: "Build", description: expect.any(String) },
      { id: "plan", name: "Plan", description: expect.any(String) },
    ],
  });
});

test("in plan the model has the tools that read, and in build again what it had", async () => {
  await using server = await startModelServer({ script: () => ({ text: "Hello." }) });
  // Of the model APIs the one whose requests always say the whole list.
  await using pi = await startLocal(server.openaiUrl);
  const sessionId = await pi.newSession({ mcpServers: [everythingStdio] });
  await pi.prompt(sessionId, "One");
  expect(await pi.request("session/set_mode", { sessionId, modeId: "plan" })).toEqual({});
  await pi.prompt(sessionId, "Two");
  await pi.request("session/set_mode", { sessionId, modeId: "plan" });
  await pi.request("session/set_mode", { sessionId, modeId: "build" });
  await pi.prompt(sessionId, "Three");

  const [first, second, third] = server.requests.map(toolsOf);
  expect(first).toEqual(expect.arrayContaining(["bash", "edit", "everything_echo", "write"]));
  expect(second).toEqual(["find", "grep", "ls", "read"]);
  expect(third).toEqual(first);
});

test("a tool that the model calls all the same does not run in plan", async () => {
  await using server = await startModelServer({
    script: [{ toolCalls: [{ name: "bash", input: { command: "touch ran" } }] }, { text: "Done." }],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession();
  await pi.request("session/set_mode", { sessionId, modeId: "plan" });
  await pi.prompt(sessionId, "Touch");
  expect(existsSync(join(pi.home, "ran"))).toBe(false);
  expect(server.requests[1]?.toolResults).toHaveLength(1);
});

test("an unknown mode is refused with those that there are", async () => {
  await using server = await startModelServer({ script: [] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession();
  await expect(pi.request("session/set_mode", { sessionId, modeId: "yolo" })).rejects.toThrow(
    "the modes are: build, plan",
  );
});

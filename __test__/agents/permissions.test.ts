import type { Agent, PermissionAnswer, PermissionRequest } from "agentvm";
import { expect } from "vitest";
import { newAgentSession } from "./fixtures.js";
import { row } from "./rows.js";

/** Answers every request of the VM the same, and keeps what was asked. */
function answering(agent: Agent, answer: PermissionAnswer): PermissionRequest[] {
  const requests: PermissionRequest[] = [];
  agent.on("permissionRequest", async ({ sessionId, request }) => {
    requests.push(request);
    await agent.respondPermission(sessionId, request.permissionId, answer);
  });
  return requests;
}

async function exists(agent: Agent, path: string): Promise<boolean> {
  return (await agent.exec(`test -e ${path}`)).exitCode === 0;
}

row("ask once", async (it) => {
  const { agent, sessionId } = await newAgentSession(
    it,
    {
      "Make two": [
        { toolCalls: [it.run("touch first")] },
        { toolCalls: [it.run("touch second")] },
        { text: "Made." },
      ],
    },
    { permissionPolicy: "ask" },
  );
  const requests = answering(agent, "once");

  const { text } = await agent.sendPrompt(sessionId, "Make two");

  expect(text).toContain("Made.");
  expect(requests).toHaveLength(2);
  expect(JSON.stringify(requests[0])).toContain("touch first");
  expect(JSON.stringify(requests[1])).toContain("touch second");
  expect(await exists(agent, "first")).toBe(true);
  expect(await exists(agent, "second")).toBe(true);
});

row("ask always", async (it) => {
  const { agent, sessionId } = await newAgentSession(
    it,
    {
      "Make it": [{ toolCalls: [it.run("touch made")] }, { text: "Made." }],
      "Make it again": [{ toolCalls: [it.run("touch made")] }, { text: "Made again." }],
    },
    { permissionPolicy: "ask" },
  );
  const requests = answering(agent, "always");
  await agent.sendPrompt(sessionId, "Make it");
  await agent.exec("rm made");

  await agent.sendPrompt(sessionId, "Make it again");

  expect(requests).toHaveLength(1);
  expect(await exists(agent, "made")).toBe(true);
});

row("ask reject", async (it) => {
  const { agent, sessionId, asked } = await newAgentSession(
    it,
    {
      "Make it": [{ toolCalls: [it.run("touch made")] }, { text: "Then not." }],
      "Are you there?": [{ text: "Still here." }],
    },
    { permissionPolicy: "ask" },
  );
  const requests = answering(agent, "reject");

  const { text, stopReason } = await agent.sendPrompt(sessionId, "Make it");

  expect({ text, stopReason }).toEqual({ text: "Then not.", stopReason: "end_turn" });
  expect(requests).toHaveLength(1);
  expect(await exists(agent, "made")).toBe(false);
  // The model knows.
  expect(asked()[1]?.toolResults).toHaveLength(1);
  expect((await agent.sendPrompt(sessionId, "Are you there?")).text).toBe("Still here.");
});

row("ask edit", async (it) => {
  const calls = it.edit("/home/user/notes.txt", "two", "three");
  const { agent, sessionId } = await newAgentSession(
    it,
    { "Change it": [...calls.map((call) => ({ toolCalls: [call] })), { text: "Then not." }] },
    { permissionPolicy: "ask" },
  );
  await agent.writeFile("notes.txt", "one\ntwo\n");
  const requests = answering(agent, "reject");

  await agent.sendPrompt(sessionId, "Change it");

  expect(requests).toHaveLength(1);
  expect(JSON.stringify(requests)).toContain("notes.txt");
  expect((await agent.exec("cat notes.txt")).stdout).toBe("one\ntwo\n");
});

row("allow", async (it) => {
  const calls = [...it.edit("/home/user/notes.txt", "two", "three"), it.run("touch made")];
  const { agent, sessionId, asked } = await newAgentSession(
    it,
    { "Do both": [...calls.map((call) => ({ toolCalls: [call] })), { text: "Done." }] },
    { permissionPolicy: "allow" },
  );
  await agent.writeFile("notes.txt", "one\ntwo\n");

  await agent.sendPrompt(sessionId, "Do both");

  expect(await agent.getEvents(sessionId, { method: "_agentvm/permission_request" })).toEqual([]);
  expect(asked()).toHaveLength(calls.length + 1);
  expect((await agent.exec("cat notes.txt; ls made")).stdout).toBe("one\nthree\nmade\n");
});

row("reject", async (it) => {
  const { agent, sessionId } = await newAgentSession(
    it,
    {
      "Make it": [{ toolCalls: [it.run("touch made")] }, { text: "Then not." }],
      "Are you there?": [{ text: "Still here." }],
    },
    { permissionPolicy: "reject" },
  );
  const requests = answering(agent, "once");

  await agent.sendPrompt(sessionId, "Make it");

  expect(requests).toEqual([]);
  expect(await exists(agent, "made")).toBe(false);
  const [outcome] = await agent.getEvents(sessionId, { method: "_agentvm/permission_outcome" });
  expect(outcome?.params).toMatchObject({ decidedBy: "policy" });
  expect((await agent.sendPrompt(sessionId, "Are you there?")).text).toBe("Still here.");
});

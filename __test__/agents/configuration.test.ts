import type { Agent, CreateSessionOptions } from "agentvm";
import { expect } from "vitest";
import { newMcpService } from "../mcp-service.js";
import type { ModelRequest } from "../model-server.js";
import { newAgentVm } from "./fixtures.js";
import { row } from "./rows.js";
import { inForce } from "./settings.js";
import type { Choices, TestedAgent } from "./tested-agent.js";

/** In what is told of the VM. */
const OF_THE_VM = "There is no sudo";

async function systemPromptOf(
  it: TestedAgent,
  options: CreateSessionOptions,
  loopbackExemptPorts: number[] = [],
): Promise<string> {
  const { agent, session, asked } = await newAgentVm(
    it,
    { "Say hello": [{ text: "Hello." }] },
    { additionalInstructions: "Speak as the client says.", loopbackExemptPorts },
  );
  const sessionId = await session({
    additionalInstructions: "And as the session says.",
    ...options,
  });
  await agent.sendPrompt(sessionId, "Say hello");
  return asked()[0]?.system ?? "";
}

row("instructions", async (it) => {
  const system = await systemPromptOf(it, {});
  expect(system).toContain(OF_THE_VM);
  expect(system).toContain("Speak as the client says.");
  expect(system).toContain("And as the session says.");
});

row("skip os instructions", async (it) => {
  const { url, port } = await newMcpService();
  const system = await systemPromptOf(
    it,
    { skipOsInstructions: true, mcpServers: [{ type: "remote", name: "everyday", url }] },
    [port],
  );
  expect(system).not.toContain(OF_THE_VM);
  expect(system).toContain(`- everyday (remote: ${url})`);
  expect(system).toContain("And as the session says.");
});

type Choose = (agent: Agent, sessionId: string, value: string) => Promise<unknown>;

async function choosesOneByOne(it: TestedAgent, choices: Choices, choose: Choose): Promise<void> {
  const values = Object.keys(choices);
  const { agent, session, asked } = await newAgentVm(it, { "Say hello": [{ text: "Hello." }] });
  const sessionId = await session();
  const requests: (ModelRequest | undefined)[] = [];
  for (const value of values) {
    await choose(agent, sessionId, value);
    await agent.sendPrompt(sessionId, "Say hello");
    requests.push(asked().at(-1));
  }

  expect(values.length).toBeGreaterThan(1);
  expect(requests.map((request) => inForce(choices, request))).toEqual(
    values.map((value) => [value]),
  );
}

row("model", (it) =>
  choosesOneByOne(it, it.models, (agent, id, value) => agent.setModel(id, value)),
);

row("mode", (it) => choosesOneByOne(it, it.modes, (agent, id, value) => agent.setMode(id, value)));

row("thought level", (it) =>
  choosesOneByOne(it, it.thoughtLevels, (agent, id, value) => agent.setThoughtLevel(id, value)),
);

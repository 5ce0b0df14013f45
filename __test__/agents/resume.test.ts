import type { Agent } from "agentvm";
import { expect } from "vitest";
import { agentStoreDir, newClient, newDirectory, runNode } from "../fixtures.js";
import type { ModelRequest } from "../model-server.js";
import { askedOf, type Conversation, envOf, newAgentSession, newConversation } from "./fixtures.js";
import { row } from "./rows.js";
import { choicesIn, lastChoices } from "./settings.js";
import type { TestedAgent } from "./tested-agent.js";

const REMEMBER: Conversation = {
  "My colour is blue": [{ text: "Noted." }],
  "Which one is it?": [{ text: "Blue." }],
};

interface Resumed {
  agent: Agent;
  sessionId: string;
  request: ModelRequest | undefined;
}

/** The request has the earlier conversation, and the settings that were chosen in it. */
async function expectAll(it: TestedAgent, { agent, sessionId, request }: Resumed): Promise<void> {
  const conversation = JSON.stringify(request?.messages);
  expect(conversation).toContain("My colour is blue");
  expect(conversation).toContain("Noted.");
  expect(choicesIn(it, request)).toEqual(lastChoices(it));
  // Out of its own memory.
  expect(await agent.getEvents(sessionId, { method: "_agentvm/session_restored" })).toEqual([]);
}

row("resume closed", async (it) => {
  const { agent, sessionId, asked } = await newAgentSession(it, REMEMBER, lastChoices(it));
  await agent.sendPrompt(sessionId, "My colour is blue");
  await agent.closeSession(sessionId);

  expect((await agent.sendPrompt(sessionId, "Which one is it?")).text).toBe("Blue.");
  await expectAll(it, { agent, sessionId, request: asked()[1] });
});

row("resume asleep", async (it) => {
  const { agent, sessionId, asked } = await newAgentSession(it, REMEMBER, lastChoices(it));
  await agent.sendPrompt(sessionId, "My colour is blue");
  await agent.sleep();

  expect((await agent.sendPrompt(sessionId, "Which one is it?")).text).toBe("Blue.");
  await expectAll(it, { agent, sessionId, request: asked()[1] });
});

const PROGRAM = `
  import { createClient } from "agentvm";
  const [clientOptions, name, sessionOptions] = process.argv.slice(1);
  const agent = createClient(JSON.parse(clientOptions)).vm.getOrCreate("vm");
  const { sessionId } = await agent.createSession(name, JSON.parse(sessionOptions));
  await agent.sendPrompt(sessionId, "My colour is blue");
  process.stdout.write(sessionId, () => process.kill(process.pid, "SIGKILL"));
`;

row("resume killed", async (it) => {
  const model = await newConversation(it, REMEMBER);
  const options = { dataDir: await newDirectory(), loopbackExemptPorts: [model.port] };
  if (it.prepare) {
    const client = await newClient(options);
    await it.prepare(client.vm.getOrCreate("vm"));
    await client.close();
  }
  const killed = await runNode(
    PROGRAM,
    JSON.stringify({ ...options, agentStoreDir }),
    it.name,
    JSON.stringify({ ...lastChoices(it), env: envOf(it, model) }),
  );
  expect(killed).toMatchObject({ signal: "SIGKILL", stderr: "" });
  const sessionId = killed.stdout;

  const agent = (await newClient(options)).vm.getOrCreate("vm");
  expect((await agent.sendPrompt(sessionId, "Which one is it?")).text).toBe("Blue.");
  await expectAll(it, { agent, sessionId, request: askedOf(it, model)[1] });
});

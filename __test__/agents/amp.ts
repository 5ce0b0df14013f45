/**
 * Amp's adapter, with the stand-in for Amp's program: the service of the real one is private. What the
 * real one shows without its service is in `amp.test.ts`.
 */

import { readdir, readFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import type { Agent, CreateSessionOptions } from "agentvm";
import { expect } from "vitest";
import { failureOf, ROOT } from "../fixtures.js";
import { newMcpService } from "../mcp-service.js";
import type { Reply } from "../model-server.js";
import { newAgentSession, newAgentVm } from "./fixtures.js";
import type { Limit, TestedAgent } from "./tested-agent.js";

const STAND_IN = join(ROOT, "adapters/amp/test/stand-in");
const PROGRAM = "/home/user/.local/lib/amp-stand-in/amp";

/** Runs the stand-in on the agent store's Node: another that the VM has may be too old for it. */
const START = `#!/bin/sh
set -- "$0.mts" "$@"
for node in /opt/agentvm/agents/node-22*/bin/node; do exec "$node" "$@"; done
`;

const IN_THE_FIRST_MESSAGE =
  "because Amp takes none for its system prompt: the first message has them";

const never = new Promise(() => {});

export const amp: TestedAgent = {
  name: "amp",
  env: (model) => ({ AMP_API_KEY: "test", AMP_URL: model.url, AMP_CLI_PATH: PROGRAM }),
  // Amp's service repeats, not its program.
  noRetries: {},
  tellsRetries: false,
  async prepare(vm) {
    const directory = dirname(PROGRAM);
    await vm.exec(`mkdir -p ${directory}`);
    for (const name of await readdir(STAND_IN)) {
      await vm.writeFile(join(directory, name), await readFile(join(STAND_IN, name)));
    }
    await vm.writeFile(PROGRAM, START);
    await vm.exec(`chmod +x ${PROGRAM}`);
  },

  run: (command) => ({ name: "shell_command", input: { command } }),
  edit: (path, old_str, new_str) => [{ name: "edit_file", input: { path, old_str, new_str } }],
  mcpTool: (server, tool) => `mcp__${server}__${tool}`,

  models: {},
  modes: {
    high: ({ body }) => body.model === "amp-high",
    ultra: ({ body }) => body.model === "amp-ultra",
  },
  thoughtLevels: {},

  limits: {
    live: {
      because: "because Amp tells a message when it is complete",
      async instead(it) {
        const { agent, sessionId } = await newAgentSession(it, {
          "Tell me": [{ text: "The beginning, and the end.", chunkSize: 5 }],
        });
        await agent.sendPrompt(sessionId, "Tell me");
        const chunks = (await agent.getEvents(sessionId, { method: "session/update" })).filter(
          ({ params }) => params.update.sessionUpdate === "agent_message_chunk",
        );
        expect(chunks.map(({ params }) => params.update.content.text)).toEqual([
          "The beginning, and the end.",
        ]);
      },
    },
    "cancel text": {
      because: "because Amp tells a message when it is complete: a cancelled one is not told",
      async instead(it) {
        const held: Reply = { text: "Never told.", hold: { afterChunks: 1, until: never } };
        const { agent, sessionId, model, asked } = await newAgentSession(it, {
          Talk: [held],
          "Are you there?": [{ text: "Still here." }],
        });
        const turn = agent.sendPrompt(sessionId, "Talk");
        await model.request(0);

        expect(await agent.cancelPrompt(sessionId)).toEqual({ cancelled: true });

        const { stopReason, text } = await turn;
        expect({ stopReason, text }).toEqual({ stopReason: "cancelled", text: "" });
        expect(await asked()[0]?.closed).toBe("aborted");
        expect((await agent.sendPrompt(sessionId, "Are you there?")).text).toBe("Still here.");
      },
    },
    instructions: {
      because: IN_THE_FIRST_MESSAGE,
      async instead(it) {
        const [first, second] = await messagesOf(it, {});
        expect(first).toContain("There is no sudo");
        expect(first).toContain("Speak as the client says.");
        expect(first).toContain("And as the session says.");
        expect(second).toBe("Again");
      },
    },
    "skip os instructions": {
      because: IN_THE_FIRST_MESSAGE,
      async instead(it) {
        const { url, port } = await newMcpService();
        const mcpServers = [{ type: "remote" as const, name: "everyday", url }];
        const options = { skipOsInstructions: true, mcpServers };
        const [first] = await messagesOf(it, options, port);
        expect(first).not.toContain("There is no sudo");
        expect(first).toContain(`- everyday (remote: ${url})`);
        expect(first).toContain("And as the session says.");
      },
    },
    model: chosenByMode((agent, id) => agent.setModel(id, "any")),
    "thought level": chosenByMode((agent, id) => agent.setThoughtLevel(id, "any")),
    "error 401": {
      because: "but in Amp's own words instead of the service's",
      async instead(it) {
        const refused = { status: 401, type: "authentication_error", message: "no" };
        const { agent, sessionId } = await newAgentSession(it, { Fail: [{ error: refused }] });
        const error = await failureOf(() => agent.sendPrompt(sessionId, "Fail"));
        expect(error.code).toBe("AUTH_REQUIRED");
        expect(error.message).toContain("Invalid or missing API key");
      },
    },
    retry: {
      because: "because it is Amp's service that asks the model, and again",
      async instead(it) {
        const overloaded = { status: 529, type: "overloaded_error", message: "busy" };
        const { agent, sessionId } = await newAgentSession(it, {
          "Say hello": [{ error: overloaded }],
        });
        const error = await failureOf(() => agent.sendPrompt(sessionId, "Say hello"));
        expect(error.code).toBe("AGENT_ERROR");
        expect(error.message).toContain("busy");
      },
    },
  },
};

/** What the model is told in a session's first message, and in its second one. */
async function messagesOf(it: TestedAgent, options: CreateSessionOptions, port?: number) {
  const { agent, session, asked } = await newAgentVm(
    it,
    { "Say hello": [{ text: "Hello." }], Again: [{ text: "Hello." }] },
    {
      additionalInstructions: "Speak as the client says.",
      loopbackExemptPorts: port === undefined ? [] : [port],
    },
  );
  const sessionId = await session({
    additionalInstructions: "And as the session says.",
    ...options,
  });
  await agent.sendPrompt(sessionId, "Say hello");
  await agent.sendPrompt(sessionId, "Again");
  const users = asked()[1]?.messages.filter(({ role }) => role === "user");
  return users?.map(({ text }) => text) ?? [];
}

type Choose = (agent: Agent, sessionId: string) => Promise<unknown>;

function chosenByMode(choose: Choose): Limit {
  return {
    because: "because Amp's modes choose both",
    async instead(it) {
      const { agent, sessionId } = await newAgentSession(it, {});
      expect((await failureOf(() => choose(agent, sessionId))).code).toBe("AGENT_UNSUPPORTED");
    },
  };
}

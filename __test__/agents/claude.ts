import { expect } from "vitest";
import { failureOf } from "../fixtures.js";
import type { ModelRequest } from "../model-server.js";
import { newAgentSession } from "./fixtures.js";
import type { TestedAgent } from "./tested-agent.js";

export const claude: TestedAgent = {
  name: "claude",
  env: (model) => ({ ANTHROPIC_API_KEY: "test", ANTHROPIC_BASE_URL: model.url }),
  noRetries: { AGENTVM_MAX_RETRIES: "0" },
  tellsRetries: true,

  // It refuses to run a `sleep` that is the whole command.
  run: (command) => ({
    name: "Bash",
    input: { command: command.startsWith("sleep ") ? `true && ${command}` : command },
  }),
  edit: (path, before, after) => [
    { name: "Read", input: { file_path: path } },
    { name: "Edit", input: { file_path: path, old_string: before, new_string: after } },
  ],
  mcpTool: (server, tool) => `mcp__${server}__${tool}`,
  isTitle: ({ body }) => body.output_config?.format?.schema?.properties?.title !== undefined,

  models: {
    opus: isOf("opus"),
    sonnet: isOf("sonnet"),
  },
  modes: {
    default: (request) => !isPlanning(request),
    plan: isPlanning,
  },
  thoughtLevels: {
    low: ({ body }) => body.output_config?.effort === "low",
    high: ({ body }) => body.output_config?.effort === "high",
  },

  limits: {
    "error 401": {
      because: "but in words of its own where the service complains about the key",
      async instead(it) {
        const refused = { status: 401, type: "authentication_error", message: "invalid x-api-key" };
        const { agent, sessionId } = await newAgentSession(it, {
          Fail: [{ error: refused }],
          "Are you there?": [{ text: "Still here." }],
        });
        const error = await failureOf(() => agent.sendPrompt(sessionId, "Fail"));
        expect(error.code).toBe("AUTH_REQUIRED");
        expect(error.message).toContain("(HTTP 401): Invalid API key");
        expect((await agent.sendPrompt(sessionId, "Are you there?")).text).toBe("Still here.");
      },
    },
  },
};

function isOf(family: string): (request: ModelRequest) => boolean {
  return ({ body }) => body.model.startsWith(`claude-${family}`);
}

function isPlanning({ body }: ModelRequest): boolean {
  return JSON.stringify(body.messages).includes("Plan mode is active");
}

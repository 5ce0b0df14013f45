import { expect } from "vitest";
import { failureOf } from "../fixtures.js";
import { newSseMcpService } from "../mcp-service.js";
import { newAgentSession, newAgentVm } from "./fixtures.js";
import type { Limit, TestedAgent } from "./tested-agent.js";

/** Its newer models write programs that call the tools: `codex.test.ts` has them. */
const MODEL = "gpt-5.5";

export const codex: TestedAgent = {
  name: "codex",
  env: (model) => ({ OPENAI_API_KEY: "test", OPENAI_BASE_URL: model.openaiUrl }),
  noRetries: { AGENTVM_MAX_RETRIES: "0" },
  tellsRetries: true,
  async prepare(vm) {
    await vm.exec("mkdir .codex");
    await vm.writeFile(".codex/config.toml", `model = "${MODEL}"\n`);
  },

  run: (cmd) => ({ name: "exec_command", input: { cmd } }),
  edit: (path, before, after) => [
    {
      name: "apply_patch",
      input: `*** Begin Patch\n*** Update File: ${path}\n@@\n-${before}\n+${after}\n*** End Patch\n`,
    },
  ],
  mcpTool: (server, tool) => `mcp__${server}${tool}`,

  models: {
    [MODEL]: ({ body }) => body.model === MODEL,
    "gpt-5.6-luna": ({ body }) => body.model === "gpt-5.6-luna",
  },
  modes: {
    default: ({ system }) => !system.includes("# Plan Mode"),
    plan: ({ system }) => system.includes("# Plan Mode"),
  },
  thoughtLevels: {
    low: ({ body }) => body.reasoning?.effort === "low",
    high: ({ body }) => body.reasoning?.effort === "high",
  },

  limits: {
    "mcp sse": {
      because: "because it does not speak it",
      async instead(it) {
        const { url, port } = await newSseMcpService();
        const { session } = await newAgentVm(it, {}, { loopbackExemptPorts: [port] });
        const mcpServers = [{ type: "remote" as const, name: "greeter", url }];
        const error = await failureOf(() => session({ mcpServers }));
        expect(error.code).toBe("AGENT_UNSUPPORTED");
        expect(error.message).toContain("greeter");
      },
    },
    "error 429": inItsOwnWords(429, "HTTP 429"),
    "error 500": inItsOwnWords(500, "high demand"),
  },
};

/** Codex drops what the service has said, and keeps the status at most. */
function inItsOwnWords(status: number, told: string): Limit {
  return {
    because: "but in words of its own instead of the service's",
    async instead(it) {
      const { agent, sessionId } = await newAgentSession(it, {
        Fail: [{ error: { status, type: "api_error", message: "the service's words" } }],
        "Are you there?": [{ text: "Still here." }],
      });
      const error = await failureOf(() => agent.sendPrompt(sessionId, "Fail"));
      expect(error.code).toBe("AGENT_ERROR");
      expect(error.message).toContain(told);
      expect((await agent.sendPrompt(sessionId, "Are you there?")).text).toBe("Still here.");
    },
  };
}

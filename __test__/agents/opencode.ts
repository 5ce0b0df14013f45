import type { TestedAgent } from "./tested-agent.js";

export const opencode: TestedAgent = {
  name: "opencode",
  env: (model) => ({ ANTHROPIC_API_KEY: "test", ANTHROPIC_BASE_URL: model.url }),
  noRetries: { AGENTVM_MAX_RETRIES: "0" },
  tellsRetries: true,

  run: (command) => ({ name: "bash", input: { command, description: "Runs a command" } }),
  edit: (filePath, oldString, newString) => [
    { name: "read", input: { filePath } },
    { name: "edit", input: { filePath, oldString, newString } },
  ],
  mcpTool: (server, tool) => `${server}_${tool}`,

  models: {
    "anthropic/claude-opus-4-8": ({ body }) => body.model === "claude-opus-4-8",
    "anthropic/claude-sonnet-5": ({ body }) => body.model === "claude-sonnet-5",
  },
  modes: {
    build: ({ body }) => !JSON.stringify(body.messages).includes("Plan mode ACTIVE"),
    plan: ({ body }) => JSON.stringify(body.messages).includes("Plan mode ACTIVE"),
  },
  thoughtLevels: {
    low: ({ body }) => body.output_config?.effort === "low",
    high: ({ body }) => body.output_config?.effort === "high",
  },

  limits: {},
};

import type { TestedAgent } from "./tested-agent.js";

export const pi: TestedAgent = {
  name: "pi",
  env: (model) => ({ ANTHROPIC_API_KEY: "test", ANTHROPIC_BASE_URL: model.url }),
  noRetries: { AGENTVM_MAX_RETRIES: "0" },
  tellsRetries: true,

  run: (command) => ({ name: "bash", input: { command } }),
  edit: (path, oldText, newText) => [
    { name: "edit", input: { path, edits: [{ oldText, newText }] } },
  ],
  mcpTool: (server, tool) => `${server}_${tool}`,

  models: {
    "anthropic/claude-opus-4-8": ({ body }) => body.model === "claude-opus-4-8",
    "anthropic/claude-sonnet-5": ({ body }) => body.model === "claude-sonnet-5",
  },
  // Planning, the model has no tools that change anything.
  modes: {
    build: ({ toolNames }) => toolNames.includes("write"),
    plan: ({ toolNames }) => toolNames.includes("read") && !toolNames.includes("write"),
  },
  thoughtLevels: {
    low: ({ body }) => body.output_config?.effort === "low",
    high: ({ body }) => body.output_config?.effort === "high",
  },

  limits: {},
};

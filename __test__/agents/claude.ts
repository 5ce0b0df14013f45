import type { ModelRequest } from "../model-server.js";
import type { TestedAgent } from "./tested-agent.js";

export const claude: TestedAgent = {
  name: "claude",
  env: (model) => ({ ANTHROPIC_API_KEY: "test", ANTHROPIC_BASE_URL: model.url }),
  noRetries: { CLAUDE_CODE_MAX_RETRIES: "0" },
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

  limits: {},
};

function isOf(family: string): (request: ModelRequest) => boolean {
  return ({ body }) => body.model.startsWith(`claude-${family}`);
}

function isPlanning({ body }: ModelRequest): boolean {
  return JSON.stringify(body.messages).includes("Plan mode is active");
}

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { expect } from "vitest";
import { ROOT } from "../fixtures.js";
import { type McpService, newMcpService, newSseMcpService } from "../mcp-service.js";
import { newRegistry } from "../npm-registry.js";
import { type Conversation, newAgentVm } from "./fixtures.js";
import { row } from "./rows.js";
import type { TestedAgent } from "./tested-agent.js";

const PROGRAM = join(ROOT, "__test__/mcp-server.mjs");

/** The model calls the server's tool under the name that the agent gives it. */
function greetAda(it: TestedAgent): Conversation {
  const name = it.mcpTool("greeter", "greet");
  return { "Greet Ada": [{ toolCalls: [{ name, input: { name: "Ada" } }] }, { text: "Greeted." }] };
}

row("mcp local", async (it) => {
  const { agent, session, asked } = await newAgentVm(it, greetAda(it));
  await agent.writeFile("mcp-server.mjs", await readFile(PROGRAM));
  const sessionId = await session({
    mcpServers: [
      {
        type: "local",
        name: "greeter",
        command: "node",
        args: ["/home/user/mcp-server.mjs"],
        env: { GREETING: "Good morning" },
      },
    ],
  });

  await agent.sendPrompt(sessionId, "Greet Ada");

  expect(asked()[0]?.toolNames).toContain(it.mcpTool("greeter", "greet"));
  expect(asked()[1]?.toolResults.join()).toContain("Good morning, Ada!");

  await agent.sleep();
  await agent.sendPrompt(sessionId, "Greet Ada");
  expect(asked()[3]?.toolResults.join()).toContain("Good morning, Ada!");
});

async function greetsRemotely(it: TestedAgent, service: McpService): Promise<void> {
  const { agent, session, asked } = await newAgentVm(it, greetAda(it), {
    loopbackExemptPorts: [service.port],
  });
  const headers = { Authorization: "Bearer my-token" };
  const sessionId = await session({
    mcpServers: [{ type: "remote", name: "greeter", url: service.url, headers }],
  });

  await agent.sendPrompt(sessionId, "Greet Ada");

  expect(asked()[0]?.toolNames).toContain(it.mcpTool("greeter", "greet"));
  expect(asked()[1]?.toolResults.join()).toContain("Hello, Ada!");
  expect([...service.authorizations]).toEqual(["Bearer my-token"]);
}

row("mcp remote", async (it) => greetsRemotely(it, await newMcpService()));

row("mcp sse", async (it) => greetsRemotely(it, await newSseMcpService()));

row("mcp npx", async (it) => {
  const registry = await newRegistry({
    name: "greeter",
    version: "1.0.0",
    program: await readFile(PROGRAM, "utf8"),
  });
  const { agent, session, asked } = await newAgentVm(it, greetAda(it), {
    loopbackExemptPorts: [registry.port],
  });
  const sessionId = await session({
    mcpServers: [
      // Its name is that of the package.
      {
        type: "local",
        command: "npx",
        args: ["-y", "greeter"],
        env: { npm_config_registry: registry.url },
      },
    ],
  });

  await agent.sendPrompt(sessionId, "Greet Ada");

  expect(asked()[1]?.toolResults.join()).toContain("Hello, Ada!");
  expect(registry.served).toContain("/greeter/-/greeter-1.0.0.tgz");
});

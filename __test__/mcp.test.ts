import { expect, test } from "vitest";
import { failureOf, newOwnVm } from "./fixtures.js";

test("a server that the VM can't reach is NETWORK_DENIED, naming the option that opens it", async () => {
  const { agent, session } = await newOwnVm();
  const server = { type: "remote", url: "http://127.0.0.1:9/mcp" } as const;
  const error = await failureOf(() => session({ mcpServers: [server] }));
  expect(error.code).toBe("NETWORK_DENIED");
  expect(error.message).toContain("loopbackExemptPorts");
  expect(await agent.listPersistedSessions()).toEqual([]);
});

test("servers without a name are named after their package or host, each differently", async () => {
  const { agent, session } = await newOwnVm();
  const id = await session({
    mcpServers: [
      { type: "local", command: "npx", args: ["-y", "@modelcontextprotocol/server-filesystem"] },
      { type: "local", command: "npx", args: ["-y", "@modelcontextprotocol/server-filesystem"] },
      { type: "local", name: "mine", command: "true" },
    ],
  });
  const { mcpServers } = JSON.parse((await agent.sendPrompt(id, "opened")).text);
  const names: string[] = mcpServers.map(({ name }: { name: string }) => name);
  expect(new Set(names).size).toBe(3);
  expect(names[0]).toContain("filesystem");
  expect(names[2]).toBe("mine");
});

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import type { Agent } from "agentvm";
import { expect, onTestFinished, test } from "vitest";
import { failureOf, newOwnVm, newPiVm, ROOT } from "./fixtures.js";
import { answer } from "./mcp-server.mjs";
import type { ModelRequest, Reply } from "./model-server.js";

const PROGRAM = "/home/user/mcp-server.mjs";

/** Calls the tool whose name ends so, and then is done. */
function greeting({ toolNames, toolResults }: ModelRequest): Reply {
  const name = toolNames.find((name) => name.endsWith("greet"));
  if (toolResults.length > 0 || name === undefined) return { text: "Done." };
  return { toolCalls: [{ name, input: { name: "Ada" } }] };
}

async function install(agent: Agent): Promise<void> {
  await agent.writeFile(PROGRAM, await readFile(join(ROOT, "__test__/mcp-server.mjs")));
}

test("Pi's model calls the tools of a local server, which runs in the VM", async () => {
  const { agent, session, model } = await newPiVm(greeting);
  await install(agent);
  const { sessionId } = await session({
    mcpServers: [
      { type: "local", command: "node", args: [PROGRAM], env: { GREETING: "Good morning" } },
    ],
  });
  await agent.sendPrompt(sessionId, "Greet Ada");
  expect((await model.request(1)).toolResults).toEqual(["Good morning, Ada!"]);

  await agent.sleep();
  await agent.sendPrompt(sessionId, "And again");
  expect((await model.request(3)).toolResults).toEqual(["Good morning, Ada!"]);
});

test("Pi's model calls the tools of a remote server, with its headers", async () => {
  const authorizations = new Set<string | undefined>();
  const server = createServer(async (request, response) => {
    authorizations.add(request.headers.authorization);
    if (request.method !== "POST") {
      response.writeHead(405).end();
      return;
    }
    let body = "";
    for await (const piece of request) body += piece;
    const reply = answer(JSON.parse(body));
    if (reply) {
      response.setHeader("content-type", "application/json").end(JSON.stringify(reply));
    } else {
      response.writeHead(202).end();
    }
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onTestFinished(() => void server.close().closeAllConnections());
  const { port } = server.address() as AddressInfo;
  const { session, agent, model } = await newPiVm(greeting, { loopbackExemptPorts: [port] });
  const { sessionId } = await session({
    mcpServers: [
      {
        type: "remote",
        url: `http://127.0.0.1:${port}/mcp`,
        headers: { Authorization: "Bearer my-token" },
      },
    ],
  });

  await agent.sendPrompt(sessionId, "Greet Ada");

  expect((await model.request(1)).toolResults).toEqual(["Hello, Ada!"]);
  expect([...authorizations]).toEqual(["Bearer my-token"]);
});

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

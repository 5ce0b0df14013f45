/** What Amp's own program shows without its service. Its turns are those of a stand-in: `agents/amp.ts`. */

import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { describe, expect, onTestFinished, test } from "vitest";
import { amp as standIn } from "./agents/amp.js";
import { newAgentVm } from "./agents/fixtures.js";
import { failureOf, newClient } from "./fixtures.js";
import { newMcpService, newSseMcpService } from "./mcp-service.js";
import { watchNetwork } from "./network-watch.js";

const AMP = "/opt/agentvm/agents/amp-*/node_modules/@ampcode/cli-linux-x64/amp";

/** Nobody listens there. */
const NOWHERE = "http://127.0.0.1:9";

/** Answers every request with the status. */
async function newService(status: number): Promise<{ url: string; port: number; keys: string[] }> {
  const keys: string[] = [];
  const server = createServer((request, response) => {
    keys.push(request.headers.authorization ?? "");
    response.writeHead(status, { "content-type": "application/json" });
    response.end(JSON.stringify({ ok: false, error: { code: "auth-required" } }));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onTestFinished(() => void server.close().closeAllConnections());
  const { port } = server.address() as AddressInfo;
  return { url: `http://127.0.0.1:${port}`, port, keys };
}

/** Amp is there for x64 alone. */
describe.runIf(process.arch === "x64")("amp", () => {
  test("a session without a key is refused, with the variable that is missing", async () => {
    const agent = (await newClient()).vm.getOrCreate("vm");
    const error = await failureOf(() => agent.createSession("amp"));
    expect(error.code).toBe("AUTH_REQUIRED");
    expect(error.message).toContain("AMP_API_KEY");
    expect(await agent.listPersistedSessions()).toEqual([]);
  });

  test("the agent is Amp in the pinned version", async () => {
    const agent = (await newClient()).vm.getOrCreate("vm");
    const { agentInfo } = await agent.createSession("amp", { env: { AMP_API_KEY: "key" } });
    const { version } = agentInfo as { version: string };
    expect((await agent.exec(`${AMP} --version`)).stdout).toContain(version);
  });

  test("a key that the service refuses is AUTH_REQUIRED, and nothing else is asked", async () => {
    const service = await newService(401);
    const client = await newClient({ loopbackExemptPorts: [service.port] });
    const agent = client.vm.getOrCreate("vm");
    const env = { AMP_API_KEY: "sgamp_wrong", AMP_URL: service.url };
    await agent.wake();
    const watch = await watchNetwork(agent);
    const { sessionId } = await agent.createSession("amp", { env });

    const error = await failureOf(() => agent.sendPrompt(sessionId, "Hello"));

    expect(error.code).toBe("AUTH_REQUIRED");
    expect(error.message).toContain("Invalid or missing API key");
    expect(service.keys).toContain("Bearer sgamp_wrong");
    const attempts = new Set(await watch.attempts());
    expect([...attempts]).toEqual([`tcp 127.0.0.1:${service.port}`]);
  });

  test("Amp takes the adapter's arguments, and says that its service can't be reached", async () => {
    const agent = (await newClient()).vm.getOrCreate("vm");
    const env = { AMP_API_KEY: "key", AMP_URL: NOWHERE };
    for (const permissionPolicy of ["allow", "ask"] as const) {
      const { sessionId } = await agent.createSession("amp", {
        env,
        permissionPolicy,
        mode: "high",
      });
      const error = await failureOf(() => agent.sendPrompt(sessionId, "Hello"));
      expect(error.code).toBe("AGENT_ERROR");
      // Not of an option that it does not know.
      expect(error.message).toContain(`Couldn't connect to the Amp server at ${NOWHERE}`);
    }
  });

  test.for([
    ["streamable HTTP", newMcpService],
    ["SSE, which it finds out", newSseMcpService],
  ] as const)(
    "Amp reaches the session's MCP servers over %s, with their headers",
    async ([, serve]) => {
      const service = await serve();
      const client = await newClient({ loopbackExemptPorts: [service.port] });
      const agent = client.vm.getOrCreate("vm");
      const headers = { Authorization: "Bearer my-token" };
      const { sessionId } = await agent.createSession("amp", {
        env: { AMP_API_KEY: "key" },
        mcpServers: [{ type: "remote", name: "greeter", url: service.url, headers }],
      });
      const state = `/var/lib/agentvm/sessions/${sessionId}/amp/*`;

      const { stdout } = await agent.exec(`${AMP} --mcp-config ${state}/mcp.json tools list`, {
        env: { AMP_API_KEY: "key", AMP_URL: NOWHERE },
      });

      expect(stdout).toContain("mcp__greeter__greet");
      expect([...service.authorizations]).toEqual(["Bearer my-token"]);
    },
  );

  test("Amp asks us about a tool call, and does as it is told", async () => {
    // Within a turn of the stand-in, because who asks between turns is refused.
    const command = (arg: string) =>
      `${AMP} --settings-file "$AGENTVM_STATE_DIR"/amp/*/settings.json permissions test Bash --cmd ${arg}`;
    const { agent, session, asked } = await newAgentVm(standIn, {
      Ask: [
        { toolCalls: [standIn.run(`${command("one")}; ${command("two")}`)] },
        { text: "Asked." },
      ],
    });
    const sessionId = await session({ permissionPolicy: "ask" });
    const commands: unknown[] = [];
    agent.on("permissionRequest", async ({ request }) => {
      const { rawInput } = request.params.toolCall as { rawInput: { cmd?: string } };
      commands.push(rawInput.cmd);
      const answer = rawInput.cmd === "two" ? "reject" : "once";
      await agent.respondPermission(sessionId, request.permissionId, answer);
    });

    await agent.sendPrompt(sessionId, "Ask");

    expect(commands).toEqual([undefined, "one", "two"]);
    const [output] = asked()[1]?.toolResults ?? [];
    expect(output).toMatch(
      /action: allow.*action: reject.*the user did not allow this use of Bash/s,
    );
  });
});

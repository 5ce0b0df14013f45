/** What is particular to OpenCode; what it has in common with other agents is in `agents/`. */

import type { CreateSessionOptions } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, newModel, newVm, told } from "./fixtures.js";
import type { ModelServer, Reply, Script } from "./model-server.js";

async function newOpenCodeVm(script: Script) {
  const model = await newModel(script);
  const agent = await newVm({ loopbackExemptPorts: [model.port] });
  const env = envOf(model);
  return {
    agent,
    model,
    env,
    session: async (options: CreateSessionOptions = {}) =>
      (await agent.createSession("opencode", { env, ...options })).sessionId,
  };
}

const envOf = (model: ModelServer) => ({
  ANTHROPIC_API_KEY: "test",
  ANTHROPIC_BASE_URL: model.url,
  AGENTVM_MAX_RETRIES: "0",
});

function run(command: string): Reply {
  return { toolCalls: [{ name: "bash", input: { command, description: "Runs a command" } }] };
}

const CONFIG = ".config/opencode/opencode.json";

test("OPENAI_API_KEY and OPENAI_BASE_URL suffice as well", async () => {
  const { agent, model, session } = await newOpenCodeVm([run("echo ran"), { text: "Done." }]);
  const sessionId = await session({
    env: { OPENAI_API_KEY: "test", OPENAI_BASE_URL: model.openaiUrl, AGENTVM_MAX_RETRIES: "0" },
  });

  expect((await agent.sendPrompt(sessionId, "Go")).text).toBe("Done.");

  expect(model.requests.map(({ api, body }) => [api, body.model])).toEqual([
    ["openai-responses", "gpt-5.5"],
    ["openai-responses", "gpt-5.5"],
  ]);
  expect(model.requests[1]?.toolResults.join()).toContain("ran");
  expect(model.unexpected).toEqual([]);
});

test("without any key a prompt is AUTH_REQUIRED, which names the variables", async () => {
  const { agent, session } = await newOpenCodeVm([]);
  const sessionId = await session({ env: {} });
  const error = await failureOf(() => agent.sendPrompt(sessionId, "Go"));
  expect(error.code).toBe("AUTH_REQUIRED");
  expect(error.message).toContain("ANTHROPIC_API_KEY");
});

test("what the user keeps in ~/.config/opencode counts", async () => {
  const { agent, model, session } = await newOpenCodeVm([{ text: "Done." }]);
  await agent.exec("mkdir -p .config/opencode");
  await agent.writeFile(
    CONFIG,
    `{
      // As people write it.
      "model": "anthropic/claude-haiku-4-5",
      "instructions": ["/home/user/mine.md"],
    }`,
  );
  await agent.writeFile("mine.md", "Words of the user.");
  const sessionId = await session({ additionalInstructions: "Words of the caller." });

  await agent.sendPrompt(sessionId, "Go");

  const [request] = model.requests;
  expect(request?.body.model).toBe("claude-haiku-4-5");
  expect(request?.system).toContain("Words of the user.");
  expect(request?.system).toContain("Words of the caller.");
});

test("a prompt that begins with a slash and is no command goes to the model as it is", async () => {
  const { agent, model, session } = await newOpenCodeVm([{ text: "A file." }]);
  const sessionId = await session();
  expect((await agent.sendPrompt(sessionId, "/etc/hosts: what is it?")).text).toBe("A file.");
  expect(model.requests[0]?.userText).toBe("/etc/hosts: what is it?");
});

test("its search tools find the ripgrep of the store", async () => {
  const { agent, model, session } = await newOpenCodeVm([
    { toolCalls: [{ name: "grep", input: { pattern: "needle" } }] },
    { text: "Found." },
  ]);
  await agent.writeFile("hay.txt", "a needle in it\n");
  const sessionId = await session();
  await agent.sendPrompt(sessionId, "Look");
  expect(model.requests[1]?.toolResults.join()).toContain("hay.txt");
  expect((await agent.exec("ls ~/.cache/opencode/bin")).stdout).toBe("");
});

test("it installs no plugin that nobody needs", async () => {
  const { agent, session } = await newOpenCodeVm([{ text: "Done." }]);
  await agent.exec("mkdir .opencode");
  await agent.sendPrompt(await session(), "Go");
  const { stdout } = await agent.exec("ls -A .opencode/node_modules .config/opencode/node_modules");
  expect(stdout).toBe(".config/opencode/node_modules:\n\n.opencode/node_modules:\n");
});

test("an MCP server that can't be used is named when the session is made", async () => {
  const { agent, session } = await newOpenCodeVm([]);
  const servers = [{ type: "local", name: "broken", command: "false" }] as const;
  const error = await failureOf(() => session({ mcpServers: [...servers] }));
  expect(error.code).toBe("AGENT_ERROR");
  expect(error.data).toMatchObject({ data: { type: "mcp_server_failed", server: "broken" } });
  expect(await agent.listPersistedSessions()).toEqual([]);
});

test("under ask, a project's own configuration can't let it act unasked", async () => {
  const { agent, session } = await newOpenCodeVm([run("touch made"), { text: "Done." }]);
  const permission = { bash: "allow", "b*": "allow", "*": "allow" };
  await agent.writeFile(
    "opencode.json",
    JSON.stringify({ permission, agent: { build: { permission } } }),
  );
  const sessionId = await session({ permissionPolicy: "reject" });
  await agent.sendPrompt(sessionId, "Go");
  expect((await agent.exec("ls made")).exitCode).not.toBe(0);
});

test("a project has its say, but under ask it runs nothing that was not asked for", async () => {
  const { agent, model, session } = await newOpenCodeVm(() => ({ text: "Hello." }));
  await agent.exec("mkdir -p project/.git project/.opencode/plugin");
  await agent.writeFile("project/AGENTS.md", "The project's favourite colour is teal.");
  await agent.writeFile(
    "project/.opencode/plugin/its.js",
    "export const Its = async ({ $ }) => { await $`touch /home/user/ran`; return {}; };",
  );
  const cwd = "/home/user/project";

  const sessionId = await session({ permissionPolicy: "ask", cwd });
  await agent.sendPrompt(sessionId, "Say hello");

  expect(model.requests[0]?.system).toContain("The project's favourite colour is teal.");
  expect((await agent.exec("ls ran")).exitCode).not.toBe(0);
});

test("under ask, what its configuration denies stays denied, and planning changes nothing", async () => {
  const write = { name: "write", input: { filePath: "/home/user/made", content: "x" } };
  const { agent, model, session } = await newOpenCodeVm([
    { toolCalls: [write] },
    run("curl --version"),
    { text: "Done." },
  ]);
  await agent.writeFile("opencode.json", '{ "permission": { "bash": { "curl *": "deny" } } }');
  const asked: string[] = [];
  agent.on("permissionRequest", ({ sessionId, request }) => {
    asked.push(request.toolName);
    void agent.respondPermission(sessionId, request.permissionId, "once");
  });
  const sessionId = await session({ permissionPolicy: "ask", mode: "plan" });

  await agent.sendPrompt(sessionId, "Go");

  expect(asked).toEqual([]);
  expect((await agent.exec("ls made")).exitCode).not.toBe(0);
  expect(model.requests.length).toBe(3);
});

test("a subagent asks as the session does", async () => {
  const { agent, session } = await newOpenCodeVm(({ userText, toolResults }) => {
    if (userText.includes("Make a file")) {
      return toolResults.length === 0 ? run("touch made") : { text: "Made." };
    }
    const input = { description: "Help", prompt: "Make a file", subagent_type: "general" };
    return toolResults.length === 0
      ? { toolCalls: [{ name: "task", input }] }
      : { text: "All done." };
  });
  const sessionId = await session({ permissionPolicy: "ask" });
  const asked = told(agent, "permissionRequest");
  const turn = agent.sendPrompt(sessionId, "Go");

  const { request } = await asked;
  expect(request.description).toBe("touch made");
  expect((await agent.exec("ls made")).exitCode).not.toBe(0);
  await agent.respondPermission(sessionId, request.permissionId, "once");

  expect((await turn).text).toBe("All done.");
  expect((await agent.exec("ls made")).stdout).toBe("made\n");
});

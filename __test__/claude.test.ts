/** What is particular to Claude Code; what it has in common with other agents is in `agents/`. */

import type { CreateSessionOptions } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, newModel, newVm, told } from "./fixtures.js";
import type { ModelRequest, Reply } from "./model-server.js";
import { watchNetwork } from "./network-watch.js";

/** A VM whose model answers so, beside giving every session a title. */
async function newClaudeVm(answer: Reply | ((request: ModelRequest) => Reply)) {
  const isTitle = ({ body }: ModelRequest) => body.output_config?.format !== undefined;
  const model = await newModel((request) => {
    if (isTitle(request)) return { text: '{"title":"A test"}' };
    return typeof answer === "function" ? answer(request) : answer;
  });
  const agent = await newVm({ loopbackExemptPorts: [model.port] });
  const env = { ANTHROPIC_API_KEY: "test", ANTHROPIC_BASE_URL: model.url };
  return {
    agent,
    model,
    asked: () => model.requests.filter((request) => !isTitle(request)),
    session: async (options: CreateSessionOptions = {}) => {
      const created = await agent.createSession("claude", { env, ...options });
      return created.sessionId;
    },
  };
}

test("what the user keeps in ~/.claude counts in every session, except for the first mode", async () => {
  const { agent, asked, session } = await newClaudeVm({ text: "Hello." });
  await agent.exec("mkdir -p .claude/skills/juggle");
  await agent.writeFile(".claude/CLAUDE.md", "The user's favourite colour is teal.");
  await agent.writeFile(
    ".claude/skills/juggle/SKILL.md",
    "---\nname: juggle\ndescription: Keeps five balls in the air.\n---\nThrow.",
  );
  await agent.writeFile(
    ".claude/settings.json",
    JSON.stringify({ permissions: { defaultMode: "acceptEdits" } }),
  );
  const sessionId = await session({ permissionPolicy: "ask" });

  await agent.sendPrompt(sessionId, "Say hello");

  const request = JSON.stringify(asked()[0]?.body);
  expect(request).toContain("The user's favourite colour is teal.");
  expect(request).toContain("Keeps five balls in the air.");
  expect((await agent.getModes(sessionId))?.currentModeId).toBe("default");
});

test("a session leaves nothing in ~/.claude, and nothing at all once it is destroyed", async () => {
  const { agent, session } = await newClaudeVm({ text: "Hello." });
  const sessionId = await session();
  await agent.sendPrompt(sessionId, "Say hello");
  const conversations = "find /var/lib/agentvm -name '*.jsonl' | wc -l";
  expect((await agent.exec("ls -d ~/.claude*")).stdout).toBe("");
  expect((await agent.exec(conversations)).stdout).toBe("1\n");

  await agent.destroySession(sessionId);

  expect((await agent.exec(conversations)).stdout).toBe("0\n");
});

test("a project has its say, but runs nothing that was not asked for, nor leads elsewhere", async () => {
  const { agent, asked, session } = await newClaudeVm({ text: "Hello." });
  await agent.exec("mkdir -p project/.claude");
  await agent.writeFile("project/CLAUDE.md", "The project's favourite colour is teal.");
  const hook = { hooks: [{ type: "command", command: "touch /home/user/hooked" }] };
  await agent.writeFile(
    "project/.claude/settings.json",
    JSON.stringify({
      hooks: { UserPromptSubmit: [hook] },
      env: { ANTHROPIC_BASE_URL: "http://127.0.0.1:9" },
    }),
  );
  await agent.writeFile(
    "project/.mcp.json",
    JSON.stringify({ mcpServers: { its: { command: "touch", args: ["/home/user/started"] } } }),
  );
  const cwd = "/home/user/project";
  const ran = async () => (await agent.exec("ls hooked started 2>/dev/null")).stdout.trim();

  const asking = await session({ permissionPolicy: "ask", cwd });
  await agent.sendPrompt(asking, "Say hello");
  expect(JSON.stringify(asked()[0]?.body)).toContain("The project's favourite colour is teal.");
  expect(await ran()).toBe("");

  const allowing = await session({ permissionPolicy: "allow", cwd });
  await agent.sendPrompt(allowing, "Say hello");
  expect(await ran()).toBe("hooked\nstarted");
});

test("an MCP server that can't be used fails createSession", async () => {
  const { session } = await newClaudeVm({ text: "Hello." });
  const error = await failureOf(() =>
    session({ mcpServers: [{ type: "local", name: "broken", command: "false" }] }),
  );
  expect(error.code).toBe("AGENT_ERROR");
  expect(error.message).toContain("broken");
});

test("under the policy allow a plan is made, approved and carried out", async () => {
  const { agent, session } = await newClaudeVm(({ toolResults }) => {
    const write = { file_path: "/home/user/done.txt", content: "done" };
    const calls = [
      { name: "ExitPlanMode", input: { plan: "Write a file." } },
      { name: "Write", input: write },
    ];
    const call = calls[toolResults.length];
    return call ? { toolCalls: [call] } : { text: "Done." };
  });
  const sessionId = await session({ permissionPolicy: "allow", mode: "plan" });

  const { text, stopReason } = await agent.sendPrompt(sessionId, "Make it");

  expect({ text, stopReason }).toEqual({ text: "Done.", stopReason: "end_turn" });
  expect((await agent.exec("cat done.txt")).stdout).toBe("done");
});

test("of an answer that broke off and is repeated, the text is void", async () => {
  let requests = 0;
  const broken: Reply = {
    text: "It was a dark and stormy night.",
    chunkSize: 8,
    delayMs: 20,
    dropConnection: { afterChunks: 3 },
  };
  const { agent, session } = await newClaudeVm(() =>
    requests++ === 0 ? broken : { text: "It was a fine day." },
  );
  const sessionId = await session();

  expect((await agent.sendPrompt(sessionId, "Tell me")).text).toBe("It was a fine day.");

  const [retry] = await agent.getEvents(sessionId, { method: "_agentvm/retry" });
  expect(retry?.params).toMatchObject({ attempt: 1, discardedMessageId: expect.any(String) });
});

test("a session outlives the program claude, in a turn and between two", async () => {
  const { agent, asked, session } = await newClaudeVm(({ userText }) =>
    userText.includes("Talk")
      ? { text: "Now I die.", chunkSize: 4, hold: { afterChunks: 1, until: new Promise(() => {}) } }
      : { text: "Still here." },
  );
  const sessionId = await session();
  const kill = async () => expect((await agent.exec("pkill -KILL -x claude")).exitCode).toBe(0);
  const talking = told(
    agent,
    "sessionEvent",
    ({ event }) => event.params.update?.sessionUpdate === "agent_message_chunk",
  );
  const turn = failureOf(() => agent.sendPrompt(sessionId, "Talk"));
  await talking;
  await kill();
  expect((await turn).code).toBe("AGENT_EXITED");

  expect((await agent.sendPrompt(sessionId, "Are you there?")).text).toBe("Still here.");
  const ended = told(agent, "sessionStatus", ({ status }) => status !== "open");
  await kill();
  await ended;
  expect((await agent.sendPrompt(sessionId, "And now?")).text).toBe("Still here.");

  const conversation = asked()
    .at(-1)
    ?.messages.map(({ text }) => text)
    .join();
  expect(conversation).toContain("Are you there?");
});

test("a session that was never prompted resumes as if nothing had been", async () => {
  const { agent, session } = await newClaudeVm({ text: "Hello." });
  const sessionId = await session({ permissionPolicy: "ask", mode: "plan" });
  await agent.closeSession(sessionId);

  expect((await agent.sendPrompt(sessionId, "Say hello")).text).toBe("Hello.");

  expect((await agent.getModes(sessionId))?.currentModeId).toBe("plan");
  const restored = await agent.getEvents(sessionId, { method: "_agentvm/session_restored" });
  expect(restored).toEqual([]);
});

test("without a key nobody is asked", async () => {
  const { agent, session } = await newClaudeVm({ text: "Hello." });
  await agent.wake();
  const watch = await watchNetwork(agent);
  const sessionId = await session({ env: {} });

  const error = await failureOf(() => agent.sendPrompt(sessionId, "Say hello"));

  expect(error.code).toBe("AUTH_REQUIRED");
  expect(await watch.attempts()).toEqual([]);
});

/** What is particular to Claude Code; what it has in common with other agents is in `agents/`. */

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import type { CreateSessionOptions } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, newModel, newVm, ROOT, told } from "./fixtures.js";
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

/** A model that has these commands run in each turn, one after the other. */
const runs =
  (...commands: string[]) =>
  ({ messages }: ModelRequest): Reply => {
    const turn = messages.slice(messages.findLastIndex(({ role }) => role === "user"));
    const command = commands[turn.filter(({ role }) => role === "tool").length];
    return command ? { toolCalls: [{ name: "Bash", input: { command } }] } : { text: "Done." };
  };

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
  const { agent, asked, session } = await newClaudeVm(runs("touch /home/user/commanded"));
  await agent.exec("mkdir -p project/.claude project/part");
  await agent.writeFile("CLAUDE.md", "Colour 1 is teal.");
  await agent.writeFile("project/CLAUDE.md", "Colour 2 is teal. @more.md");
  await agent.writeFile("project/more.md", "Colour 3 is teal.");
  await agent.writeFile("project/CLAUDE.local.md", "Colour 4 is teal.");
  await agent.writeFile("project/.claude/CLAUDE.md", "Colour 5 is teal.");
  const command = (name: string) => ({ type: "command", command: `touch /home/user/${name}` });
  await agent.writeFile("bash-env", command("sourced").command);
  await agent.writeFile(
    "project/.claude/settings.json",
    JSON.stringify({
      permissions: { allow: ["Bash", "Bash(*)"] },
      hooks: { UserPromptSubmit: [{ hooks: [command("hooked")] }] },
      apiKeyHelper: "touch /home/user/helped; echo key",
      env: { ANTHROPIC_BASE_URL: "http://127.0.0.1:9", BASH_ENV: "/home/user/bash-env" },
    }),
  );
  await agent.exec("cp project/.claude/settings.json project/.claude/settings.local.json");
  await agent.writeFile(
    "project/.mcp.json",
    JSON.stringify({ mcpServers: { its: { command: "touch", args: ["/home/user/started"] } } }),
  );
  const cwd = "/home/user/project";
  const ran = async () =>
    (await agent.exec("ls commanded helped hooked sourced started 2>/dev/null")).stdout.split(/\s/);

  const rejecting = await session({ permissionPolicy: "reject", cwd });
  await agent.sendPrompt(rejecting, "Say hello");
  const words = JSON.stringify(asked()[0]?.body);
  for (const colour of [1, 2, 3, 4, 5]) expect(words).toContain(`Colour ${colour} is teal.`);
  expect(await ran()).toEqual([""]);

  const asking = await session({ permissionPolicy: "ask", cwd });
  agent.on("permissionRequest", ({ sessionId, request }) =>
    agent.respondPermission(sessionId, request.permissionId, "once"),
  );
  await agent.sendPrompt(asking, "Say hello");
  expect(await ran()).toEqual(["commanded", ""]);

  const allowing = await session({ permissionPolicy: "allow", cwd });
  await agent.sendPrompt(allowing, "Say hello");
  expect(await ran()).toEqual(expect.arrayContaining(["hooked", "started"]));
});

test("of what is always allowed in a session, another one knows nothing", async () => {
  const { agent, session } = await newClaudeVm(runs("git tag new"));
  await agent.exec("git init && git -c user.name=A -c user.email=a@b commit --allow-empty -m A");
  agent.on("permissionRequest", ({ sessionId, request }) =>
    agent.respondPermission(sessionId, request.permissionId, "always"),
  );
  const questions = async (sessionId: string) =>
    (await agent.getEvents(sessionId, { method: "_agentvm/permission_request" })).length;
  const allowing = await session({ permissionPolicy: "ask" });
  await agent.sendPrompt(allowing, "Tag it");
  await agent.sendPrompt(allowing, "Tag it again");
  expect(await questions(allowing)).toBe(1);
  expect((await agent.exec("git tag --delete new")).exitCode).toBe(0);

  await agent.sendPrompt(await session({ permissionPolicy: "reject" }), "Tag it");
  expect((await agent.exec("git tag; ls -A .claude")).stdout).toBe("");

  await agent.closeSession(allowing);
  await agent.sendPrompt(allowing, "Tag it once more");
  expect(await questions(allowing)).toBe(2);
});

test("a command that only looks is asked about too: git runs what a repository names", async () => {
  const { agent, asked, session } = await newClaudeVm(runs("git status", "git diff"));
  await agent.exec(
    "git init && echo a > a && git add a && echo b > a" +
      " && git config core.fsmonitor 'touch monitored; false'" +
      " && git config diff.external 'touch compared; true'",
  );
  await agent.sendPrompt(await session({ permissionPolicy: "reject" }), "What is new?");

  expect(asked()).toHaveLength(3);
  expect((await agent.exec("ls")).stdout).toBe("a\n");
});

test("an MCP server that can't be used fails createSession", async () => {
  const { session } = await newClaudeVm({ text: "Hello." });
  const error = await failureOf(() =>
    session({ mcpServers: [{ type: "local", name: "broken", command: "false" }] }),
  );
  expect(error.code).toBe("AGENT_ERROR");
  expect(error.message).toContain("broken");
});

test("nobody else reads the secrets of a session's MCP servers", async () => {
  const { agent, asked, session } = await newClaudeVm({ text: "Hello." });
  await agent.writeFile("mcp-server.mjs", await readFile(join(ROOT, "__test__/mcp-server.mjs")));
  const command = "node";
  const args = ["/home/user/mcp-server.mjs"];
  const env = { GREETING: "my-secret" };
  const mcpServers: CreateSessionOptions["mcpServers"] = [
    { type: "local", name: "greeter", command, args, env },
  ];
  const sessionId = await session({ mcpServers });
  const readable = async () => {
    const lines = "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'; find /tmp -type f -exec cat {} +";
    const { stdout } = await agent.exec(lines);
    expect(stdout).toContain("--mcp-config");
    return stdout;
  };

  expect(await readable()).not.toContain("my-secret");
  await agent.sendPrompt(sessionId, "Say hello");
  await agent.closeSession(sessionId);
  await agent.sendPrompt(sessionId, "Say hello again");
  expect(await readable()).not.toContain("my-secret");
  for (const { toolNames } of asked()) expect(toolNames).toContain("mcp__greeter__greet");
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
    // What had no answer yet may stand in one message with the words after it.
    !/there|now/.test(userText)
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
  expect(error.message).toContain("set ANTHROPIC_API_KEY");
  expect(await watch.attempts()).toEqual([]);
});

test("a mode that acts without asking is none for who wants to be asked", async () => {
  const { agent, session } = await newClaudeVm({ text: "Hello." });
  const sessionId = await session({ permissionPolicy: "reject" });
  const offered = (await agent.getModes(sessionId))?.availableModes.map(({ id }) => id);
  expect(offered).toEqual(expect.arrayContaining(["default", "plan"]));
  for (const mode of ["acceptEdits", "auto", "bypassPermissions"]) {
    expect(offered).not.toContain(mode);
    const error = await failureOf(() => agent.setMode(sessionId, mode));
    expect(error.code).toBe("INVALID_ARGUMENT");
    const raw = () => agent.rawSend(sessionId, "session/set_mode", { modeId: mode });
    expect((await failureOf(raw)).message).toContain("acts without asking");
  }
});

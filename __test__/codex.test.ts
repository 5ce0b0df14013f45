/** What is particular to Codex; what it has in common with other agents is in `agents/`. */

import type { CreateSessionOptions } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, newModel, newVm, told } from "./fixtures.js";
import type { Reply, Script } from "./model-server.js";
import { watchNetwork } from "./network-watch.js";

const decode = (bytes: Uint8Array) => new TextDecoder().decode(bytes);

async function newCodexVm(script: Script) {
  const model = await newModel(script);
  const agent = await newVm({ loopbackExemptPorts: [model.port] });
  const env = {
    OPENAI_API_KEY: "test",
    OPENAI_BASE_URL: model.openaiUrl,
    AGENTVM_MAX_RETRIES: "0",
  };
  return {
    agent,
    model,
    env,
    session: async (options: CreateSessionOptions = {}) =>
      (await agent.createSession("codex", { env, ...options })).sessionId,
  };
}

/** How a newer model calls tools: by a program, in which they are functions. */
function program(source: string): Reply {
  return { toolCalls: [{ name: "functionsexec", input: source }] };
}

const shell = (cmd: string) => `text(await tools.exec_command({ cmd: ${JSON.stringify(cmd)} }))`;

/** An older one calls them itself. */
function run(cmd: string, options: object = {}): Reply {
  return { toolCalls: [{ name: "exec_command", input: { cmd, ...options } }] };
}

test("its default model works by programs, whose commands and patches ask one by one", async () => {
  const patch = "*** Begin Patch\n*** Add File: b.txt\n+two\n*** End Patch\n";
  const { agent, model, session } = await newCodexVm([
    program(`${shell("echo one | tee a.txt")}\nawait tools.apply_patch(${JSON.stringify(patch)})`),
    { text: "Done." },
  ]);
  const asked: string[] = [];
  agent.on("permissionRequest", ({ sessionId, request }) => {
    asked.push(request.toolName);
    void agent.respondPermission(sessionId, request.permissionId, "once");
  });
  const sessionId = await session();

  expect((await agent.sendPrompt(sessionId, "Go")).text).toBe("Done.");

  expect(asked).toEqual(["exec_command", "apply_patch"]);
  expect(model.requests[1]?.toolResults.join()).toContain("one");
  expect(decode(await agent.readFile("b.txt"))).toBe("two\n");
});

test("a cancel ends the command of a program, and the next program runs", async () => {
  const { agent, session } = await newCodexVm((request) =>
    request.userText === "Wait"
      ? program(shell("sleep 600"))
      : request.toolResults.length === 0
        ? program(shell("echo again"))
        : { text: request.toolResults.join() },
  );
  const sessionId = await session();
  const turn = agent.sendPrompt(sessionId, "Wait");
  await agent.exec("until pgrep -x sleep >/dev/null; do sleep 0.02; done");

  await agent.cancelPrompt(sessionId);

  expect((await turn).stopReason).toBe("cancelled");
  expect((await agent.exec("pgrep -x sleep")).stdout).toBe("");
  expect((await agent.sendPrompt(sessionId, "Go on")).text).toContain("again");
});

test("a command that a turn has left running lives on when a later turn is cancelled", async () => {
  const { agent, session } = await newCodexVm(({ userText, toolResults }) => {
    if (userText === "Serve") {
      return toolResults.length === 0
        ? run("exec sleep 700", { yield_time_ms: 250 })
        : { text: "It serves." };
    }
    return toolResults.length === 0
      ? run("exec sleep 800", { yield_time_ms: 250 })
      : { text: "I wait.", hold: { afterChunks: 1, until: new Promise(() => {}) } };
  });
  const sessionId = await session({ model: "gpt-5.5" });
  await agent.sendPrompt(sessionId, "Serve");
  const waiting = told(
    agent,
    "sessionEvent",
    ({ event }) => event.params.update?.sessionUpdate === "agent_message_chunk",
  );
  const turn = agent.sendPrompt(sessionId, "Wait");
  await waiting;

  await agent.cancelPrompt(sessionId);

  expect((await turn).stopReason).toBe("cancelled");
  expect((await agent.exec("pgrep -a sleep")).stdout).toMatch(/^\d+ sleep 700\n$/);
});

test("a subagent asks as the session does", async () => {
  // It inherits the conversation, in which the call that has made it looks aborted.
  const { agent, session } = await newCodexVm(({ toolResults: [first, ...rest] }) => {
    if (first === undefined) {
      const input = { task_name: "helper", message: "Make a file" };
      return { toolCalls: [{ name: "collaborationspawn_agent", input }] };
    }
    if (first === "aborted") {
      return rest.length === 0 ? program(shell("touch made")) : { text: "Made." };
    }
    return rest.length === 0
      ? { toolCalls: [{ name: "collaborationwait_agent", input: { timeout_ms: 60_000 } }] }
      : { text: "All done." };
  });
  const sessionId = await session({ permissionPolicy: "ask" });
  const asked = told(agent, "permissionRequest");
  const turn = agent.sendPrompt(sessionId, "Have it made");

  const { request } = await asked;
  expect(request).toMatchObject({ toolName: "exec_command", description: "touch made" });
  await agent.respondPermission(sessionId, request.permissionId, "once");

  expect((await turn).text).toBe("All done.");
  expect((await agent.exec("ls made")).exitCode).toBe(0);
});

test("what the user keeps in ~/.codex counts, and each session has the rest for itself", async () => {
  const { agent, model, session } = await newCodexVm([{ text: "Hello." }]);
  await agent.exec("mkdir -p .codex/skills/dance");
  await agent.writeFile(".codex/AGENTS.md", "Speak as a pirate.");
  await agent.writeFile(".codex/config.toml", 'model = "gpt-5.5"\n');
  await agent.writeFile(
    ".codex/skills/dance/SKILL.md",
    "---\nname: dance\ndescription: Dances a jig.\n---\nDance.\n",
  );
  const sessionId = await session({ additionalInstructions: "Be brief." });

  await agent.sendPrompt(sessionId, "Hello");

  const { body } = model.requests[0] as { body: object };
  const said = JSON.stringify(body);
  expect(body).toMatchObject({ model: "gpt-5.5" });
  for (const text of ["Speak as a pirate.", "Dances a jig.", "Be brief."]) {
    expect(said.split(text), text).toHaveLength(2);
  }
  expect((await agent.exec("find .codex -type f | wc -l")).stdout.trim()).toBe("3");
  await agent.destroySession(sessionId);
  expect((await agent.exec("ls /var/lib/agentvm/sessions")).stdout).toBe("");
  expect(decode(await agent.readFile(".codex/AGENTS.md"))).toBe("Speak as a pirate.");
});

test("without a key and a login nobody is asked, there is no session, and the variable is named", async () => {
  const { agent } = await newCodexVm([]);
  await agent.wake();
  const watch = await watchNetwork(agent);
  const error = await failureOf(() => agent.createSession("codex"));
  expect(error.code).toBe("AUTH_REQUIRED");
  expect(error.message).toContain("OPENAI_API_KEY");
  expect(await watch.attempts()).toEqual([]);
});

test("a key that is refused is not tried again", async () => {
  const { agent, model, env, session } = await newCodexVm(() => ({
    error: { status: 401, type: "invalid_api_key", message: "No such key" },
  }));
  const sessionId = await session({ env: { ...env, AGENTVM_MAX_RETRIES: "" } });
  const error = await failureOf(() => agent.sendPrompt(sessionId, "Hello"));
  expect(error.code).toBe("AUTH_REQUIRED");
  expect(error.data).toMatchObject({ data: { model: "gpt-6.1-sol", status: 401 } });
  expect(model.requests).toHaveLength(1);
});

test("a turn outlives a rate limit, without repeating what it has done", async () => {
  const limited: Reply = {
    error: { status: 429, type: "rate_limit_exceeded", message: "slow down" },
  };
  const { agent, model, env, session } = await newCodexVm([
    program(shell("echo once >> made")),
    limited,
    limited,
    { text: "Done." },
  ]);
  const patience = { AGENTVM_MAX_RETRIES: "2", AGENTVM_RETRY_DELAY_MS: "10" };
  const sessionId = await session({ env: { ...env, ...patience } });

  expect((await agent.sendPrompt(sessionId, "Make it")).text).toBe("Done.");

  expect(decode(await agent.readFile("made"))).toBe("once\n");
  const retries = await agent.getEvents(sessionId, { method: "_agentvm/retry" });
  expect(retries.map(({ params }) => [params.attempt, params.delayMs])).toEqual([
    [1, 10],
    [2, 20],
  ]);
  const users = model.requests[3]?.messages.filter(({ role }) => role === "user");
  expect(users?.map(({ text }) => text).at(-1)).toBe("Make it");
});

test("a turn that waits for a rate limit to pass can be cancelled", async () => {
  const { agent, env, session } = await newCodexVm(() => ({
    error: { status: 429, type: "rate_limit_exceeded", message: "slow down" },
  }));
  const patience = { AGENTVM_MAX_RETRIES: "1", AGENTVM_RETRY_DELAY_MS: "600000" };
  const sessionId = await session({ env: { ...env, ...patience } });
  const waiting = told(agent, "sessionEvent", ({ event }) => event.method === "_agentvm/retry");
  const turn = agent.sendPrompt(sessionId, "Hello");
  await waiting;

  expect(await agent.cancelPrompt(sessionId)).toEqual({ cancelled: true });
  expect((await turn).stopReason).toBe("cancelled");
});

test("text of an answer that broke off is void when the model starts again", async () => {
  const { agent, env, session } = await newCodexVm([
    { text: "To be or", chunkSize: 4, dropConnection: { afterChunks: 1 } },
    { text: "Not to be." },
  ]);
  const sessionId = await session({ env: { ...env, AGENTVM_MAX_RETRIES: "1" } });
  expect((await agent.sendPrompt(sessionId, "Say it")).text).toBe("Not to be.");
  const [retry] = await agent.getEvents(sessionId, { method: "_agentvm/retry" });
  expect(retry?.params).toMatchObject({ attempt: 1, maxAttempts: 1 });
});

test("when Codex itself ends, the turn says so, and the next one goes on", async () => {
  const { agent, model, session } = await newCodexVm(({ userText }) =>
    userText === "Hold"
      ? { text: "Hold on", hold: { afterChunks: 1, until: new Promise(() => {}) } }
      : { text: "Noted." },
  );
  const sessionId = await session();
  await agent.sendPrompt(sessionId, "My colour is blue");
  const turn = failureOf(() => agent.sendPrompt(sessionId, "Hold"));
  await model.request(1);
  await agent.exec("pkill -KILL -x codex");

  const error = await turn;
  expect(error.code).toBe("AGENT_EXITED");
  expect(error.message).toContain("Codex was killed by SIGKILL");
  expect((await agent.sendPrompt(sessionId, "Which one is it?")).text).toBe("Noted.");
  const conversation = model.requests.at(-1)?.messages.map(({ text }) => text);
  expect(conversation).toContain("My colour is blue");
});

test("a remote MCP server that speaks SSE only is refused", async () => {
  const { session } = await newCodexVm([]);
  const url = "https://mcp.example.com/sse";
  const error = await failureOf(() =>
    session({ mcpServers: [{ type: "remote", name: "old", url, transport: "sse" }] }),
  );
  expect(error.code).toBe("AGENT_UNSUPPORTED");
  expect(error.message).toContain("old");
});

test("a session is not made without an MCP server that can't be started", async () => {
  const { session } = await newCodexVm([]);
  const error = await failureOf(() =>
    session({ mcpServers: [{ type: "local", name: "files", command: "nowhere" }] }),
  );
  expect(error.code).toBe("AGENT_ERROR");
  expect(error.message).toMatch(/files: .*No such file/);
});

test("an image reaches the model", async () => {
  const { agent, model, session } = await newCodexVm([{ text: "A dot." }]);
  const sessionId = await session();
  const data =
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==";
  await agent.sendPrompt(sessionId, [
    { type: "text", text: "What is it?" },
    { type: "image", data, mimeType: "image/png" },
  ]);
  expect(JSON.stringify(model.requests[0]?.body)).toContain(`data:image/png;base64,${data}`);
});

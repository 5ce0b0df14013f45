import { expect } from "vitest";
import { gate, newClient, told } from "../fixtures.js";
import { envOf, newAgentSession, newConversation } from "./fixtures.js";
import { row } from "./rows.js";

const decode = (bytes: Uint8Array) => new TextDecoder().decode(bytes);

row("text", async (it) => {
  const { agent, sessionId, asked, model } = await newAgentSession(it, {
    "Say hello": [{ text: "Hello! This comes in more than one piece." }],
  });

  const { text, stopReason } = await agent.sendPrompt(sessionId, "Say hello");

  expect({ text, stopReason }).toEqual({
    text: "Hello! This comes in more than one piece.",
    stopReason: "end_turn",
  });
  expect(asked()).toHaveLength(1);
  expect(model.unexpected).toEqual([]);
});

row("edit", async (it) => {
  const calls = it.edit("/home/user/notes.txt", "two", "three");
  const { agent, sessionId } = await newAgentSession(it, {
    "Change it": [...calls.map((call) => ({ toolCalls: [call] })), { text: "Changed." }],
  });
  await agent.writeFile("notes.txt", "one\ntwo\n");

  const { text } = await agent.sendPrompt(sessionId, "Change it");

  expect(text).toContain("Changed.");
  expect(decode(await agent.readFile("notes.txt"))).toBe("one\nthree\n");
});

row("command", async (it) => {
  const command = "echo from $(id -un) > made.txt && cat made.txt";
  const { agent, sessionId, asked } = await newAgentSession(it, {
    "Run it": [{ toolCalls: [it.run(command)] }, { text: "It ran." }],
  });

  const { text } = await agent.sendPrompt(sessionId, "Run it");

  expect(text).toContain("It ran.");
  expect(decode(await agent.readFile("made.txt"))).toBe("from user\n");
  expect(asked()[1]?.toolResults.join()).toContain("from user");
});

row("context", async (it) => {
  const { agent, sessionId, asked } = await newAgentSession(it, {
    "My colour is blue": [{ text: "Noted." }],
    "Which one is it?": [{ text: "Blue." }],
  });
  await agent.sendPrompt(sessionId, "My colour is blue");

  const { text } = await agent.sendPrompt(sessionId, "Which one is it?");

  expect(text).toBe("Blue.");
  const conversation = asked()[1]
    ?.messages.map(({ text }) => text)
    .join();
  expect(conversation).toContain("My colour is blue");
  expect(conversation).toContain("Noted.");
});

row("order", async (it) => {
  const { agent, sessionId } = await newAgentSession(it, {
    "Go on": [
      { thinking: "First I look.", text: "I look.", toolCalls: [it.run("echo one")] },
      { toolCalls: [it.run("echo two")] },
      { text: "I have seen it." },
    ],
  });
  const kinds: string[] = [];
  agent.on("sessionEvent", ({ event }) => {
    const kind = event.params.update?.sessionUpdate ?? event.method;
    if (ORDERED.has(kind) && kind !== kinds.at(-1)) kinds.push(kind);
  });

  await agent.sendPrompt(sessionId, "Go on");

  expect(kinds).toEqual([
    "_agentvm/turn_start",
    "user_message_chunk",
    "agent_thought_chunk",
    "agent_message_chunk",
    "tool_call",
    "tool_call_update",
    "tool_call",
    "tool_call_update",
    "agent_message_chunk",
    "_agentvm/turn_end",
  ]);
});

const ORDERED = new Set([
  "_agentvm/turn_start",
  "user_message_chunk",
  "agent_thought_chunk",
  "agent_message_chunk",
  "tool_call",
  "tool_call_update",
  "_agentvm/turn_end",
]);

row("live", async (it) => {
  const seen = gate();
  const { agent, sessionId } = await newAgentSession(it, {
    "Tell me": [
      {
        text: "The beginning, and the end.",
        chunkSize: 14,
        hold: { afterChunks: 1, until: seen.opened },
      },
    ],
  });
  const first = told(
    agent,
    "sessionEvent",
    ({ event }) => event.params.update?.sessionUpdate === "agent_message_chunk",
  );
  const turn = agent.sendPrompt(sessionId, "Tell me");

  expect((await first).event.params.update.content.text).toContain("The beginning");
  seen.open();
  expect((await turn).text).toBe("The beginning, and the end.");
});

row("two sessions", async (it) => {
  const [one, two] = [gate(), gate()];
  // Each model answers when the other has been asked: no turn waits for the end of another.
  const first = await newConversation(it, {
    "Who are you?": [
      () => {
        one.open();
        return { text: "I am the first.", hold: { afterChunks: 0, until: two.opened } };
      },
    ],
  });
  const second = await newConversation(it, {
    "Who are you?": [
      () => {
        two.open();
        return { text: "I am the second.", hold: { afterChunks: 0, until: one.opened } };
      },
    ],
  });
  const client = await newClient({ loopbackExemptPorts: [first.port, second.port] });
  const agent = client.vm.getOrCreate("vm");
  await it.prepare?.(agent);
  const sessions = await Promise.all(
    [first, second].map((model) => agent.createSession(it.name, { env: envOf(it, model) })),
  );

  const turns = sessions.map(({ sessionId }) => agent.sendPrompt(sessionId, "Who are you?"));

  const texts = (await Promise.all(turns)).map(({ text }) => text);
  expect(texts).toEqual(["I am the first.", "I am the second."]);
});

import { expect } from "vitest";
import { told } from "../fixtures.js";
import type { Reply } from "../model-server.js";
import { newAgentSession } from "./fixtures.js";
import { row } from "./rows.js";

/** What waits for it ends with its connection. */
const HELD: Reply = {
  text: "It ends here, not there.",
  chunkSize: 12,
  hold: { afterChunks: 1, until: new Promise(() => {}) },
};

row("cancel text", async (it) => {
  const { agent, sessionId, asked } = await newAgentSession(it, {
    Talk: [HELD],
    "Are you there?": [{ text: "Still here." }],
  });
  const streaming = told(
    agent,
    "sessionEvent",
    ({ event }) => event.params.update?.sessionUpdate === "agent_message_chunk",
  );
  const turn = agent.sendPrompt(sessionId, "Talk");
  await streaming;

  expect(await agent.cancelPrompt(sessionId)).toEqual({ cancelled: true });

  const { stopReason, text } = await turn;
  expect({ stopReason, text }).toEqual({ stopReason: "cancelled", text: "It ends here" });
  expect(await asked()[0]?.closed).toBe("aborted");
  expect((await agent.sendPrompt(sessionId, "Are you there?")).text).toBe("Still here.");
});

row("cancel command", async (it) => {
  const { agent, sessionId } = await newAgentSession(it, {
    Wait: [{ toolCalls: [it.run("sleep 600")] }],
    "Are you there?": [{ text: "Still here." }],
  });
  const turn = agent.sendPrompt(sessionId, "Wait");
  await agent.exec("until pgrep -x sleep >/dev/null; do sleep 0.02; done");

  expect(await agent.cancelPrompt(sessionId)).toEqual({ cancelled: true });

  // Resolved: nothing of the turn goes on.
  expect((await agent.exec("pgrep -x sleep")).stdout).toBe("");
  expect((await turn).stopReason).toBe("cancelled");
  expect((await agent.sendPrompt(sessionId, "Are you there?")).text).toBe("Still here.");
});

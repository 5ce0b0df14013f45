import { expect } from "vitest";
import { failureOf } from "../fixtures.js";
import type { Reply } from "../model-server.js";
import { newAgentSession, newAgentVm } from "./fixtures.js";
import { type Row, row } from "./rows.js";

/** With its repetitions turned down. */
const LONGEST_MS = 10_000;

interface Failure {
  row: Row;
  reply: Reply;
  code: string;
}

const FAILURES: Failure[] = [
  {
    row: "error 401",
    reply: { error: { status: 401, type: "authentication_error", message: "invalid x-api-key" } },
    code: "AUTH_REQUIRED",
  },
  {
    row: "error 429",
    reply: { error: { status: 429, type: "rate_limit_error", message: "slow down" } },
    code: "AGENT_ERROR",
  },
  {
    row: "error 500",
    reply: { error: { status: 500, type: "api_error", message: "out of order" } },
    code: "AGENT_ERROR",
  },
  {
    row: "error dropped",
    reply: {
      text: "Some text, then nothing.",
      chunkSize: 5,
      dropConnection: { afterChunks: 2 },
    },
    code: "AGENT_ERROR",
  },
  {
    row: "error malformed",
    reply: {
      text: "Some text, then noise.",
      chunkSize: 5,
      malformed: { afterChunks: 2, data: "event: message\ndata: {broken\n\n" },
    },
    code: "AGENT_ERROR",
  },
];

for (const failure of FAILURES) {
  row(failure.row, async (it) => {
    const { agent, sessionId } = await newAgentSession(it, {
      Fail: [failure.reply],
      "Are you there?": [{ text: "Still here." }],
    });
    const start = performance.now();

    const error = await failureOf(() => agent.sendPrompt(sessionId, "Fail"));

    expect(performance.now() - start).toBeLessThan(LONGEST_MS);
    expect(error.code).toBe(failure.code);
    if (failure.reply.error) expect(error.message).toContain(failure.reply.error.message);
    // Not always the last event: some agents find a title for the session meanwhile.
    const [end] = await agent.getEvents(sessionId, { method: "_agentvm/turn_end" });
    expect(end?.params.error).toMatchObject({ code: failure.code, message: error.message });
    const { text, stopReason } = await agent.sendPrompt(sessionId, "Are you there?");
    expect({ text, stopReason }).toEqual({ text: "Still here.", stopReason: "end_turn" });
  });
}

row("retry", async (it) => {
  const overloaded: Reply = { error: { status: 529, type: "overloaded_error", message: "busy" } };
  let requests = 0;
  const { agent, model } = await newAgentVm(it, {
    "Say hello": [() => (requests++ < 2 ? overloaded : { text: "At last." })],
  });
  const { sessionId } = await agent.createSession(it.name, { env: it.env(model) });

  const { text, stopReason } = await agent.sendPrompt(sessionId, "Say hello");

  expect({ text, stopReason }).toEqual({ text: "At last.", stopReason: "end_turn" });
  const told = await agent.getEvents(sessionId, { method: "_agentvm/retry" });
  expect(told.map(({ params }) => params.attempt)).toEqual(it.tellsRetries ? [1, 2] : []);
});

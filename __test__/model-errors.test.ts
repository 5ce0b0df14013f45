import { expect, test } from "vitest";
import { failureOf, newPiSession, newPiVm } from "./fixtures.js";
import type { Reply } from "./model-server.js";

const AFTERWARDS: Reply = { text: "Back again." };

test("a key that the model's service refuses is AUTH_REQUIRED, with the agent's code and data", async () => {
  const { agent, sessionId } = await newPiSession([
    { error: { status: 401, type: "authentication_error", message: "invalid x-api-key" } },
    AFTERWARDS,
  ]);

  const error = await failureOf(() => agent.sendPrompt(sessionId, "Hello"));

  expect(error.code).toBe("AUTH_REQUIRED");
  expect(error.message).toContain("invalid x-api-key");
  expect(error.data).toMatchObject({
    code: -32000,
    data: { provider: "anthropic", status: 401, type: "authentication_error" },
  });
  expect((await agent.sendPrompt(sessionId, "Hello")).text).toBe("Back again.");
});

test.for<[string, Reply, object]>([
  [
    "a rate limit",
    { error: { status: 429, type: "rate_limit_error", message: "slow down" } },
    { status: 429, type: "rate_limit_error", message: "slow down" },
  ],
  [
    "an error in the middle of the stream",
    { text: "So", streamError: { type: "overloaded_error", message: "overloaded" } },
    { type: "overloaded_error", message: "overloaded" },
  ],
])(
  "%s is AGENT_ERROR with the agent's code and data; the session goes on",
  async ([, reply, data]) => {
    const { agent, sessionId } = await newPiSession([reply, AFTERWARDS]);

    const error = await failureOf(() => agent.sendPrompt(sessionId, "Hello"));

    expect(error.code).toBe("AGENT_ERROR");
    expect(error.data).toMatchObject({
      code: -32603,
      data: { provider: "anthropic", model: expect.any(String), ...data },
    });
    const end = (await agent.getSessionEvents(sessionId)).at(-1)?.event;
    expect(end).toMatchObject({
      method: "_agentvm/turn_end",
      params: { error: { code: "AGENT_ERROR", message: error.message, data: error.data } },
    });

    const { text, stopReason } = await agent.sendPrompt(sessionId, "Hello again");
    expect({ text, stopReason }).toEqual({ text: "Back again.", stopReason: "end_turn" });
  },
);

test("a model that nobody reaches is AGENT_ERROR", async () => {
  const { agent, sessionId, model } = await newPiSession([]);
  await model.close();
  const error = await failureOf(() => agent.sendPrompt(sessionId, "Hello"));
  expect(error.code).toBe("AGENT_ERROR");
});

test("a failed request is repeated as often as the session says, and the log tells of it", async () => {
  const overloaded: Reply = { error: { status: 529, type: "overloaded_error", message: "busy" } };
  const { agent, session, model } = await newPiVm([overloaded, overloaded, { text: "At last." }]);
  const { sessionId } = await session({
    env: {
      ANTHROPIC_API_KEY: "test",
      ANTHROPIC_BASE_URL: model.url,
      AGENTVM_MAX_RETRIES: "2",
      AGENTVM_RETRY_DELAY_MS: "1",
    },
  });

  expect((await agent.sendPrompt(sessionId, "Hello")).text).toBe("At last.");

  const retries = (await agent.getSessionEvents(sessionId))
    .map(({ event }) => event)
    .filter(({ method }) => method === "_agentvm/retry");
  expect(retries).toMatchObject([
    { params: { sessionId, attempt: 1, maxAttempts: 2, error: { status: 529 } } },
    { params: { sessionId, attempt: 2, maxAttempts: 2, error: { status: 529 } } },
  ]);
});

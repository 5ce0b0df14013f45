import type { Agent } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, gate, newPiSession } from "./fixtures.js";

/** What waits for it ends with its connection. */
const never = new Promise<never>(() => {});

/** Returns when it runs. */
const BACKGROUND = "setsid sleep 600 >/dev/null 2>&1 & until pgrep -x sleep >/dev/null; do :; done";

const HELD = {
  text: "It ends here, not there.",
  chunkSize: 12,
  hold: { afterChunks: 1, until: never },
};

/** Resolves with the first update of this kind. */
function update(agent: Agent, kind: string): Promise<void> {
  const { opened, open } = gate();
  const off = agent.on("sessionEvent", ({ event }) => {
    if (event.params.update?.sessionUpdate !== kind) return;
    off();
    open();
  });
  return opened;
}

test("what the agent left running in the background outlives its turn, and a later cancel", async () => {
  const { agent, sessionId } = await newPiSession([
    { toolCalls: [{ name: "bash", input: { command: BACKGROUND } }] },
    { text: "It runs." },
    HELD,
  ]);
  await agent.sendPrompt(sessionId, "Start a server");
  expect((await agent.exec("pgrep -x sleep")).exitCode).toBe(0);

  const streaming = update(agent, "agent_message_chunk");
  const turn = agent.sendPrompt(sessionId, "Talk");
  await streaming;
  await agent.cancelPrompt(sessionId);
  await turn;

  expect((await agent.exec("pgrep -x sleep")).exitCode).toBe(0);
});

test("the log says that a turn was cancelled, and the session goes on", async () => {
  const { agent, sessionId } = await newPiSession([HELD, { text: "Still here." }]);
  const streaming = update(agent, "agent_message_chunk");
  const turn = agent.sendPrompt(sessionId, "Talk");
  await streaming;
  await agent.cancelPrompt(sessionId);
  await turn;

  expect((await agent.getSessionEvents(sessionId)).at(-1)?.event).toMatchObject({
    method: "_agentvm/turn_end",
    params: { stopReason: "cancelled" },
  });
  expect(await agent.sendPrompt(sessionId, "Are you there?")).toMatchObject({
    text: "Still here.",
    stopReason: "end_turn",
  });
});

test("cancelPrompt without a turn cancels nothing", async () => {
  const { agent, sessionId } = await newPiSession([{ text: "Hello." }]);
  expect(await agent.cancelPrompt(sessionId)).toEqual({ cancelled: false });
  await agent.sendPrompt(sessionId, "Hello");
  expect(await agent.cancelPrompt(sessionId)).toEqual({ cancelled: false });
  await agent.closeSession(sessionId);
  expect(await agent.cancelPrompt(sessionId)).toEqual({ cancelled: false });
});

test("a second prompt during a turn is SESSION_BUSY, and does not disturb it", async () => {
  const answer = gate();
  const { agent, sessionId, model } = await newPiSession([
    { text: "Done.", hold: { afterChunks: 0, until: answer.opened } },
  ]);
  const turn = agent.sendPrompt(sessionId, "Work");
  await model.request(0);

  const error = await failureOf(() => agent.sendPrompt(sessionId, "And this"));
  expect(error.code).toBe("SESSION_BUSY");
  expect(error.message).toContain(sessionId);

  answer.open();
  expect((await turn).text).toBe("Done.");
  const log = JSON.stringify(await agent.getSessionEvents(sessionId));
  expect(log).not.toContain("And this");
});

test("aborting the signal of sendPrompt ends the turn", async () => {
  const { agent, sessionId, model } = await newPiSession([HELD, { text: "Hello." }]);
  const streaming = update(agent, "agent_message_chunk");
  const controller = new AbortController();
  const turn = agent.sendPrompt(sessionId, "Talk", { signal: controller.signal });
  await streaming;
  const reason = new Error("the user closed the tab");
  controller.abort(reason);

  const error = await failureOf(() => turn);

  expect(error).toMatchObject({ name: "AbortError", code: "ABORTED", cause: reason });
  expect(await (await model.request(0)).closed).toBe("aborted");
  // It has ended: the session takes the next prompt.
  expect((await agent.sendPrompt(sessionId, "Hello")).text).toBe("Hello.");
});

test("a signal that is aborted already starts no turn", async () => {
  const { agent, sessionId, model } = await newPiSession([{ text: "Hello." }]);
  const error = await failureOf(() =>
    agent.sendPrompt(sessionId, "Talk", { signal: AbortSignal.abort() }),
  );
  expect(error).toMatchObject({ name: "AbortError", code: "ABORTED" });
  expect(model.requests).toEqual([]);
  expect(await agent.getSessionEvents(sessionId)).toEqual([]);
});

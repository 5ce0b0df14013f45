import { expect, test } from "vitest";
import { watchNetwork } from "../network-watch.js";
import { newAgentVm } from "./fixtures.js";
import { pi } from "./pi.js";
import { row } from "./rows.js";
import type { TestedAgent } from "./tested-agent.js";

/** An address of the VM itself, or the host's if the port is one of `loopbackExemptPorts`. */
const LOOPBACK = /^tcp (127\..*|\[::1\]):\d+$/;

/** A start, a turn with a command, a resume and another turn: what is asked for, and the model's address. */
async function attemptsOf(it: TestedAgent, command: string) {
  const { agent, session, model } = await newAgentVm(it, {
    "Do it": [{ toolCalls: [it.run(command)] }, { text: "Done." }],
    "And more": [{ text: "More." }],
  });
  await agent.wake();
  const watch = await watchNetwork(agent);
  const sessionId = await session();
  await agent.sendPrompt(sessionId, "Do it");
  await agent.closeSession(sessionId);
  await agent.sendPrompt(sessionId, "And more");
  await agent.closeSession(sessionId);

  expect(model.unexpected).toEqual([]);
  const attempts = await watch.attempts();
  return {
    attempts,
    elsewhere: attempts.filter((attempt) => !LOOPBACK.test(attempt)),
    toModel: `tcp 127.0.0.1:${model.port}`,
  };
}

row("network", async (it) => {
  const { attempts, elsewhere, toModel } = await attemptsOf(it, "echo done");
  expect(elsewhere).toEqual([]);
  expect(attempts).toContain(toModel);
});

test("an agent that looks elsewhere would not go unnoticed", async () => {
  const { elsewhere } = await attemptsOf(pi, "getent hosts telemetry.invalid.");
  expect(elsewhere).toEqual(["dns telemetry.invalid"]);
});

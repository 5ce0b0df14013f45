import { expect } from "vitest";
import { watchNetwork } from "../network-watch.js";
import { newAgentVm } from "./fixtures.js";
import { row } from "./rows.js";

/** An address of the VM itself, or the host's if the port is one of `loopbackExemptPorts`. */
const LOOPBACK = /^tcp (127\..*|\[::1\]):\d+$/;

row("network", async (it) => {
  const { agent, session, model } = await newAgentVm(it, {
    "Do it": [{ toolCalls: [it.run("echo done")] }, { text: "Done." }],
    "And more": [{ text: "More." }],
  });
  await agent.wake();
  const watch = await watchNetwork(agent);

  const sessionId = await session();
  await agent.sendPrompt(sessionId, "Do it");
  await agent.closeSession(sessionId);
  await agent.sendPrompt(sessionId, "And more");
  await agent.closeSession(sessionId);

  const attempts = await watch.attempts();
  expect(attempts.filter((attempt) => !LOOPBACK.test(attempt))).toEqual([]);
  expect(attempts).toContain(`tcp 127.0.0.1:${model.port}`);
  expect(model.unexpected).toEqual([]);
});

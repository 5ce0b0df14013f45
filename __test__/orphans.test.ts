/** An agent is more than one process: its adapter may die alone. */

import { expect, test } from "vitest";
import { claude } from "./agents/claude.js";
import { codex } from "./agents/codex.js";
import { newAgentSession } from "./agents/fixtures.js";
import { opencode } from "./agents/opencode.js";
import { failureOf } from "./fixtures.js";

test.for([claude, codex, opencode])(
  "what $name has left does not go on with a turn whose adapter was killed",
  {
    timeout: 120_000,
  },
  async (it) => {
    const { agent, sessionId, asked } = await newAgentSession(it, {
      Work: [{ toolCalls: [it.run("touch begun && sleep 2")] }, { text: "More." }],
      "Are you there?": [{ text: "Still here." }],
    });
    const turn = failureOf(() => agent.sendPrompt(sessionId, "Work"));
    await agent.exec("until [ -e begun ]; do sleep 0.05; done");
    const before = asked().length;

    // The adapter alone, as the kernel does it that lacks memory. The pattern does not match the shell.
    await agent.exec("kill -KILL $(grep -lz '[m]ain.js' /proc/[0-9]*/cmdline | cut -d/ -f3)");

    expect((await turn).code).toBe("AGENT_EXITED");
    const left = await agent.exec("readlink /proc/[0-9]*/exe | grep ^/opt/agentvm/agents/");
    expect(left.stdout).toBe("");
    expect(asked()).toHaveLength(before);
    expect((await agent.sendPrompt(sessionId, "Are you there?")).text).toContain("Still here.");
  },
);

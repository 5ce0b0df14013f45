/** The matrix: what every agent can do, or documents that it can't. One sentence is one test an agent. */

import { describe, test } from "vitest";
import { AGENTS } from "./all.js";
import type { TestedAgent } from "./tested-agent.js";

export const ROWS = {
  text: "answers with the model's text, and asks for nothing more than that",
  edit: "edits a file",
  command: "runs a command in the VM",
  context: "remembers the earlier turns of a session",
  order: "streams thoughts, text and tool calls in their order",
  live: "streams text while the model is still writing",
  "two sessions": "has sessions with endpoints of their own, at the same time",

  "cancel text": "ends a turn in the middle of the model's answer",
  "cancel command": "kills the command of a turn that is cancelled",

  "ask once": "asks before each command, and runs what is allowed once",
  "ask always": "does not ask again for what is allowed always",
  "ask reject": "does not run what is rejected, and the session goes on",
  "ask edit": "asks before it edits a file, and leaves alone what is rejected",
  allow: "never asks under the policy allow, neither us nor another model",
  reject: "does nothing under the policy reject",

  "mcp local": "calls a tool of an MCP server in the VM, also after a resume",
  "mcp remote": "calls a tool of a remote MCP server, with its header",
  "mcp sse": "calls a tool of a remote MCP server that knows the older SSE only",
  "mcp npx": "calls a tool of an MCP server that npx fetches from a registry",

  instructions: "tells the model the instructions of the client, of the session and of the VM",
  "skip os instructions": "leaves out what is told of the VM, and keeps the list of MCP servers",

  model: "asks the model that setModel has chosen",
  mode: "works in the mode that setMode has chosen",
  "thought level": "lets the model think as setThoughtLevel has chosen",

  "error 401": "tells of a key that the model's service refuses",
  "error 429": "tells of a rate limit",
  "error 500": "tells of a service that is out of order",
  "error dropped": "tells of a connection that drops in the middle of an answer",
  "error malformed": "tells of a stream of broken bytes",
  retry: "survives an overloaded service without being told to",

  "resume closed": "goes on after closeSession, with its conversation and settings",
  "resume asleep": "goes on after sleep, with its conversation and settings",
  "resume killed": "goes on after SIGKILL of its host process, with its conversation and settings",

  network: "connects to no host but the model's",
} as const;

export type Row = keyof typeof ROWS;

/** Some agents take many seconds to start where there is little of a processor for them. */
const PATIENT = { timeout: 120_000 };

/**
 * Makes a test for each agent. Where the agent has a limit, the test is the limit's own: what happens
 * instead is asserted as well.
 *
 * `npx vitest run -t "^claude "` runs one agent.
 */
export function row(name: Row, everyAgent: (it: TestedAgent) => Promise<void>): void {
  for (const it of AGENTS) {
    const limit = it.limits[name];
    describe(it.name, () => {
      if (limit) {
        test(`${ROWS[name]}: not so, ${limit.because}`, PATIENT, () => limit.instead(it));
      } else {
        test(ROWS[name], PATIENT, () => everyAgent(it));
      }
    });
  }
}

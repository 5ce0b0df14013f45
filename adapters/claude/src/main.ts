#!/usr/bin/env node
/** Claude Code as an ACP agent on standard input and output, as agentvm wants it. */

import {
  type ClaudeAcpAgent,
  v1AgentApp,
} from "@agentclientprotocol/claude-agent-acp/dist/acp-agent.js";
import { applyManagedPolicyEnv } from "@agentclientprotocol/claude-agent-acp/dist/managed-policy.js";
import { Bridge } from "./bridge.js";
import { readMessages, writeMessage } from "./lines.js";
import type { Message } from "./message.js";
import { takeStdout } from "./shared/stdout.js";

/** How often is looked whether `claude` still runs while it has nothing to do. */
const WATCH_MS = 500;

const output = takeStdout();
process.on("unhandledRejection", (reason) => console.error(reason));

await applyManagedPolicyEnv();

let agent: ClaudeAcpAgent | undefined;
let toAgent: ReadableStreamDefaultController<object> | undefined;

const bridge = new Bridge(
  () => {
    if (!agent) throw new Error("not connected");
    return agent;
  },
  (message) => writeMessage(output, message),
  (message) => toAgent?.enqueue(message),
);

const logger = { log() {}, error: console.error };
v1AgentApp(logger, (created) => {
  agent = created;
}).connect({
  readable: new ReadableStream<object>({
    start(controller) {
      toAgent = controller;
    },
  }),
  writable: new WritableStream<object>({
    async write(message) {
      await bridge.fromAgent(message as Message);
      if (bridge.hasLost()) await exit(1);
    },
  }),
});

let exiting = false;
async function exit(code: number): Promise<void> {
  if (exiting) return;
  exiting = true;
  await agent?.dispose().catch((error: unknown) => console.error("at the end:", error));
  process.exit(code);
}

// A client starts an agent that has ended again, and resumes its sessions.
setInterval(() => bridge.hasLost() && void exit(1), WATCH_MS).unref();
// The client is gone when it closes either end.
output.on("error", () => void exit(0));
process.on("SIGTERM", () => void exit(143));
process.on("SIGINT", () => void exit(130));
process.on("SIGHUP", () => void exit(129));

for await (const message of readMessages(process.stdin)) await bridge.fromClient(message);
await exit(0);

// The smallest agent that is of use: it speaks ACP on its standard streams and remembers what it was told.
// It has no model. It answers a prompt with the number of prompts so far, and runs `!command`s.

import { exec } from "node:child_process";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { createInterface } from "node:readline";

// Durable, of this session alone, and gone when the session is destroyed.
const MEMORY = `${process.env.AGENTVM_STATE_DIR}/prompts.json`;

/** The command of the turn. @type {import("node:child_process").ChildProcess | undefined} */
let running;

/** @param {object} message */
const send = (message) => console.log(JSON.stringify({ jsonrpc: "2.0", ...message }));
const remember = () => (existsSync(MEMORY) ? JSON.parse(readFileSync(MEMORY, "utf8")) : []);

/** @param {string} sessionId @param {string} text */
function say(sessionId, text) {
  const update = { sessionUpdate: "agent_message_chunk", content: { type: "text", text } };
  send({ method: "session/update", params: { sessionId, update } });
}

/** @type {Record<string, (params: any) => object>} */
const requests = {
  initialize: () => ({
    protocolVersion: 1,
    agentInfo: { name: "mybot", version: "1.0.0" },
    agentCapabilities: { sessionCapabilities: { resume: {} } },
  }),
  "session/new": () => ({ sessionId: "mine" }),
  "session/resume": () => ({}),
  "session/prompt": async ({ sessionId, prompt }) => {
    const text = prompt.map((/** @type {any} */ block) => block.text ?? "").join("");
    const prompts = [...remember(), text];
    writeFileSync(MEMORY, JSON.stringify(prompts));
    say(sessionId, `Prompt ${prompts.length}. `);
    if (!text.startsWith("!")) return { stopReason: "end_turn" };
    const output = await new Promise((resolve) => {
      running = exec(text.slice(1), (error, stdout) => resolve(error?.killed ? undefined : stdout));
    });
    running = undefined;
    if (output === undefined) return { stopReason: "cancelled" };
    say(sessionId, output);
    return { stopReason: "end_turn" };
  },
};

createInterface({ input: process.stdin }).on("line", async (line) => {
  const { id, method, params } = JSON.parse(line);
  if (method === "session/cancel") running?.kill();
  if (id === undefined) return;
  const handle = requests[method];
  if (handle) send({ id, result: await handle(params) });
  else send({ id, error: { code: -32601, message: `${method} is not known` } });
});

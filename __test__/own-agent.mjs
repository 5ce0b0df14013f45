// An ACP agent of our own, run inside a VM: it does what no real agent does on request.
//
// A prompt is a script, one command a line; see `commands`. It changes its mode and its options without
// telling so, and after a start has the initial ones again: what else happens is agentvm's doing.

import { lookup } from "node:dns/promises";
import { appendFileSync, existsSync, readFileSync, writeSync } from "node:fs";
import { createInterface } from "node:readline";

const conversation = `${process.env["AGENTVM_STATE_DIR"]}/conversation.jsonl`;
const SESSION = "private";

/** What `session/new` and its like were asked. @type {any} */
let opened;
let isCancelled = false;
let onCancel = () => {};
let nextId = 1;
/** @type {Map<number, (answer: any) => void>} */
const asked = new Map();

const modes = {
  currentModeId: "ask",
  availableModes: ["ask", "code"].map((id) => ({ id, name: id })),
};

/** @param {string} id @param {string[]} values */
const select = (id, ...values) => ({
  id,
  name: id,
  category: id,
  type: "select",
  currentValue: values[0],
  options: values.map((value) => ({ value, name: value })),
});

/** @type {any[]} */
const configOptions = [
  select("model", "small", "large"),
  select("thought_level", "low", "high"),
  { id: "brave", name: "Brave", type: "boolean", currentValue: false },
];

/** @param {object} message */
function send(message) {
  const bytes = Buffer.from(`${JSON.stringify({ jsonrpc: "2.0", ...message })}\n`);
  for (let sent = 0; sent < bytes.length; ) sent += writeSync(1, bytes, sent);
}

/** @param {string} text */
function say(text) {
  const content = { type: "text", text };
  const update = { sessionUpdate: "agent_message_chunk", content };
  send({ method: "session/update", params: { sessionId: SESSION, update } });
}

/** A request to the client; resolves to its result. @param {string} method @param {object} params */
function ask(method, params) {
  const id = nextId++;
  send({ id, method, params: { sessionId: SESSION, ...params } });
  return new Promise((resolve) => asked.set(id, resolve));
}

const prompts = () =>
  existsSync(conversation) ? readFileSync(conversation, "utf8").trim().split("\n") : [];

/** @type {Record<string, (argument: string) => unknown>} */
const commands = {
  say,
  /** So many updates. */
  stream(count) {
    for (let i = 1; i <= Number(count); i++) say(`${i} `);
  },
  /** An update of so many JSON values, so many times. */
  values(counts) {
    const [count = 0, times = 1] = counts.split(" ").map(Number);
    const update = { sessionUpdate: "own", values: Array(count).fill(0) };
    const params = { sessionId: SESSION, update };
    for (let i = 0; i < times; i++) send({ method: "session/update", params });
  },
  /** Asks for permission, with options of these kinds, and says what came of it. */
  async permission(kinds) {
    const options = kinds.split(",").map((kind) => ({ optionId: `id-${kind}`, name: kind, kind }));
    const toolCall = { toolCallId: "t1", title: "rm -rf /", kind: "execute", rawInput: { n: 1 } };
    const { outcome } = await ask("session/request_permission", { toolCall, options });
    say(outcome.optionId ?? outcome.outcome);
  },
  /** Until it is cancelled. */
  hold() {
    // The cancel may have come before.
    if (isCancelled) return "cancelled";
    return new Promise((resolve) => (onCancel = () => resolve("cancelled")));
  },
  /** For ever. */
  deaf: () => new Promise(() => {}),
  /** What it was opened with. */
  opened: () => say(JSON.stringify(opened)),
  configuration: () => say(JSON.stringify({ mode: modes.currentModeId, ...values() })),
  /** How many prompts it knows, with this one. */
  remember: () => say(String(prompts().length)),
  env: (name) => say(process.env[name] ?? "unset"),
  pid: () => say(String(process.pid)),
  /** What an attempt to find out a name's address comes to. */
  lookup: (name) =>
    lookup(name).then(
      ({ address }) => say(address),
      ({ code }) => say(code),
    ),
  die: () => process.kill(process.pid, "SIGKILL"),
};

const values = () =>
  Object.fromEntries(configOptions.map(({ id, currentValue }) => [id, currentValue]));

/** @type {Record<string, (params: any) => unknown>} */
const methods = {
  initialize: () => ({
    protocolVersion: 1,
    agentCapabilities: { loadSession: true, mcpCapabilities: { http: true } },
    agentInfo: { name: "own", version: "1" },
  }),
  "session/new"(params) {
    opened = params;
    return { sessionId: SESSION, modes, configOptions };
  },
  "session/load"(params) {
    opened = params;
    return { modes, configOptions };
  },
  "session/set_mode"({ modeId }) {
    modes.currentModeId = modeId;
    return { _own: "obeyed" };
  },
  "session/set_config_option"({ configId, value }) {
    if (value === "large" && process.env["REFUSE"]) {
      throw Object.assign(new Error("too large"), { code: -32050, data: { limit: "small" } });
    }
    const option = configOptions.find(({ id }) => id === configId);
    option.currentValue = value;
    return { configOptions };
  },
  async "session/prompt"({ prompt }) {
    isCancelled = false;
    appendFileSync(conversation, `${JSON.stringify(prompt)}\n`);
    /** @type {unknown} */
    let stopReason;
    for (const line of prompt[0].text.split("\n")) {
      const [name, ...rest] = line.split(" ");
      stopReason = await commands[name]?.(rest.join(" "));
    }
    return { stopReason: stopReason ?? "end_turn" };
  },
  "session/cancel"() {
    isCancelled = true;
    onCancel();
  },
  "_own/echo": (params) => params,
};

createInterface({ input: process.stdin }).on("line", async (line) => {
  const { id, method, params, result } = JSON.parse(line);
  if (method === undefined) {
    asked.get(id)?.(result);
    return;
  }
  try {
    const handler = methods[method];
    if (!handler) throw Object.assign(new Error(`no method ${method}`), { code: -32601 });
    const result = await handler(params);
    if (id !== undefined) send({ id, result });
  } catch (thrown) {
    const { code = -32603, message, data } = /** @type {any} */ (thrown);
    send({ id, error: { code, message, data } });
  }
});

// An ACP agent that does exactly what it is told, good or bad.
//
// A prompt is a script, one command a line (see `commands`). `$SESSION` and `$ID` stand for the
// session's private id and the id of the request that is being handled. A script that does not answer
// its request itself gets the usual answer at its end. The environment variables ON_START,
// ON_INITIALIZE, ON_NEW, ON_LOAD and ON_RESUME hold scripts that run before the usual behaviour of these
// moments; CAPABILITIES is JSON that is added to the agent's, and CONFIGURATION JSON of what it offers
// (`modes`, `models`, `configOptions`), in the state of every start.

import { spawn } from "node:child_process";
import fs from "node:fs";
import readline from "node:readline";

const SESSION = "private-1";
const conversation = `${process.env.AGENTVM_STATE_DIR}/conversation.jsonl`;

/** Ends a script without an answer. */
const HANG = Symbol("hang");

const configuration = JSON.parse(process.env.CONFIGURATION ?? "{}");
/** Params of the request that opened the conversation, with its method. */
let opening;
let lastPrompt;
let cancelled = false;
let onCancel = () => {};
let nextId = 1;
const answers = new Map();

/** Standard output blocks here: what is written is written, in order. */
function write(bytes) {
  for (let rest = Buffer.from(bytes); rest.length > 0; ) {
    rest = rest.subarray(fs.writeSync(1, rest));
  }
}

function send(message) {
  write(`${JSON.stringify({ jsonrpc: "2.0", ...message })}\n`);
}

function update(content) {
  send({ method: "session/update", params: { sessionId: SESSION, update: content } });
}

function say(text) {
  update({ sessionUpdate: "agent_message_chunk", content: { type: "text", text } });
}

/** A request to the client; resolves to its whole answer. */
function ask(method, params) {
  const id = `agent-${nextId++}`;
  const answer = new Promise((resolve) => answers.set(id, resolve));
  send({ id, method, params });
  return answer;
}

function kept() {
  if (!fs.existsSync(conversation)) return [];
  return fs
    .readFileSync(conversation, "utf8")
    .trim()
    .split("\n")
    .map((line) => JSON.parse(line));
}

const commands = {
  say: (text) => say(text),
  /** Writes a line as it is. */
  line: (text) => write(`${text}\n`),
  /** The same, one byte a write. */
  slowly(text) {
    for (const byte of Buffer.from(`${text}\n`)) write([byte]);
  },
  /** Writes text without a newline. */
  part: (text) => write(text),
  /** So many bytes of a line, and no end of it. */
  endless: (bytes) => write("x".repeat(Number(bytes))),
  hex: (digits) => write(Buffer.from(digits, "hex")),
  stream(count) {
    for (let i = 1; i <= Number(count); i++) say(`${i} `);
  },
  /** One update with so many bytes of text. */
  long: (bytes) => say("x".repeat(Number(bytes))),
  /** So many updates, each with its number and so many bytes of text. */
  burst(argument) {
    const [count, bytes] = argument.split(" ").map(Number);
    for (let i = 1; i <= count; i++) say(`${i} ${"x".repeat(bytes)}`);
  },
  /** Streams until session/cancel, to which it listens between updates. */
  async flood() {
    for (let i = 1; !cancelled; i++) {
      say(`${i} `);
      if (i % 64 === 0) await new Promise((resolve) => setImmediate(resolve));
    }
    return { stopReason: "cancelled" };
  },
  stderr(bytes) {
    const chunk = Buffer.from(`${"e".repeat(1023)}\n`);
    for (let left = Number(bytes); left > 0; left -= chunk.length) fs.writeSync(2, chunk);
  },
  complain: (text) => void fs.writeSync(2, `${text}\n`),
  /** Asks for permission with options of these kinds and says what came of it. */
  async permission(kinds) {
    const options = kinds
      ? kinds.split(",").map((kind) => ({ optionId: `id-${kind}`, name: kind, kind }))
      : [];
    const toolCall = { toolCallId: "t1", title: "rm -rf /", kind: "execute", rawInput: { n: 1 } };
    const answer = await ask("session/request_permission", {
      sessionId: SESSION,
      toolCall,
      options,
    });
    say(JSON.stringify(answer.result.outcome));
  },
  /** Calls a method of the client and says what it answered. */
  async call(method) {
    const answer = await ask(method, { sessionId: SESSION, path: "/etc/passwd" });
    say(JSON.stringify(answer.error ?? answer.result));
  },
  /** So many requests, without waiting for any answer. */
  requests(count) {
    for (let i = 0; i < Number(count); i++)
      send({ id: `flood-${i}`, method: "fs/read_text_file", params: {} });
  },
  /** Says what it offers and is set to. */
  configuration: () => say(JSON.stringify(configuration)),
  /** Says the content blocks of this prompt. */
  blocks: () => say(JSON.stringify(lastPrompt)),
  /** Asks for permission to use a tool that was announced before, and waits for no answer. */
  announced() {
    update({ sessionUpdate: "tool_call", toolCallId: "t9", title: "Run make", kind: "execute" });
    send({
      id: "announced",
      method: "session/request_permission",
      params: {
        sessionId: SESSION,
        toolCall: { toolCallId: "t9" },
        options: [{ optionId: "yes", name: "Yes", kind: "allow_once" }],
      },
    });
  },
  /** Changes its mode: says so as ACP wants it, or, with `silently`, only in its next answers. */
  mode(argument) {
    const [mode, how] = argument.split(" ");
    configuration.modes.currentModeId = mode;
    if (how !== "silently") update({ sessionUpdate: "current_mode_update", currentModeId: mode });
  },
  /** Says how many prompts it remembers, this one included. */
  remember: () => say(String(kept().length)),
  /** Says what an environment variable holds. */
  env: (name) => say(process.env[name] ?? "unset"),
  cwd: () => say(process.cwd()),
  pid: () => say(String(process.pid)),
  sleep: (ms) => new Promise((resolve) => setTimeout(resolve, Number(ms))),
  /** Waits until so many agents are in this command, and says so. */
  async meet(count) {
    const place = "/home/user/meeting";
    fs.mkdirSync(place, { recursive: true });
    fs.writeFileSync(`${place}/${process.pid}`, "");
    while (fs.readdirSync(place).length < Number(count)) {
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    say("met ");
  },
  /** Writes a file, and says what is in one. */
  write(argument) {
    const [path, ...content] = argument.split(" ");
    fs.writeFileSync(path, content.join(" "));
  },
  read: (path) => say(fs.readFileSync(path, "utf8")),
  /** Waits for session/cancel, and obeys it. */
  async cancel() {
    if (!cancelled) await new Promise((resolve) => (onCancel = resolve));
    return { stopReason: "cancelled" };
  },
  /** Runs a command as agents do: as the leader of a session of its own, and not waited for. */
  shell: (command) => void spawn("bash", ["-c", command], { detached: true, stdio: "ignore" }),
  /** Waits until there is such a file. */
  async until(path) {
    while (!fs.existsSync(path)) await new Promise((resolve) => setTimeout(resolve, 5));
  },
  hang: () => HANG,
  /** Reads no more of its input, and lives on. */
  deaf() {
    process.stdin.pause();
    setInterval(() => {}, 1 << 30);
  },
  "close-stdout": () => fs.closeSync(1),
  exit: (code) => process.exit(Number(code)),
  kill: () => process.kill(process.pid, "SIGKILL"),
  /** Takes memory until something ends it. */
  async hog() {
    for (const taken = []; ; ) {
      taken.push(Buffer.alloc(1 << 20, 1));
      await new Promise((resolve) => setImmediate(resolve));
    }
  },
  /** Leaves a process of a session of its own that holds all of its pipes. */
  grandchild: () => void spawn("sleep", ["1000"], { detached: true, stdio: "inherit" }).unref(),
};

/** Runs a script; returns what it wants as answer, HANG, or undefined. */
async function run(script, id) {
  for (const line of script.split("\n").filter((line) => line !== "")) {
    const [name, ...rest] = line.split(" ");
    const argument = rest
      .join(" ")
      .replaceAll("$SESSION", SESSION)
      .replaceAll("$ID", JSON.stringify(id ?? null));
    const answer = await commands[name](argument);
    if (answer !== undefined) return answer;
  }
  return undefined;
}

/** The answer to a request that opens the conversation. */
async function open(id, method, params, hook, usual) {
  opening = { method, ...params };
  await handle(id, hook, async () => ({ ...(await usual()), ...configuration }));
}

function refuse(id, code, message) {
  send({ id, error: { code, message } });
}

async function handle(id, hook, usual) {
  const answer = await run(hook ?? "", id);
  if (answer === HANG) return;
  const result = answer ?? (await usual());
  if (result !== HANG) send({ id, result });
}

const methods = {
  initialize: (id) =>
    handle(id, process.env.ON_INITIALIZE, () => ({
      protocolVersion: 1,
      agentCapabilities: {
        loadSession: process.env.NO_LOAD === undefined,
        unknown: [1e30],
        ...JSON.parse(process.env.CAPABILITIES ?? "{}"),
      },
      agentInfo: { name: "test", version: "1" },
    })),
  "session/new": (id, params) =>
    open(id, "session/new", params, process.env.ON_NEW, () => ({ sessionId: SESSION })),
  "session/resume": (id, params) =>
    open(id, "session/resume", params, process.env.ON_RESUME, () => ({})),
  "session/load": (id, params) =>
    open(id, "session/load", params, process.env.ON_LOAD, () => {
      for (const prompt of kept()) {
        update({ sessionUpdate: "user_message_chunk", content: prompt[0] });
        say("this was said before");
      }
      return {};
    }),
  "session/set_mode"(id, { modeId }) {
    if (modeId === "broken") return refuse(id, -32000 - 42, "this mode is broken");
    configuration.modes.currentModeId = modeId;
    send({ id, result: {} });
    if (modeId === "loud") update({ sessionUpdate: "current_mode_update", currentModeId: modeId });
  },
  "session/set_model"(id, { modelId }) {
    configuration.models.currentModelId = modelId;
    send({ id, result: { model: modelId } });
  },
  "session/set_config_option"(id, { configId, value }) {
    const option = configuration.configOptions.find((option) => option.id === configId);
    option.currentValue = value;
    send({ id, result: { configOptions: configuration.configOptions } });
  },
  /** Of no protocol: answers what opened the conversation. */
  "test/opening": (id) => send({ id, result: opening }),
  /** Of no protocol: answers its params. */
  "test/echo": (id, params) => send({ id, result: params }),
  /** Never answers. */
  "test/hang": () => say("hanging"),
  "session/prompt": (id, { prompt }) => {
    cancelled = false;
    lastPrompt = prompt;
    fs.appendFileSync(conversation, `${JSON.stringify(prompt)}\n`);
    return handle(id, prompt.at(-1).text, () => ({ stopReason: "end_turn" }));
  },
  "session/cancel": () => {
    cancelled = true;
    onCancel();
  },
};

if ((await run(process.env.ON_START ?? "")) !== HANG) {
  readline.createInterface({ input: process.stdin, crlfDelay: Infinity }).on("line", (line) => {
    const { id, method, params, ...answer } = JSON.parse(line);
    if (method === undefined) answers.get(id)?.(answer);
    else if (methods[method] !== undefined) methods[method](id, params);
    else if (id !== undefined) refuse(id, -32601, `no such method: ${method}`);
  });
} else {
  setInterval(() => {}, 1 << 30);
}

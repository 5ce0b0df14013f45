// npm run quickstart: Pi writes a program in a VM of its own and runs it.
//
// With ANTHROPIC_API_KEY set, the model is Anthropic's. Otherwise a scripted model server on loopback
// plays its part, so that everything else can be watched for free.

import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type ClientOptions, createClient, type JsonRpcNotification } from "agentvm";
import { quickstartScript, startModelServer } from "../__test__/model-server";

const PROMPT = "Write a program that says hello to hello.js, and run it with node.";

/** A model to talk to: the environment that the agent needs for it, and how to reach it. */
async function model(): Promise<{
  env: Record<string, string>;
  options: ClientOptions;
  close(): Promise<void>;
}> {
  const { ANTHROPIC_API_KEY, ANTHROPIC_BASE_URL } = process.env;
  if (ANTHROPIC_API_KEY) {
    heading("Model: Anthropic's (ANTHROPIC_API_KEY is set)");
    const env = { ANTHROPIC_API_KEY, ...(ANTHROPIC_BASE_URL && { ANTHROPIC_BASE_URL }) };
    return { env, options: {}, close: async () => {} };
  }
  const server = await startModelServer({ script: quickstartScript() });
  heading(`Model: a script at ${server.url} (set ANTHROPIC_API_KEY to talk to a real one)`);
  return {
    env: { ANTHROPIC_API_KEY: "scripted", ANTHROPIC_BASE_URL: server.url },
    // Nothing of the host's loopback is reachable from a VM, but for this.
    options: { loopbackExemptPorts: [server.port] },
    close: () => server.close(),
  };
}

function heading(text: string): void {
  process.stdout.write(`\n\x1b[1m${text}\x1b[0m\n`);
}

/** What the stream of a turn looks like to a person. */
function show({ method, params }: JsonRpcNotification): void {
  const update = params?.update;
  if (method !== "session/update" || !update) {
    return;
  }
  switch (update.sessionUpdate) {
    case "agent_thought_chunk":
      process.stdout.write(`\x1b[2m${update.content.text ?? ""}\x1b[0m`);
      break;
    case "agent_message_chunk":
      process.stdout.write(update.content.text ?? "");
      break;
    case "tool_call":
      process.stdout.write(`\n→ ${update.title}\n`);
      break;
    case "tool_call_update":
      if (update.status === "completed" || update.status === "failed") {
        process.stdout.write(`  ${update.status}\n`);
      }
      break;
  }
}

/** One line of a transcript. */
function line({ method, params }: JsonRpcNotification): string {
  const update = params?.update;
  const what = update?.sessionUpdate ?? params?.stopReason ?? "";
  const text = update?.content?.text ?? update?.title ?? update?.status ?? "";
  return `${method} ${what} ${JSON.stringify(text)}`.slice(0, 100);
}

const dataDir = await mkdtemp(join(tmpdir(), "agentvm-quickstart-"));
const { env, options, close } = await model();
const client = createClient({ dataDir, ...options });
try {
  const agent = client.vm.getOrCreate(["quickstart"]);
  const { stderr } = process;
  agent.on("installProgress", ({ message }) => {
    stderr.write(stderr.isTTY ? `\r\x1b[K${message}` : `${message}\n`);
  });
  agent.on("sessionEvent", ({ event }) => show(event));

  const started = performance.now();
  const session = await agent.createSession("pi", { env });
  heading(`Session ${session.sessionId} after ${Math.round(performance.now() - started)} ms`);

  process.stdout.write(`\n> ${PROMPT}\n\n`);
  const { text, stopReason } = await agent.sendPrompt(session.sessionId, PROMPT);
  if (stopReason !== "end_turn" || text === "") {
    throw new Error(`the turn ended as ${stopReason}`);
  }

  heading("/home/user/hello.js, read from the VM");
  process.stdout.write(new TextDecoder().decode(await agent.readFile("hello.js")));

  heading("The transcript, from SQLite");
  await agent.closeSession(session.sessionId);
  for (const { seq, event } of await agent.getSessionEvents(session.sessionId)) {
    process.stdout.write(`${String(seq).padStart(4)}  ${line(event)}\n`);
  }

  heading(
    "It works. The VM is deleted; Pi and its Node stay in ~/.cache/agentvm for the next one.",
  );
  process.stdout.write(
    "Next: `node dist/cli.js doctor` says what this host lacks; README.md goes on.\n",
  );
} finally {
  await client.close();
  await close();
  await rm(dataDir, { recursive: true, force: true });
}

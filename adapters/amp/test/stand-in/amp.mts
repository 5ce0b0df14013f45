#!/usr/bin/env node
/** Amp's command line in execute mode, as far as the adapter uses it. See README.md. */

import { randomUUID } from "node:crypto";
import { existsSync, readFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { stdin, stdout } from "node:process";
import { text } from "node:stream/consumers";
import { parseArgs } from "node:util";
import { McpServers } from "./mcp.mts";
import { type Block, ModelError, requestModel } from "./model.mts";
import { decide, type Rule } from "./permissions.mts";
import { loadThread, saveThread, type Thread } from "./threads.mts";
import { BUILT_IN, type Context, type Tool } from "./tools.mts";

/** More turns of the model than this end a run with `error_max_turns`. */
const MAX_TURNS = 50;

const OPTIONS = {
  execute: { type: "boolean" },
  "stream-json": { type: "boolean" },
  "stream-json-thinking": { type: "boolean" },
  "stream-json-input": { type: "boolean" },
  "dangerously-allow-all": { type: "boolean" },
  "no-ide": { type: "boolean" },
  "no-notifications": { type: "boolean" },
  "no-color": { type: "boolean" },
  "no-archive-after-execute": { type: "boolean" },
  mode: { type: "string" },
  "settings-file": { type: "string" },
  "plugin-ready-timeout": { type: "string" },
  "mcp-config": { type: "string" },
  version: { type: "boolean" },
} as const;

/** Amp's own words on standard error, and its exit code. */
function fail(message: string): never {
  process.stderr.write(`Error: ${message}\n`);
  process.exit(1);
}

function write(message: object): void {
  stdout.write(`${JSON.stringify(message)}\n`);
}

class Run {
  readonly #thread: Thread;
  readonly #options: ReturnType<typeof commandLine>["values"];
  readonly #rules: Rule[];
  readonly #allowsAll: boolean;
  readonly #mcp: McpServers;
  readonly #start = Date.now();
  #turns = 0;
  #begun = false;
  #result = "";

  constructor(
    thread: Thread,
    options: ReturnType<typeof commandLine>["values"],
    settings: Record<string, unknown>,
    mcp: McpServers,
  ) {
    this.#thread = thread;
    this.#options = options;
    this.#rules = (settings["amp.permissions"] ?? []) as Rule[];
    this.#allowsAll =
      options["dangerously-allow-all"] === true || settings["amp.dangerouslyAllowAll"] === true;
    this.#mcp = mcp;
  }

  async prompt(content: Block[]): Promise<void> {
    this.#thread.messages.push({ role: "user", content });
    this.#save();
    this.#result = await this.#loop(this.#thread.messages, this.#tools(), null);
    this.#save();
  }

  end(error?: string): void {
    const subtype =
      this.#turns > MAX_TURNS
        ? "error_max_turns"
        : error === undefined
          ? "success"
          : "error_during_execution";
    write({
      type: "result",
      subtype,
      duration_ms: Date.now() - this.#start,
      is_error: subtype !== "success",
      num_turns: this.#turns,
      ...(subtype === "success" ? { result: this.#result } : { error: error ?? "too many turns" }),
      session_id: this.#thread.id,
    });
  }

  #tools(): Tool[] {
    return [...BUILT_IN, ...this.#mcp.tools];
  }

  #save(): void {
    saveThread(this.#thread);
  }

  /** Nothing is streamed before the service has let the user in. */
  #begin(): void {
    if (this.#begun) return;
    this.#begun = true;
    write({
      type: "system",
      subtype: "init",
      cwd: process.cwd(),
      session_id: this.#thread.id,
      tools: this.#tools().map(({ name }) => name),
      mcp_servers: this.#mcp.states,
    });
    const last = this.#thread.messages.at(-1);
    if (last) this.#tell("user", { role: "user", content: last.content }, null);
  }

  #tell(type: "user" | "assistant", message: object, parent: string | null): void {
    write({ type, message, parent_tool_use_id: parent, session_id: this.#thread.id });
  }

  async #loop(messages: Thread["messages"], tools: Tool[], parent: string | null): Promise<string> {
    for (;;) {
      this.#turns += 1;
      if (this.#turns > MAX_TURNS) throw new Error("too many turns");
      const model = `amp-${this.#options.mode ?? "medium"}`;
      const answer = await requestModel({ model, messages, tools }, () => this.#begin());
      messages.push({ role: "assistant", content: answer.content });
      this.#save();
      const shown = this.#options["stream-json-thinking"]
        ? answer.content
        : answer.content.filter(({ type }) => type !== "thinking");
      const { id, stopReason: stop_reason, usage } = answer;
      const message = { id, type: "message", role: "assistant", model, content: shown };
      this.#tell("assistant", { ...message, stop_reason, stop_sequence: null, usage }, parent);

      const calls = answer.content.filter((block) => block.type === "tool_use");
      if (calls.length === 0) {
        return answer.content.map((block) => (block.type === "text" ? block.text : "")).join("");
      }
      // Calls of one message run at the same time.
      const content = await Promise.all(calls.map((call) => this.#call(call, tools, parent)));
      messages.push({ role: "user", content });
      this.#save();
      this.#tell("user", { role: "user", content }, parent);
    }
  }

  async #call(
    call: Extract<Block, { type: "tool_use" }>,
    tools: Tool[],
    parent: string | null,
  ): Promise<Block> {
    const { id, name, input } = call;
    const result = (content: string | Block[], is_error: boolean): Block => ({
      type: "tool_result",
      tool_use_id: id,
      content,
      is_error,
    });
    const tool = tools.find((candidate) => candidate.name === name);
    if (!tool) return result(`Tool ${name} not found`, true);
    if (!this.#allowsAll) {
      const about = { toolUseId: id, threadId: this.#thread.id };
      const refusal = await decide(this.#rules, name, input, about);
      if (refusal !== undefined) {
        return result(`Tool execution rejected by user: ${refusal}`, true);
      }
    }
    const context: Context = {
      // A subagent is a conversation of its own, with the same tools.
      subagent: async (prompt) => {
        const content: Block[] = [{ type: "text", text: prompt }];
        return await this.#loop([{ role: "user", content }], tools, parent ?? id);
      },
    };
    try {
      const output = await tool.execute(input, context);
      return result(output, false);
    } catch (error) {
      return result(error instanceof Error ? error.message : String(error), true);
    }
  }
}

function commandLine() {
  try {
    return parseArgs({ options: OPTIONS, allowPositionals: true, strict: true });
  } catch (error) {
    const option = /'(--?[\w-]+)/.exec(String(error))?.[1];
    return fail(`error: unknown option '${option}'`);
  }
}

/** `threads continue <id>`, or nothing: a new thread. */
function threadOf(positionals: string[]): Thread {
  if (positionals.length === 0) return { id: `T-${randomUUID()}`, messages: [] };
  const [command, subcommand, id] = positionals;
  const known = command === "threads" && (subcommand === "continue" || subcommand === "export");
  if (!known || id === undefined) return fail(`error: unknown command '${positionals.join(" ")}'`);
  return loadThread(id) ?? fail(`Thread not found: ${id}`);
}

function hasKey(): boolean {
  if (process.env.AMP_API_KEY) return true;
  const secrets = join(homedir(), ".local/share/amp/secrets.json");
  return existsSync(secrets) && `apiKey@${process.env.AMP_URL}` in readJson(secrets);
}

function readJson(path: string): Record<string, unknown> {
  return JSON.parse(readFileSync(path, "utf8")) as Record<string, unknown>;
}

const { values: options, positionals } = commandLine();
if (options.version) {
  stdout.write("0.0.0-stand-in\n");
  process.exit();
}
if (!hasKey()) {
  process.stderr.write("No API key found. Starting login flow...\n");
  setInterval(() => {}, 1 << 30); // it waits for a person
  await new Promise(() => {});
}
const thread = threadOf(positionals);
if (positionals[1] === "export") {
  stdout.write(`${JSON.stringify({ v: 1, id: thread.id, messages: thread.messages })}\n`);
  process.exit();
}
if (!options.execute || !options["stream-json-input"]) fail("the stand-in has no other mode");
const settings = options["settings-file"] ? readJson(options["settings-file"]) : {};
const mcp = await McpServers.connect(options["mcp-config"] ? readJson(options["mcp-config"]) : {});
const run = new Run(thread, options, settings, mcp);
let error: string | undefined;
try {
  for (const line of (await text(stdin)).split("\n")) {
    if (line.trim() === "") continue;
    await run.prompt((JSON.parse(line) as { message: { content: Block[] } }).message.content);
  }
} catch (thrown) {
  if (thrown instanceof ModelError && thrown.status === 401) {
    fail("Invalid or missing API key. Run 'amp login' to authenticate.");
  }
  if (thrown instanceof ModelError && thrown.status === undefined && !thrown.answered) {
    fail(`Couldn't connect to the Amp server at ${process.env.AMP_URL}.`);
  }
  error = thrown instanceof Error ? thrown.message : String(thrown);
}
run.end(error);
mcp.close();
stdout.write("", () => process.exit()); // a stream of an MCP server may still be open

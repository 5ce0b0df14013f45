// From createSession to the first words of an answer, for every agent with a model service of one's own,
// against the same adapter as a plain child process of this machine, without a VM and without a log.

import { spawn } from "node:child_process";
import { mkdtempSync, readdirSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { type ModelServer, startModelServer } from "../__test__/model-server";
import { type Comparison, type Competitor, compare } from "./measure";
import { agentStore, withClient } from "./setting";

const AGENTS = ["pi", "claude", "codex", "opencode"];
const PROMPT = "Say hello.";

export async function agents(turns: number): Promise<Comparison[]> {
  const model = await startModelServer({ script: () => ({ text: "Hello." }) });
  try {
    return await withClient({ loopbackExemptPorts: [model.port] }, async (client) => {
      const comparisons: Comparison[] = [];
      for (const name of AGENTS) {
        const agent = client.vm.getOrCreate(name);
        const { sessionId } = await agent.createSession(name, { env: envOf(model) }); // installs it
        await agent.closeSession(sessionId);
        const title = `"${name}": createSession to the first words`;
        const inVm: Competitor = {
          name: "running VM",
          async run() {
            const start = performance.now();
            const session = await agent.createSession(name, { env: envOf(model) });
            const words = new Promise<number>((resolve) => {
              agent.once("sessionEvent", function look({ sessionId, event }) {
                const isWords = event.params.update?.sessionUpdate === "agent_message_chunk";
                if (sessionId === session.sessionId && isWords) resolve(performance.now() - start);
                else agent.once("sessionEvent", look);
              });
            });
            await agent.sendPrompt(session.sessionId, PROMPT);
            const time = await words;
            await agent.destroySession(session.sessionId);
            return time;
          },
        };
        const goal = "at most 1.2 × the bare adapter";
        const baseline = "bare adapter";
        const competitors = [inVm, bare(name, model)];
        comparisons.push(await compare({ title, goal, baseline }, competitors, turns));
        await agent.destroy();
      }
      return comparisons;
    });
  } finally {
    await model.close();
  }
}

function envOf(model: ModelServer): Record<string, string> {
  return {
    ANTHROPIC_API_KEY: "unused",
    ANTHROPIC_BASE_URL: model.url,
    OPENAI_API_KEY: "unused",
    OPENAI_BASE_URL: model.openaiUrl,
  };
}

function bare(name: string, model: ModelServer): Competitor {
  const { node, main, compiled } = installed(name);
  const home = mkdtempSync(join(tmpdir(), "agentvm-bench-home-"));
  process.once("exit", () => rmSync(home, { recursive: true, force: true }));
  return {
    name: "bare adapter",
    async run(turn) {
      const state = join(home, String(turn));
      const start = performance.now();
      const child = spawn(node, [main], {
        cwd: home,
        env: {
          ...envOf(model),
          HOME: home,
          PATH: "/usr/bin:/bin",
          AGENTVM_STATE_DIR: state,
          NODE_COMPILE_CACHE: compiled,
          // As agentvm sets them.
          CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: "1",
          IS_SANDBOX: "1",
          PI_OFFLINE: "1",
        },
        stdio: ["pipe", "pipe", "ignore"],
      });
      const ask = (id: number, method: string, params: object) =>
        child.stdin.write(`${JSON.stringify({ jsonrpc: "2.0", id, method, params })}\n`);
      const _meta = { agentvm: { permissionPolicy: "allow" } };
      ask(1, "initialize", { protocolVersion: 1, clientCapabilities: {} });
      let time: number | undefined;
      for await (const line of createInterface({ input: child.stdout })) {
        const { id, result, error, params } = JSON.parse(line);
        if (error) throw new Error(`the bare adapter of ${name}: ${error.message}`);
        if (id === 1) ask(2, "session/new", { cwd: home, mcpServers: [], _meta });
        if (id === 2) {
          const prompt = [{ type: "text", text: PROMPT }];
          ask(3, "session/prompt", { sessionId: result.sessionId, prompt });
        }
        const kind = params?.update?.sessionUpdate;
        if (kind === "agent_message_chunk") time ??= performance.now() - start;
        if (id === 3) child.stdin.end();
      }
      if (time === undefined) throw new Error(`the bare adapter of ${name} said nothing`);
      return time;
    },
  };
}

/** The newest of each that the store has: what this version uses, if nothing else has been installed. */
function installed(name: string): { node: string; main: string; compiled: string } {
  const root = agentStore();
  const newest = (directory: string, prefix: string): string => {
    const found = readdirSync(directory)
      .filter((entry) => entry.startsWith(prefix))
      .map((entry) => join(directory, entry))
      .sort((one, other) => statSync(other).ctimeMs - statSync(one).ctimeMs)[0];
    if (found === undefined) throw new Error(`no ${prefix}* in ${directory}`);
    return found;
  };
  const entry = newest(root, `${name}-`);
  return {
    node: join(newest(root, "node-"), "bin/node"),
    main: join(newest(entry, "adapter-"), "main.js"),
    compiled: join(tmpdir(), "agentvm-bench-compiled"),
  };
}

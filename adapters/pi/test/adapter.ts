/** The compiled adapter as a client sees it. */

import { mkdir, mkdtemp, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type AdapterOptions, AdapterProcess } from "../../testing/adapter-process.js";

export { gate, isAlive, NODE, type RpcMessage } from "../../testing/adapter-process.js";

export class Adapter extends AdapterProcess {
  static async start(options: Omit<AdapterOptions, "adapter"> = {}): Promise<Adapter> {
    const home = options.home ?? (await mkdtemp(join(tmpdir(), "pi-adapter-")));
    const env = { ANTHROPIC_API_KEY: "test-key", AGENTVM_MAX_RETRIES: "0", ...options.env };
    return new Adapter(home, { ...options, env, adapter: "pi" });
  }
}

/** Environment that leads Pi's Anthropic provider to a model server. */
export function anthropic(server: { url: string }): Record<string, string> {
  return { ANTHROPIC_BASE_URL: server.url };
}

/** An adapter whose Pi knows two models of a service of its own, one of which thinks. */
export async function startLocal(url: string): Promise<Adapter> {
  const pi = await Adapter.start({ env: { ANTHROPIC_API_KEY: undefined } });
  const dir = join(pi.home, ".pi/agent");
  await mkdir(dir, { recursive: true });
  const models = [
    { id: "thinker", name: "The Thinker", reasoning: true },
    { id: "plain", name: "The Plain" },
  ];
  const local = { baseUrl: url, apiKey: "key", api: "openai-completions", models };
  await writeFile(join(dir, "models.json"), JSON.stringify({ providers: { local } }));
  const settings = {
    defaultProvider: "local",
    defaultModel: "thinker",
    defaultThinkingLevel: "high",
  };
  await writeFile(join(dir, "settings.json"), JSON.stringify(settings));
  return pi;
}

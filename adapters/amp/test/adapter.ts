/** The compiled adapter as a client sees it, with a stand-in for Amp's program. */

import { mkdtemp, readdir, readFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import {
  type AdapterOptions,
  AdapterProcess,
  NODE,
  type RpcMessage,
} from "../../testing/adapter-process.js";

export { gate, isAlive, NODE, type RpcMessage } from "../../testing/adapter-process.js";

export const STAND_IN = fileURLToPath(new URL("./stand-in/amp.mts", import.meta.url));

/** Under the policy `ask`. */
export const ASK = { _meta: { agentvm: { permissionPolicy: "ask" } } };

export class Adapter extends AdapterProcess {
  static async start(options: Omit<AdapterOptions, "adapter"> = {}): Promise<Adapter> {
    const home = options.home ?? (await mkdtemp(join(tmpdir(), "amp-adapter-")));
    const env = {
      PATH: `${dirname(NODE)}:${process.env.PATH}`,
      AMP_CLI_PATH: STAND_IN,
      AMP_API_KEY: "sgamp_test",
      AGENTVM_STATE_DIR: join(home, "state"),
      ...options.env,
    };
    return new Adapter(home, { ...options, env, adapter: "amp" });
  }

  /** Files that the adapter keeps of a session. */
  async kept(sessionId: string): Promise<Record<string, string>> {
    const directory = join(this.home, "state/amp", sessionId);
    const names = await readdir(directory);
    const files = names.map(async (name) => [name, await readFile(join(directory, name), "utf8")]);
    return Object.fromEntries(await Promise.all(files));
  }

  /** The permission request of that index. */
  async asked(index = 0): Promise<RpcMessage> {
    await this.message(() => this.requests.length > index);
    return this.requests[index] as RpcMessage;
  }

  get requests(): RpcMessage[] {
    return this.messages.filter(({ method }) => method === "session/request_permission");
  }

  select(request: RpcMessage, optionId: string): void {
    const { id = null } = request;
    this.send({ id, result: { outcome: { outcome: "selected", optionId } } });
  }
}

/** Environment that has the stand-in ask this model in place of Amp's service. */
export function service(server: { url: string }): Record<string, string> {
  return { AMP_URL: server.url };
}

/** A call of Amp's shell. */
export function run(command: string, id = "run") {
  return { id, name: "shell_command", input: { command } };
}

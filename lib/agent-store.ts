import type * as Api from "../index";
import { abortable } from "./abort";
import { requireOptions, requireString } from "./arguments";
import { call, invalidArgument } from "./errors";
import type { native } from "./native";
import { OPTIONS } from "./options";

type NativeClient = InstanceType<typeof native.NativeClient>;

/** `client.agents`. */
export class AgentStore implements Api.AgentStore {
  readonly #native: NativeClient;

  constructor(client: NativeClient) {
    this.#native = client;
  }

  async list(): Promise<Api.AgentListing> {
    return JSON.parse(await call(this.#native.listAgents()));
  }

  async install(agent: string, options: Api.InstallOptions = {}): Promise<void> {
    requireString("agent", agent);
    const { signal, onProgress } = requireOptions(options, OPTIONS.install, "onProgress");
    if (onProgress !== undefined && typeof onProgress !== "function") {
      throw invalidArgument("onProgress", "must be a function");
    }
    await abortable(signal, (abort) =>
      this.#native.installAgent(agent, (json: string) => onProgress?.(JSON.parse(json)), abort),
    );
  }

  async remove(agent: string): Promise<Api.AgentStoreEntry[]> {
    requireString("agent", agent);
    return JSON.parse(await call(this.#native.removeAgent(agent))).removed;
  }

  async prune(options: Api.PruneOptions = {}): Promise<Api.PruneResult> {
    const { dryRun = false } = requireOptions(options, OPTIONS.prune);
    if (typeof dryRun !== "boolean") {
      throw invalidArgument("dryRun", "must be a boolean");
    }
    return JSON.parse(await call(this.#native.pruneAgents(dryRun)));
  }
}

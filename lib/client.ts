import { homedir } from "node:os";
import { join } from "node:path";
import type * as Api from "../index";
import { Agent } from "./agent";
import { AgentStore } from "./agent-store";
import { json, requireOptions, requireWellFormed } from "./arguments";
import { doctor } from "./doctor";
import { call, callSync, invalidArgument } from "./errors";
import { ImageStore } from "./image-store";
import { native, packageDir } from "./native";
import { OPTIONS } from "./options";

export function createClient(options: Api.ClientOptions = {}): Api.Client {
  return new Client(options);
}

type NativeClient = InstanceType<typeof native.NativeClient>;

/** The addon's client, with the defaults that only this side knows. */
function openNative(options: Api.ClientOptions): NativeClient {
  const {
    dataDir = defaultDataDir(),
    agentStoreDir = defaultAgentStoreDir(),
    ...rest
  } = requireOptions(options, OPTIONS.createClient);
  const all = json("options", { ...rest, dataDir, agentStoreDir });
  return callSync(() => new native.NativeClient(all, packageDir, process.execPath));
}

class Client implements Api.Client {
  readonly vm: Api.Client["vm"];
  readonly agents: AgentStore;
  readonly images: ImageStore;
  readonly #native: NativeClient;
  /** One object for each key, so that every caller's listeners share one cursor. */
  readonly #agents = new Map<string, Agent>();

  constructor(options: Api.ClientOptions) {
    this.#native = openNative(options);
    this.agents = new AgentStore(this.#native);
    this.images = new ImageStore(this.#native);
    this.vm = {
      getOrCreate: (key, options) => this.#getOrCreate(key, options),
      list: async () => JSON.parse(await call(this.#native.listVms())),
    };
  }

  #getOrCreate(key: string | readonly string[], options?: Api.VmOptions): Agent {
    const parts = typeof key === "string" ? [key] : key;
    if (!Array.isArray(parts) || !parts.every((part) => typeof part === "string")) {
      throw invalidArgument("key", "a VM key is a string or an array of strings");
    }
    // Keys that differ must not share a VM.
    for (const part of parts) requireWellFormed("key", part);
    // Asked each time: a closed client, or an empty key, is refused.
    const own =
      options === undefined
        ? undefined
        : json("options", requireOptions(options, OPTIONS.getOrCreate));
    const name = JSON.stringify(parts);
    const known = this.#agents.get(name);
    const vm = callSync(() => this.#native.vm([...parts], own, known?.native));
    if (known) {
      if (own !== undefined) known.use(vm);
      return known;
    }
    const agent = new Agent(vm, [...parts]);
    this.#agents.set(name, agent);
    return agent;
  }

  async doctor(): Promise<Api.DoctorResult> {
    return await doctor(this.#native);
  }

  async close(): Promise<void> {
    await call(this.#native.close());
    for (const agent of this.#agents.values()) {
      agent.stopListening();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

/** Where VMs live unless told otherwise: the XDG base directories. */
export function defaultDataDir(): string {
  const { AGENTVM_DATA_DIR, XDG_DATA_HOME } = process.env;
  return AGENTVM_DATA_DIR || join(XDG_DATA_HOME || join(homedir(), ".local", "share"), "agentvm");
}

/** Root of the agent store, which all data directories share. */
export function defaultAgentStoreDir(): string {
  const { AGENTVM_CACHE_DIR, XDG_CACHE_HOME } = process.env;
  const cache = AGENTVM_CACHE_DIR || join(XDG_CACHE_HOME || join(homedir(), ".cache"), "agentvm");
  return join(cache, "agents");
}

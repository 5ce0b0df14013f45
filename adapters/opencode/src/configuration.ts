/**
 * How OpenCode is set up for a session, on top of what its user keeps in `~/.config/opencode` and in
 * the project. Everything goes through variables of OpenCode's own, which the programs that it runs
 * do not look at.
 */

import { asObject, type Json, parseJsonc } from "./jsonc.js";
import { ASKING, ASKING_AGENTS, ASKING_ALL } from "./permissions.js";

type Env = Record<string, string | undefined>;

/** What the configuration depends on. */
export interface Circumstances {
  /** The session's environment. */
  env: Env;
  /** Where the session keeps its state. */
  stateDir: string;
  /** What of the user's configuration files OpenCode reads before ours, the later the stronger. */
  userConfigs: Json[];
  /** Instructions of a project whose other configuration is not to be used. */
  projectInstructions?: string[] | undefined;
  /** Whether the user has logged in to OpenCode's own model service. */
  hasOpenCodeLogin: boolean;
}

export interface Configured {
  /** Variables that are to be set. */
  env: Record<string, string>;
  /** What is to be in the file that `OPENCODE_CONFIG` names: weaker than the project's own. */
  defaults: Json;
}

/** No download and no request that nobody asked for. The session's own variables win. */
const SWITCHES: Record<string, string> = {
  OPENCODE_DISABLE_AUTOUPDATE: "1",
  OPENCODE_DISABLE_LSP_DOWNLOAD: "1",
  // It has a list of models built in.
  OPENCODE_DISABLE_MODELS_FETCH: "1",
  OPENCODE_DISABLE_SHARE: "1",
  OPENCODE_DISABLE_EMBEDDED_WEB_UI: "1",
  OPENCODE_EXPERIMENTAL_DISABLE_FILEWATCHER: "1",
};

/** Set by agentvm when the agent has to ask before it changes anything. */
export const ASKS = "AGENTVM_ASKS";

/** Whether it is for us to decide what the agent asks for. */
export function asks(env: Env): boolean {
  return env[ASKS] === "1" && env.OPENCODE_PERMISSION === undefined;
}

export function configure({ env, stateDir, userConfigs, ...at }: Circumstances): Configured {
  const own = userContent(env);
  const defaults = without(defaultsFor(env, userConfigs, at.hasOpenCodeLogin), userConfigs);
  const named = env.OPENCODE_CONFIG !== undefined;
  const project = at.projectInstructions;
  const demanded = demands(env, [...(project ?? []), `${stateDir}/instructions.md`]);
  const content = [named ? defaults : {}, demanded, own].reduce(merge, {});
  return {
    env: {
      ...Object.fromEntries(Object.entries(SWITCHES).filter(([name]) => env[name] === undefined)),
      OPENCODE_CONFIG_CONTENT: JSON.stringify(content),
      ...(named ? {} : { OPENCODE_CONFIG: `${stateDir}/defaults.json` }),
      // One that all sessions of a VM share would make them wait for each other.
      ...(env.OPENCODE_DB === undefined ? { OPENCODE_DB: `${stateDir}/opencode.db` } : {}),
      ...(project ? { OPENCODE_DISABLE_PROJECT_CONFIG: "1" } : {}),
      ...(asks(env) ? { OPENCODE_PERMISSION: JSON.stringify(ASKING_ALL) } : {}),
    },
    defaults: named ? {} : defaults,
  };
}

function userContent(env: Env): Json {
  const text = env.OPENCODE_CONFIG_CONTENT;
  if (!text) return {};
  try {
    return parseJsonc(text);
  } catch (error) {
    throw new Error(`OPENCODE_CONFIG_CONTENT: ${String(error)}`);
  }
}

/** What the session's environment and options say: it counts whatever files say. */
function demands(env: Env, instructions: string[]): Json {
  const anthropic = address(env.ANTHROPIC_BASE_URL);
  const openai = address(env.OPENAI_BASE_URL);
  const at = (baseURL: string) => ({ options: { baseURL } });
  return {
    instructions,
    provider: {
      // OpenCode's address includes the version, the variable that all other programs read does not.
      ...(anthropic ? { anthropic: at(anthropic.replace(/(\/v1)?$/, "/v1")) } : {}),
      ...(openai ? { openai: at(openai) } : {}),
    },
    ...(asks(env) ? { agent: ASKING_AGENTS } : {}),
  };
}

function address(variable: string | undefined): string | undefined {
  return variable?.trim().replace(/\/+$/, "") || undefined;
}

/** What holds unless the user's own configuration says otherwise. */
function defaultsFor(env: Env, userConfigs: Json[], hasOpenCodeLogin: boolean): Json {
  const disabled = userConfigs.map((config) => config.disabled_providers).findLast(Array.isArray);
  const usesOpenCode = env.OPENCODE_API_KEY || hasOpenCodeLogin;
  return {
    // OpenCode would write it there.
    $schema: "https://opencode.ai/config.json",
    // Without a key it would take a free model of OpenCode's own service.
    ...(usesOpenCode ? {} : { disabled_providers: [...(disabled ?? []), "opencode"] }),
    // Its own choice is the dearest. Of Anthropic's models it takes a Sonnet.
    ...(env.OPENAI_API_KEY && !env.ANTHROPIC_API_KEY ? { model: "openai/gpt-5.5" } : {}),
    // Titles are for lists of sessions that nobody sees here: one model request less.
    agent: { title: { disable: true } },
    // A copy of the project after every step, for an undo that ACP does not have.
    snapshot: false,
    // The model hears of a rejection, and can do something else.
    experimental: { continue_loop_on_deny: true },
    ...(env.OPENCODE_PERMISSION === undefined ? { permission: asks(env) ? ASKING : UNASKED } : {}),
  };
}

/** What OpenCode asks for though nothing says so. */
const UNASKED: Json = {
  doom_loop: "allow",
  external_directory: "allow",
  read: { "*.env": "allow", "*.env.*": "allow" },
};

/** Without what one of the configurations has, but for lists, which are complete. */
function without(defaults: Json, configs: Json[], isDeep = true): Json {
  return Object.fromEntries(
    Object.entries(defaults).flatMap(([name, value]): [string, unknown][] => {
      const others = configs.map((config) => config[name]).filter((other) => other !== undefined);
      if (Array.isArray(value) || others.length === 0) return [[name, value]];
      const inner = asObject(value);
      const objects = others.map(asObject);
      // A word in place of an object speaks about everything in it.
      if (!isDeep || inner === undefined || objects.includes(undefined)) return [];
      // Of a permission's patterns the last that matches counts: none may follow the user's.
      return [[name, without(inner, objects as Json[], name !== "permission")]];
    }),
  );
}

/** As OpenCode merges its configurations: objects by their keys, instructions one after the other. */
function merge(below: Json, above: Json): Json {
  const merged = { ...below };
  for (const [name, value] of Object.entries(above)) {
    const [under, over] = [asObject(merged[name]), asObject(value)];
    if (under && over) {
      merged[name] = merge(under, over);
    } else if (name === "instructions" && Array.isArray(merged[name]) && Array.isArray(value)) {
      merged[name] = [...merged[name], ...value];
    } else {
      merged[name] = value;
    }
  }
  return merged;
}

/** What Codex is told on its command line: TOML, over every configuration file. */

import type { Json } from "./codex.js";
import { invalidParams } from "./shared/errors.js";

export type Overrides = Record<string, Json>;

/**
 * It contacts the model's service and the session's MCP servers, and nothing unasked: no plugin
 * catalogues, no update check, no measurements. It gives up on a service that can't be reached. It
 * works when it is prompted, and not towards goals in between.
 */
export const QUIET: Overrides = {
  // Its commands have the PATH of the session, not that of /etc/profile.
  allow_login_shell: false,
  "analytics.enabled": false,
  check_for_update_on_startup: false,
  "features.apps": false,
  "features.goals": false,
  "features.plugins": false,
  "features.remote_plugin": false,
  "features.skill_mcp_dependency_install": false,
  "features.unbounded_connection_retries": false,
};

/** Anything else of its configuration, as a JSON object in the environment. Keys may be dotted paths. */
export function overridesOf(env: NodeJS.ProcessEnv): Overrides {
  if (!env.CODEX_CONFIG) return {};
  let config: unknown;
  try {
    config = JSON.parse(env.CODEX_CONFIG);
  } catch {
    config = undefined;
  }
  if (typeof config === "object" && config !== null && !Array.isArray(config)) {
    return config as Overrides;
  }
  throw invalidParams("CODEX_CONFIG in the environment must be a JSON object");
}

export function toArguments(overrides: Overrides): string[] {
  return Object.entries(overrides)
    .filter(([, value]) => value !== null)
    .flatMap(([path, value]) => ["--config", `${path}=${toToml(value)}`]);
}

/** TOML has no null: what is null is left out. */
function toToml(value: Json): string {
  // Strings, numbers and booleans are written alike.
  if (typeof value !== "object" || value === null) return JSON.stringify(value);
  if (Array.isArray(value))
    return `[${value
      .filter((item) => item !== null)
      .map(toToml)
      .join(", ")}]`;
  const pairs = Object.entries(value).filter(([, item]) => item !== null);
  return `{ ${pairs.map(([key, item]) => `${JSON.stringify(key)} = ${toToml(item)}`).join(", ")} }`;
}

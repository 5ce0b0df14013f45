/** The session's configuration files for Amp, over those of its user. */

import { readFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { parseJsonc } from "./jsonc.js";
import { describe, ErrorCode, RpcError } from "./shared/errors.js";
import type { McpServer } from "./shared/settings.js";
import { READING_TOOLS } from "./tools.js";

type Settings = Record<string, unknown>;

interface Rule {
  tool: string;
  action: "allow" | "reject" | "delegate";
  /** The program that decides. */
  to?: string;
}

/**
 * For `--settings-file`, which Amp reads in place of the user's own.
 *
 * `asker`: the program that is asked about every call but those that only look; without one nothing is
 * asked.
 */
export function settingsFile(env: NodeJS.ProcessEnv, asker: string | undefined): string {
  const settings: Settings = {
    ...userSettings(env),
    "amp.updates.mode": "disabled",
    "amp.dangerouslyAllowAll": asker === undefined,
  };
  if (asker !== undefined) {
    settings["amp.permissions"] = rules(settings["amp.permissions"], asker);
    // Amp's own guard of some files asks a terminal, and there is none: it would refuse them.
    settings["amp.guardedFiles.allowlist"] = ["**"];
  }
  return JSON.stringify(settings);
}

/** The first one that matches decides. What the user has forbidden stays forbidden. */
function rules(ofUser: unknown, asker: string): Rule[] {
  const forbidden = (Array.isArray(ofUser) ? (ofUser as Rule[]) : []).filter(
    (rule) => rule?.action === "reject",
  );
  const reading = [...READING_TOOLS].map((tool): Rule => ({ tool, action: "allow" }));
  return [...forbidden, ...reading, { tool: "*", action: "delegate", to: asker }];
}

function userSettings(env: NodeJS.ProcessEnv): Settings {
  const directory = join(homedir(), ".config/amp");
  const places = env.AMP_SETTINGS_FILE
    ? [env.AMP_SETTINGS_FILE]
    : [join(directory, "settings.json"), join(directory, "settings.jsonc")];
  for (const path of places) {
    let text: string;
    try {
      text = readFileSync(path, "utf8");
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "ENOENT") continue;
      throw unreadable(path, error);
    }
    try {
      const settings = parseJsonc(text);
      if (typeof settings === "object" && settings !== null) return settings as Settings;
      throw new Error("not an object");
    } catch (error) {
      throw unreadable(path, error);
    }
  }
  return {};
}

function unreadable(path: string, error: unknown): RpcError {
  return new RpcError(
    ErrorCode.internalError,
    `Amp's settings can't be read: ${path}: ${describe(error)}`,
    { type: "amp_settings", path },
  );
}

/** For `--mcp-config`. In a file, because arguments can be read by every process. */
export function mcpConfig(servers: McpServer[]): string {
  const entries = servers.map((server) => {
    if (server.type === "stdio") {
      const { command, args, env } = server;
      return [server.name, { command, args, env }];
    }
    const { url, headers } = server;
    // Without a transport Amp tries streamable HTTP, then SSE.
    const transport = server.type === "sse" ? { transport: "sse" } : {};
    return [server.name, { url, headers, ...transport }];
  });
  return JSON.stringify(Object.fromEntries(entries));
}

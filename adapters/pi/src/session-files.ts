/** Pi's session files: JSON lines, one file per session, kept where Pi keeps them. */

import { readdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { SessionManager } from "@earendil-works/pi-coding-agent";
import type { Sdk } from "./sdk.js";
import { notFound } from "./shared/errors.js";

export class SessionFiles {
  readonly #sdk: Sdk;
  readonly #dir: string | undefined;

  /**
   * `stateDir`: a durable directory for these sessions alone. Without one they go to Pi's own
   * place, a folder per working directory under `~/.pi/agent/sessions` (`PI_CODING_AGENT_DIR`).
   */
  constructor(sdk: Sdk, stateDir: string | undefined) {
    this.#sdk = sdk;
    this.#dir = stateDir ? join(stateDir, "sessions") : undefined;
  }

  create(cwd: string): SessionManager {
    const manager = this.#sdk.SessionManager.create(cwd, this.#dir);
    const file = manager.getSessionFile();
    if (file === undefined) throw new Error("Pi did not name a file for the session");
    // Pi creates the file with the first complete answer. Until then a session could not be
    // loaded, and a crash would lose the first prompt. A file that exists is appended to at once.
    writeFileSync(file, `${JSON.stringify(manager.getHeader())}\n`, { flag: "wx", mode: 0o600 });
    manager.setSessionFile(file);
    return manager;
  }

  /** Takes back a session that could not be opened. */
  remove(manager: SessionManager): void {
    rmSync(manager.getSessionFile() ?? "", { force: true });
  }

  open(sessionId: string, cwd: string): SessionManager {
    const file = this.#find(sessionId);
    if (file === undefined) {
      throw notFound(sessionId);
    }
    return this.#sdk.SessionManager.open(file, this.#dir, cwd);
  }

  #find(sessionId: string): string | undefined {
    const suffix = `_${sessionId}.jsonl`;
    for (const dir of this.#dir === undefined ? this.#piFolders() : [this.#dir]) {
      const name = list(dir).find((candidate) => candidate.endsWith(suffix));
      if (name !== undefined) return join(dir, name);
    }
    return undefined;
  }

  #piFolders(): string[] {
    const sessions = join(this.#sdk.getAgentDir(), "sessions");
    return list(sessions).map((folder) => join(sessions, folder));
  }
}

function list(dir: string): string[] {
  try {
    return readdirSync(dir);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === "ENOENT" || code === "ENOTDIR") return [];
    throw error;
  }
}

/** What is kept of a session: a directory of its own, readable to its user alone. */

import { randomUUID } from "node:crypto";
import { mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { notFound } from "./shared/errors.js";

/** The conversation itself is with Amp's service: this is how to find it. */
export interface SessionRecord {
  /** `T-…`; none before the first turn has begun. */
  threadId?: string;
  mode: string;
  /** The instructions that the thread has been given. */
  instructions?: string;
}

const RECORD = "session.json";
const SESSION_ID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

export class SessionDirectory {
  readonly sessionId: string;
  readonly path: string;
  #record: SessionRecord;

  private constructor(sessionId: string, path: string, record: SessionRecord) {
    this.sessionId = sessionId;
    this.path = path;
    this.#record = record;
  }

  static create(env: NodeJS.ProcessEnv, record: SessionRecord): SessionDirectory {
    const sessionId = randomUUID();
    const path = join(root(env), sessionId);
    mkdirSync(path, { recursive: true, mode: 0o700 });
    const directory = new SessionDirectory(sessionId, path, record);
    directory.update({});
    return directory;
  }

  static open(env: NodeJS.ProcessEnv, sessionId: string): SessionDirectory {
    if (!SESSION_ID.test(sessionId)) throw notFound(sessionId);
    const path = join(root(env), sessionId);
    let text: string;
    try {
      text = readFileSync(join(path, RECORD), "utf8");
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "ENOENT") throw notFound(sessionId);
      throw error;
    }
    return new SessionDirectory(sessionId, path, JSON.parse(text) as SessionRecord);
  }

  get record(): Readonly<SessionRecord> {
    return this.#record;
  }

  /** Is durable when it returns. */
  update(change: Partial<SessionRecord>): void {
    this.#record = { ...this.#record, ...change };
    this.write(RECORD, JSON.stringify(this.#record));
  }

  /** Replaces a file as a whole. Returns its path. */
  write(name: string, text: string, mode = 0o600): string {
    const path = join(this.path, name);
    writeFileSync(`${path}.new`, text, { mode, flush: true });
    renameSync(`${path}.new`, path);
    return path;
  }

  removeFile(name: string): void {
    rmSync(join(this.path, name), { force: true });
  }

  /** Takes back a session that could not be opened. */
  remove(): void {
    rmSync(this.path, { recursive: true, force: true });
  }
}

/** `AGENTVM_STATE_DIR`: a durable directory for these sessions alone. */
function root(env: NodeJS.ProcessEnv): string {
  return join(env.AGENTVM_STATE_DIR || join(homedir(), ".local/state/agentvm"), "amp");
}

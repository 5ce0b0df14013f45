/** Where Amp's questions about tool calls arrive: a socket, and the program that Amp runs to ask. */

import { mkdtempSync, rmSync } from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { SessionDirectory } from "./session-directory.js";
import { describe } from "./shared/errors.js";

/** What ask-permission.ts sends. */
export interface Question {
  name: string;
  toolCallId?: string;
  input: unknown;
}

/** Why the call must not run; undefined if it may. The signal: nobody waits any more. */
export type Decide = (question: Question, signal: AbortSignal) => Promise<string | undefined>;

const ASK = fileURLToPath(new URL("./ask-permission.js", import.meta.url));

export class PermissionSocket {
  /** The program for Amp's `delegate`. */
  readonly asker: string;
  readonly #server: Server;
  /** Short: the path of a socket may have 107 bytes. */
  readonly #directory: string;

  private constructor(asker: string, server: Server, directory: string) {
    this.asker = asker;
    this.#server = server;
    this.#directory = directory;
  }

  static async listen(session: SessionDirectory, decide: Decide): Promise<PermissionSocket> {
    const directory = mkdtempSync(join(tmpdir(), "amp-permissions-"));
    const path = join(directory, "socket");
    const server = createServer((socket) => void answer(socket, decide));
    await new Promise<void>((resolve, reject) => {
      server.once("error", reject).listen(path, resolve);
    });
    // Amp takes the path of a program, without arguments.
    const command = [process.execPath, ASK, path].map(quoted).join(" ");
    const asker = session.write("ask-permission", `#!/bin/sh\nexec ${command}\n`, 0o700);
    return new PermissionSocket(asker, server, directory);
  }

  close(): void {
    this.#server.close();
    rmSync(this.#directory, { recursive: true, force: true });
  }
}

async function answer(socket: Socket, decide: Decide): Promise<void> {
  const gone = new AbortController();
  socket.on("error", () => {}); // `close` follows
  socket.on("close", () => gone.abort(new Error("Amp no longer waits for the answer")));
  const reply = (answer: object) => socket.end(JSON.stringify(answer));
  try {
    const refusal = await decide(JSON.parse(await firstLine(socket)) as Question, gone.signal);
    reply(refusal === undefined ? {} : { refusal });
  } catch (error) {
    reply({ refusal: `Not executed: ${describe(error)}` });
  }
}

/** Goes on reading, and so sees when the other side is gone. */
function firstLine(socket: Socket): Promise<string> {
  return new Promise((resolve, reject) => {
    let text = "";
    socket.setEncoding("utf8").on("data", (more: string) => {
      text += more;
      if (more.includes("\n")) resolve(text);
    });
    socket.on("close", () => reject(new Error("the question is incomplete")));
  });
}

/** For a shell. */
function quoted(word: string): string {
  return `'${word.replaceAll("'", "'\\''")}'`;
}

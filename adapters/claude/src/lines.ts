/** JSON-RPC on pipes: one message per line. */

import { createInterface } from "node:readline";
import type { Readable, Writable } from "node:stream";
import type { Message } from "./message.js";

export async function* readMessages(input: Readable): AsyncGenerator<Message> {
  for await (const line of createInterface({ input, crlfDelay: Number.POSITIVE_INFINITY })) {
    if (line.trim() === "") continue;
    let message: unknown;
    try {
      message = JSON.parse(line);
    } catch {
      console.error("a line on standard input is no JSON");
      continue;
    }
    if (typeof message === "object" && message !== null) yield message as Message;
  }
}

/** Resolves when the pipe has taken the message. */
export function writeMessage(output: Writable, message: Message): Promise<void> {
  return new Promise((resolve, reject) => {
    output.write(`${JSON.stringify(message)}\n`, (error) => (error ? reject(error) : resolve()));
  });
}

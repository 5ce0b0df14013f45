/** JSON-RPC on pipes: one message per line. */

import type { Readable, Writable } from "node:stream";
import type { Message } from "./message.js";
import { lines } from "./shared/protocol.js";

export async function* readMessages(input: Readable): AsyncGenerator<Message> {
  for await (const line of lines(input)) {
    const message = line === "too long" ? undefined : parse(line);
    if (message) yield message;
    else console.error("standard input: a line is no message, or too long");
  }
}

function parse(line: Buffer): Message | undefined {
  try {
    const message: unknown = JSON.parse(line.toString("utf8"));
    return typeof message === "object" && message !== null ? (message as Message) : undefined;
  } catch {
    return undefined;
  }
}

/** Resolves when the pipe has taken the message. */
export function writeMessage(output: Writable, message: Message): Promise<void> {
  return new Promise((resolve, reject) => {
    output.write(`${JSON.stringify(message)}\n`, (error) => (error ? reject(error) : resolve()));
  });
}

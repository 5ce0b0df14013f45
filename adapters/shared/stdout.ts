/**
 * Keeps standard output for the protocol. One stray `console.log` of an extension would otherwise
 * break the client's framing, so everything else that writes there is sent to standard error.
 */

import { createWriteStream, fstatSync } from "node:fs";
import { Socket } from "node:net";
import type { Writable } from "node:stream";

const STDOUT = 1;

/** Takes the real standard output; from now on `process.stdout` and `console` mean standard error. */
export function takeStdout(): Writable {
  // `process.stdout` writes to pipes synchronously on Linux: a client that stops reading would
  // block the event loop, and with it the cancel that could end the turn. These streams wait.
  const output = isFile(STDOUT)
    ? createWriteStream("", { fd: STDOUT })
    : new Socket({ fd: STDOUT, readable: false });
  Object.defineProperty(process, "stdout", { configurable: true, get: () => process.stderr });
  return output;
}

function isFile(fd: number): boolean {
  const stat = fstatSync(fd);
  return stat.isFile() || stat.isCharacterDevice();
}

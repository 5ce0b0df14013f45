/**
 * The real standard output. `process.stdout` writes to pipes synchronously on Linux: a client that
 * stops reading would block the event loop, and with it the cancel that could end the turn.
 */

import { createWriteStream, fstatSync } from "node:fs";
import { Socket } from "node:net";
import type { Writable } from "node:stream";

const STDOUT = 1;

export function openStdout(): Writable {
  const stat = fstatSync(STDOUT);
  const output =
    stat.isFile() || stat.isCharacterDevice()
      ? createWriteStream("", { fd: STDOUT })
      : new Socket({ fd: STDOUT, readable: false });
  // The client is gone when it closes either end; its other end says so.
  output.on("error", () => {});
  return output;
}

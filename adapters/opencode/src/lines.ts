/** JSON-RPC framing: one message per line, and writers that wait for their reader. */

import { once } from "node:events";
import type { Readable, Writable } from "node:stream";

const NEWLINE = 0x0a;

/** Splits bytes into lines, without their ends. How long one may be is for the reader of ours to say. */
export async function* lines(input: Readable): AsyncGenerator<Buffer> {
  let pending: Buffer[] = [];
  for await (const read of input) {
    let rest = read as Buffer;
    for (let end = rest.indexOf(NEWLINE); end >= 0; end = rest.indexOf(NEWLINE)) {
      yield Buffer.concat([...pending, rest.subarray(0, end)]);
      pending = [];
      rest = rest.subarray(end + 1);
    }
    if (rest.length > 0) pending.push(rest);
  }
  if (pending.length > 0) yield Buffer.concat(pending);
}

/** Resolves when the reader at the other end has caught up, or is gone. */
export async function writeLine(output: Writable, line: Buffer | string): Promise<void> {
  if (output.destroyed || output.writableEnded) return;
  const bytes = typeof line === "string" ? Buffer.from(line) : line;
  if (output.write(Buffer.concat([bytes, Buffer.of(NEWLINE)]))) return;
  const settled = new AbortController();
  const { signal } = settled;
  await Promise.race([once(output, "drain", { signal }), once(output, "close", { signal })]).catch(
    () => {},
  );
  settled.abort();
}

/** What a file holds before a tool overwrites it, for the diff. */

import { readFile, stat } from "node:fs/promises";

/** Larger files are shown without what they were before. */
const MAX_BYTES = 1024 * 1024;

/** Null if the file does not exist, undefined if it can't be shown. */
export async function readOldText(path: string): Promise<string | null | undefined> {
  try {
    const { size } = await stat(path);
    if (size > MAX_BYTES) return undefined;
    return new TextDecoder("utf-8", { fatal: true }).decode(await readFile(path));
  } catch (error) {
    // Not there yet; anything else (no permission, not text) the tool itself will report.
    return (error as NodeJS.ErrnoException).code === "ENOENT" ? null : undefined;
  }
}

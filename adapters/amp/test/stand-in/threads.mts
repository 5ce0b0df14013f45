/** What Amp's service keeps: threads, here as files. */

import { mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import type { Message } from "./model.mts";

export interface Thread {
  id: string;
  messages: Message[];
}

const DIRECTORY = join(homedir(), ".local/share/amp-stand-in");

export function saveThread(thread: Thread): void {
  mkdirSync(DIRECTORY, { recursive: true });
  const file = fileOf(thread.id);
  writeFileSync(`${file}.new`, JSON.stringify(thread));
  renameSync(`${file}.new`, file);
}

/** A turn that was broken off is ended first: a model takes no call without a result. */
export function loadThread(id: string): Thread | undefined {
  let thread: Thread;
  try {
    thread = JSON.parse(readFileSync(fileOf(id), "utf8")) as Thread;
  } catch {
    return undefined;
  }
  const last = thread.messages.at(-1);
  if (last?.role === "assistant") {
    const content = last.content.flatMap((block) =>
      block.type === "tool_use"
        ? [
            {
              type: "tool_result" as const,
              tool_use_id: block.id,
              content: "Tool execution cancelled",
              is_error: true,
            },
          ]
        : [],
    );
    if (content.length > 0) thread.messages.push({ role: "user", content });
  }
  return thread;
}

function fileOf(id: string): string {
  return join(DIRECTORY, `${id}.json`);
}

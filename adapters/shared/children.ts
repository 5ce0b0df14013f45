/** The last resort against processes that would outlive this one. */

import { readdirSync, readFileSync } from "node:fs";

/**
 * Kills the direct children of this process, each with its process group. Aborting a turn has
 * already ended its commands; this is for what extensions started.
 */
export function killChildren(): void {
  for (const pid of children()) {
    for (const target of [-pid, pid]) {
      try {
        process.kill(target, "SIGKILL");
      } catch {
        // -pid: not a group leader; pid: gone by itself
      }
    }
  }
}

function children(): number[] {
  try {
    return readdirSync("/proc/self/task").flatMap((thread) =>
      readFileSync(`/proc/self/task/${thread}/children`, "utf8")
        .split(" ")
        .filter((pid) => pid !== "")
        .map(Number),
    );
  } catch {
    return []; // no /proc, or a kernel without CONFIG_PROC_CHILDREN
  }
}

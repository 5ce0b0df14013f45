/** The processes below one, and their end. */

import { readdirSync, readFileSync } from "node:fs";

interface Process {
  pid: number;
  parent: number;
  group: number;
}

/**
 * Process groups of everything that runs below `pid`: Amp gives its commands groups of their own, which
 * a signal to Amp's does not reach. What a command has left in the background on purpose is no longer
 * below it.
 */
export function groupsBelow(pid: number): Set<number> {
  const children = Map.groupBy(processes(), ({ parent }) => parent);
  const groups = new Set<number>();
  const waiting = [pid];
  for (let next = waiting.pop(); next !== undefined; next = waiting.pop()) {
    for (const child of children.get(next) ?? []) {
      groups.add(child.group);
      waiting.push(child.pid);
    }
  }
  return groups;
}

export function killGroup(group: number, signal: NodeJS.Signals): void {
  try {
    process.kill(-group, signal);
  } catch {
    // nothing of it is left
  }
}

function processes(): Process[] {
  return readdirSync("/proc").flatMap((name) => {
    if (!/^\d+$/.test(name)) return [];
    try {
      // proc_pid_stat(5): the name, in parentheses, may hold anything.
      const stat = readFileSync(`/proc/${name}/stat`, "utf8");
      const [, parent, group] = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
      return [{ pid: Number(name), parent: Number(parent), group: Number(group) }];
    } catch {
      return []; // it has just ended
    }
  });
}

import { setImmediate } from "node:timers/promises";

/** Milliseconds that reading may take before everything else of the process has its turn. */
const TURN_MS = 20;

/** The elements of an array whose JSON comes in parts, which are arrays. */
export async function elements<T>(parts: string[], turnMs = TURN_MS): Promise<T[]> {
  const all: T[] = [];
  let began = performance.now();
  for (const part of parts) {
    for (const element of JSON.parse(part) as T[]) {
      all.push(element);
    }
    if (performance.now() - began > turnMs) {
      await setImmediate();
      began = performance.now();
    }
  }
  return all;
}

/** Checks of arguments that JSON would not carry to the addon as they are. */

import { types } from "node:util";
import { invalidArgument } from "./errors";

export function requireString(field: string, value: unknown): void {
  if (typeof value !== "string") {
    throw invalidArgument(field, `must be a string, not ${value === null ? "null" : typeof value}`);
  }
}

/**
 * Options as the addon reads them, from JSON: what JSON drops, or turns into the null that would mean
 * "not given", is refused here. `signal` stays on this side.
 */
export function requireOptions<T extends object>(options: T): T {
  if (typeof options !== "object" || options === null || Array.isArray(options)) {
    throw invalidArgument("options", "must be an object");
  }
  for (const [name, value] of Object.entries(options)) {
    if (name === "signal") {
      if (value !== undefined && !(value instanceof AbortSignal)) {
        throw invalidArgument(name, "must be an AbortSignal");
      }
    } else if (value === null || UNWRITABLE.includes(typeof value)) {
      throw invalidArgument(name, `must not be ${value === null ? "null" : `a ${typeof value}`}`);
    } else if (typeof value === "number" && !Number.isFinite(value)) {
      throw invalidArgument(name, `must be a finite number, not ${value}`);
    }
  }
  return options;
}

const UNWRITABLE: readonly string[] = ["function", "symbol", "bigint"];

/** As the addon reads it; what can't be written as JSON (a cycle, a bigint) is the caller's mistake. */
export function json(field: string, value: unknown): string {
  try {
    return JSON.stringify(value);
  } catch (error) {
    throw invalidArgument(field, error instanceof Error ? error.message : "is no JSON value");
  }
}

/** For a call whose options are all known by now. */
export function refuseMore(options: object): void {
  for (const [name, value] of Object.entries(options)) {
    if (value !== undefined) {
      throw invalidArgument(name, "unknown option");
    }
  }
}

export function bytes(field: string, content: unknown): Uint8Array {
  if (typeof content === "string") {
    return Buffer.from(content, "utf8");
  }
  if (types.isUint8Array(content)) {
    return content;
  }
  throw invalidArgument(field, "must be a string or a Uint8Array");
}

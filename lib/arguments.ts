/** Checks of arguments that JSON would not carry to the addon as they are. */

import { types } from "node:util";
import { invalidArgument } from "./errors";

export function requireString(field: string, value: unknown): void {
  if (typeof value !== "string") {
    throw invalidArgument(field, `must be a string, not ${value === null ? "null" : typeof value}`);
  }
}

/**
 * Options as the addon reads them, from JSON: what JSON would drop, or turn into the null that would
 * mean "not given", is refused here by name, however deep it is. `signal` stays on this side, and so
 * does what is named in `kept`.
 */
export function requireOptions<T extends object>(options: T, ...kept: string[]): T {
  if (!isPlainObject(options)) {
    throw invalidArgument("options", "must be an object");
  }
  for (const [name, value] of Object.entries(options)) {
    if (name === "signal") {
      if (value !== undefined && !(value instanceof AbortSignal)) {
        throw invalidArgument(name, "must be an AbortSignal");
      }
    } else if (value !== undefined && !kept.includes(name)) {
      requireWritable(name, value, REFUSE_NULL);
    }
  }
  return options;
}

/** A value that is not the addon's to understand: any that JSON can hold. */
export function requireJson(field: string, value: unknown): string {
  requireWritable(field, value, ALLOW_NULL);
  return json(field, value);
}

const REFUSE_NULL = false;
const ALLOW_NULL = true;

/** Objects whose names are the caller's: in others, an undefined value is one that is not given. */
const CALLERS_NAMES = /(^|\.)(agents|env|headers)$/;

/** Deeper than any option, and an end for a value that contains itself. */
const MAX_DEPTH = 64;

function requireWritable(path: string, value: unknown, allowNull: boolean, depth = 0): void {
  const refuse = (problem: string) => invalidArgument(path, problem);
  switch (typeof value) {
    case "string":
    case "boolean":
      return;
    case "number":
      if (!Number.isFinite(value)) {
        throw refuse(`must be a finite number, not ${value}`);
      }
      return;
    case "object":
      break;
    case "undefined":
      throw refuse("must not be undefined");
    default:
      throw refuse(`must not be a ${typeof value}`);
  }
  if (value === null) {
    if (allowNull) {
      return;
    }
    throw refuse("must not be null");
  }
  if (depth === MAX_DEPTH) {
    throw refuse("is nested too deeply, or contains itself");
  }
  if (Array.isArray(value)) {
    // By number: a hole would be null.
    for (let index = 0; index < value.length; index++) {
      requireWritable(`${path}[${index}]`, value[index], allowNull, depth + 1);
    }
    return;
  }
  if (!isPlainObject(value)) {
    throw refuse(`must be a plain object, not a ${(value as object).constructor?.name}`);
  }
  for (const [name, inner] of Object.entries(value)) {
    if (inner !== undefined || CALLERS_NAMES.test(path)) {
      requireWritable(`${path}.${name}`, inner, allowNull, depth + 1);
    }
  }
}

/** Not a Map or Headers, whose JSON is empty. By tag: under Jest, objects are of another realm. */
function isPlainObject(value: unknown): value is object {
  return (
    Object.prototype.toString.call(value) === "[object Object]" &&
    typeof (value as { toJSON?: unknown }).toJSON !== "function"
  );
}

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

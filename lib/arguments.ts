/** Checks of arguments that JSON would not carry to the addon as they are. */

import { types } from "node:util";
import { invalidArgument } from "./errors";

export function requireString(field: string, value: unknown): void {
  if (typeof value !== "string") {
    throw invalidArgument(field, `must be a string, not ${told(value)}`);
  }
}

/** A value that is wrong, for a message: a text in quotes, of an object what it is. */
export function told(value: unknown): string {
  switch (typeof value) {
    case "string":
      return JSON.stringify(value);
    case "bigint":
      return `${value}n`;
    case "function":
    case "symbol":
      return `a ${typeof value}`;
    case "object": {
      if (value === null) return "null";
      const kind = tagOf(value).replace(/^Object$/, "object");
      return `${/^[aeio]/i.test(kind) ? "an" : "a"} ${kind}`;
    }
    default:
      return String(value);
  }
}

const LONE_SURROGATE = /\p{Surrogate}/u;

/** UTF-8 has none: every text with one would become the same as others. */
export function requireWellFormed(field: string, text: string, remedy = ""): void {
  if (LONE_SURROGATE.test(text)) {
    throw invalidArgument(field, `must be well-formed Unicode (a surrogate is alone)${remedy}`);
  }
}

/**
 * Options as the addon reads them, from JSON: a name that is not among those `known` is refused, and so is
 * what JSON would drop, or turn into the null that would mean "not given", however deep it is. `signal`
 * stays on this side, and so does what is named in `kept`.
 */
export function requireOptions<T extends object>(
  options: T,
  known: readonly string[],
  ...kept: string[]
): T {
  return requireFields("options", options, known, ...kept);
}

/** The same of another argument. */
export function requireFields<T extends object>(
  field: string,
  options: T,
  known: readonly string[],
  ...kept: string[]
): T {
  if (!isPlainObject(options)) {
    throw invalidArgument(field, `must be a plain object, not ${told(options)}`);
  }
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined) continue;
    if (!known.includes(name)) {
      const names = known.map((name) => JSON.stringify(name)).join(", ");
      throw invalidArgument(name, `there is no ${JSON.stringify(name)}: there is ${names}`);
    }
    if (name === "signal") {
      requireSignal(value);
    } else if (!kept.includes(name)) {
      requireWritable(name, value, REFUSE_NULL);
    }
  }
  return options;
}

export function requireSignal(signal: unknown): void {
  if (signal !== undefined && !(signal instanceof AbortSignal)) {
    throw invalidArgument("signal", `must be an AbortSignal, not ${told(signal)}`);
  }
}

/** The same of one value, and as the addon reads it. */
export function requireValue(field: string, value: unknown): string {
  requireWritable(field, value, REFUSE_NULL);
  return json(field, value);
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
    throw refuse(`must be of what JSON has, not ${told(value)}`);
  }
  for (const [name, inner] of Object.entries(value)) {
    if (inner !== undefined || CALLERS_NAMES.test(path)) {
      requireWritable(`${path}.${name}`, inner, allowNull, depth + 1);
    }
  }
}

/** Not a Map or Headers, whose JSON is empty. By tag: under Jest, objects are of another realm. */
export function isPlainObject(value: unknown): value is object {
  return tagOf(value) === "Object" && typeof (value as { toJSON?: unknown }).toJSON !== "function";
}

/** `Date` of `[object Date]`. */
function tagOf(value: unknown): string {
  return Object.prototype.toString.call(value).slice("[object ".length, -1);
}

/** As the addon reads it; what can't be written as JSON (a cycle, a bigint) is the caller's mistake. */
export function json(field: string, value: unknown): string {
  try {
    return JSON.stringify(value);
  } catch (error) {
    throw invalidArgument(field, error instanceof Error ? error.message : "is no JSON value");
  }
}

export function bytes(field: string, content: unknown): Uint8Array {
  if (typeof content === "string") {
    return Buffer.from(content, "utf8");
  }
  if (types.isUint8Array(content)) {
    return content;
  }
  throw invalidArgument(field, `must be a string or a Uint8Array, not ${told(content)}`);
}

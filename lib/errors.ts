import { types } from "node:util";
import type * as Api from "../index";

/** Every failure of this package: see `index.d.ts`. */
export class AgentVmError extends Error implements Api.AgentVmError {
  readonly code: Api.ErrorCode;
  readonly data?: unknown;

  constructor(
    code: Api.ErrorCode,
    message: string,
    details: { data?: unknown; cause?: unknown } = {},
  ) {
    super(message, "cause" in details ? { cause: details.cause } : undefined);
    this.name = code === "ABORTED" ? "AbortError" : "AgentVmError";
    this.code = code;
    if (details.data !== undefined) {
      this.data = details.data;
    }
  }
}

/**
 * Turns a rejection of the addon, whose message is JSON, into an `AgentVmError`. The stack is that of
 * the call, if it is made before anything is awaited.
 */
export function translate(error: unknown, calledFrom?: { stack?: string }): unknown {
  // Not instanceof: under Jest the addon's errors are of another realm than this module.
  if (!types.isNativeError(error)) {
    return error;
  }
  let rejection: { code: Api.ErrorCode; message: string; data?: unknown };
  try {
    rejection = JSON.parse(error.message);
  } catch {
    return error; // not from our side of the boundary: a wrong type of an argument, for example
  }
  const translated = new AgentVmError(rejection.code, rejection.message, { data: rejection.data });
  const frames = calledFrom?.stack?.split("\n").slice(1).join("\n");
  if (frames) {
    translated.stack = `${translated.name}: ${translated.message}\n${frames}`;
  }
  return translated;
}

/** Awaits a call of the addon; its failure has the stack of the caller. */
export function call<T>(promise: Promise<T>): Promise<T> {
  const calledFrom: { stack?: string } = {};
  Error.captureStackTrace(calledFrom, call);
  return promise.catch((error: unknown) => {
    throw translate(error, calledFrom);
  });
}

/** The same for a call that returns at once. */
export function callSync<T>(run: () => T): T {
  try {
    return run();
  } catch (error) {
    throw translate(error);
  }
}

export function aborted(signal: AbortSignal): AgentVmError {
  return new AgentVmError("ABORTED", "the call was aborted", { cause: signal.reason });
}

export function invalidArgument(field: string, problem: string): AgentVmError {
  return new AgentVmError("INVALID_ARGUMENT", readable(`${field}: ${problem}`));
}

/** Characters of a name or path that a message has. */
const LONGEST = 200;

/** Without the middle of what is in quotes, or is one word, and too long to be read: as in `src/error.rs`. */
export function readable(message: string): string {
  return message.replace(/"(?:[^"\\\n]|\\.)*"|[^\s"]+/g, (part) =>
    part.length <= LONGEST ? part : `${part.slice(0, LONGEST / 2)}…${part.slice(-LONGEST / 2)}`,
  );
}

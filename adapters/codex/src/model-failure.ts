/** How a turn that Codex could not finish becomes a JSON-RPC error. */

import type { TurnError } from "./codex.js";
import { ErrorCode, RpcError } from "./shared/errors.js";

/** What is known of a failed model request. */
export interface ModelFailure {
  model: string;
  /** HTTP status, as far as Codex tells it. */
  status?: number;
  /** The service's own type, if its answer is all that Codex tells, else Codex's. */
  type?: string;
  message: string;
}

export function readTurnError(error: TurnError, model: string): ModelFailure {
  const { codexErrorInfo: info } = error;
  const [type, detail] =
    typeof info === "string" ? [info, null] : (Object.entries(info ?? {})[0] ?? []);
  const status = detail?.httpStatusCode;
  // Of some failures the message is the body of the service's answer.
  const body = parseBody(error.message);
  const ofService = body?.type ?? type;
  return {
    model,
    ...(typeof status === "number" ? { status } : {}),
    ...(ofService === undefined ? {} : { type: ofService }),
    message: body?.message ?? error.additionalDetails ?? error.message,
  };
}

function parseBody(text: string): { type?: string; message: string } | undefined {
  let body: unknown;
  try {
    body = JSON.parse(text);
  } catch {
    return undefined; // prose
  }
  const error = (body as { error?: unknown } | null)?.error;
  const { type, message } = (error ?? {}) as { type?: unknown; message?: unknown };
  if (typeof message !== "string") return undefined;
  return { ...(typeof type === "string" ? { type } : {}), message };
}

/** A key that is refused is refused again: no use in repeating the request. */
export function isRefusal({ status, type }: ModelFailure): boolean {
  return status === 401 || status === 403 || type === "unauthorized";
}

/** Not so a quota that is used up: then Codex tells no status. */
export function isRateLimit({ status }: ModelFailure): boolean {
  return status === 429;
}

/** A refused key is `auth_required`, so that a client can tell it from a service that is down. */
export function modelError(failure: ModelFailure): RpcError {
  const status = failure.status === undefined ? "" : ` (HTTP ${failure.status})`;
  return new RpcError(
    isRefusal(failure) ? ErrorCode.authRequired : ErrorCode.internalError,
    `${failure.model} failed${status}: ${failure.message}`,
    { ...failure },
  );
}

/** How the failures of a model become JSON-RPC errors. */

import { ErrorCode, RpcError } from "./shared/errors.js";

/** What is known of a failed model request. */
export interface ModelFailure {
  provider: string;
  model: string;
  /** HTTP status. Absent when the request failed without one, or in the middle of the stream. */
  status?: number;
  /** The provider's own error type, such as `authentication_error` or `rate_limit_error`. */
  type?: string;
  message: string;
}

/**
 * Takes apart the one string in which Pi keeps a failed request. Its provider clients write
 * `401 {json}` (Anthropic), `OpenAI API error (401): 401 text` (Responses), `401: {json}`
 * (Chat Completions), and the bare JSON of an error event in the middle of a stream.
 */
export function readModelFailure(failed: {
  provider: string;
  model: string;
  errorMessage?: string | undefined;
}): ModelFailure {
  const text = failed.errorMessage ?? "The model request failed without a message";
  const prefix = /^(?:[^{}\n]{0,80} \(([45]\d\d)\): )?(?:([45]\d\d)(?::? |$))?/.exec(text);
  const status = prefix?.[1] ?? prefix?.[2];
  const body = parseObject(text.slice(prefix?.[0].length ?? 0));
  const error = asObject(body?.error) ?? body;
  const type = error?.type ?? error?.code;
  const message = error?.message;
  return {
    provider: failed.provider,
    model: failed.model,
    ...(status === undefined ? {} : { status: Number(status) }),
    ...(typeof type === "string" ? { type } : {}),
    message: typeof message === "string" && message !== "" ? message : text,
  };
}

function parseObject(text: string): Record<string, unknown> | undefined {
  const start = text.indexOf("{");
  if (start < 0) return undefined;
  try {
    return asObject(JSON.parse(text.slice(start)));
  } catch {
    return undefined; // prose with a brace in it: the caller keeps the whole text
  }
}

function asObject(value: unknown): Record<string, unknown> | undefined {
  return typeof value === "object" && value !== null && !Array.isArray(value)
    ? (value as Record<string, unknown>)
    : undefined;
}

/** A refused key is `auth_required`, so that a client can tell it from a service that is down. */
export function modelError(failure: ModelFailure): RpcError {
  const refused = failure.status === 401 || failure.status === 403;
  const status = failure.status === undefined ? "" : ` (HTTP ${failure.status})`;
  return new RpcError(
    refused ? ErrorCode.authRequired : ErrorCode.internalError,
    `${failure.provider}/${failure.model} failed${status}: ${failure.message}`,
    { ...failure },
  );
}

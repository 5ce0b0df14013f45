/** How failures become JSON-RPC errors. */

import type { Message, MessageError } from "./server.js";
import { ErrorCode } from "./shared/errors.js";

/** As it goes to the client. */
export interface ErrorObject {
  code: number;
  message: string;
  data?: Record<string, unknown>;
}

/** What is known of a failed model request. */
export interface ModelFailure {
  provider?: string;
  model?: string;
  /** HTTP status. Absent when the request failed without one, or in the middle of the stream. */
  status?: number;
  /** OpenCode's name of the error. */
  type?: string;
  message: string;
}

export function readModelFailure(
  { name, data }: MessageError,
  { providerID, modelID }: Message["info"],
): ModelFailure {
  return {
    ...(providerID === undefined ? {} : { provider: providerID }),
    ...(modelID === undefined ? {} : { model: modelID }),
    ...(data?.statusCode === undefined ? {} : { status: data.statusCode }),
    type: name,
    message: data?.message ?? name,
  };
}

/** A refused key is `auth_required`, so that a client can tell it from a service that is down. */
export function modelError(failure: ModelFailure): ErrorObject {
  const { status, type, provider, model } = failure;
  const refused = status === 401 || status === 403 || type === "ProviderAuthError";
  const what = [provider, model].filter((part) => part !== undefined).join("/") || "the model";
  return {
    code: refused ? ErrorCode.authRequired : ErrorCode.internalError,
    message: `${what} failed${status === undefined ? "" : ` (HTTP ${status})`}: ${failure.message}`,
    data: { ...failure },
  };
}

/** As OpenCode takes keys for the services that have a variable for their address. */
export const KEYS = ["ANTHROPIC_API_KEY", "OPENAI_API_KEY"];

export function missingKey(): ErrorObject {
  return {
    code: ErrorCode.authRequired,
    message: `No API key for any model provider: set ${KEYS.join(" or ")} in the session's env`,
    data: { type: "missing_api_key", variables: KEYS },
  };
}

export function mcpFailure(server: { name: string; type?: string }, reason: string): ErrorObject {
  return {
    code: ErrorCode.internalError,
    message: `MCP server "${server.name}" can't be used: ${reason}`,
    data: {
      type: "mcp_server_failed",
      server: server.name,
      transport: server.type ?? "stdio",
      reason,
    },
  };
}

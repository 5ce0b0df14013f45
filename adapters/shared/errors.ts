/** JSON-RPC errors. */

/** https://www.jsonrpc.org/specification#error_object, and two of ACP's own. */
export const ErrorCode = {
  parseError: -32700,
  invalidRequest: -32600,
  methodNotFound: -32601,
  invalidParams: -32602,
  internalError: -32603,
  authRequired: -32000,
  resourceNotFound: -32002,
} as const;

export class RpcError extends Error {
  constructor(
    readonly code: number,
    message: string,
    readonly data?: Record<string, unknown>,
  ) {
    super(message);
  }
}

export function invalidParams(message: string): RpcError {
  return new RpcError(ErrorCode.invalidParams, `Invalid params: ${message}`);
}

export function busy(sessionId: string): RpcError {
  const data = { type: "session_busy", sessionId };
  return new RpcError(ErrorCode.invalidRequest, `Session ${sessionId} is busy with a prompt`, data);
}

export function notOpen(sessionId: string): RpcError {
  const data = { type: "session_not_found", sessionId };
  return new RpcError(ErrorCode.resourceNotFound, `Session not open: ${sessionId}`, data);
}

/** Of a session that should be opened. */
export function notFound(sessionId: string): RpcError {
  const data = { type: "session_not_found", sessionId };
  return new RpcError(ErrorCode.resourceNotFound, `Session not found: ${sessionId}`, data);
}

export function describe(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Which model service is used, with which address and which key. */

import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Overrides } from "./overrides.js";
import { ErrorCode, RpcError } from "./shared/errors.js";

type Env = Readonly<Record<string, string | undefined>>;

/** What our provider is called in Codex's configuration. */
const ID = "agentvm";
const KEY = "OPENAI_API_KEY";
const OPENAI = "https://api.openai.com/v1";

/**
 * How often a failed request is repeated. By Codex after 0.2 seconds and then twice as long each time:
 * an outage of some 50 seconds is outlived. Its own default is 5, each of which is 5 in turn that it
 * tells nobody about.
 */
const RETRIES = 8;
/** Before a request that has met a rate limit is repeated, and then twice as long each time. */
const RATE_LIMIT_DELAY_MS = 1000;

export interface RetryLimits {
  maxRetries: number;
  delayMs: number;
}

export interface Provider {
  /** Undefined: what Codex is configured for, or logged in to. */
  id: string | undefined;
  overrides: Overrides;
  retry: RetryLimits | undefined;
}

/**
 * The service that the environment names, as OpenAI's own client libraries read it. The key stays
 * there. An address is more particular than Codex's configuration, and that is more particular than a
 * key alone.
 */
export function providerOf(env: Env, codexHome: string): Provider {
  const url = env.OPENAI_BASE_URL?.trim().replace(/\/+$/, "");
  const key = env[KEY]?.trim();
  if (!url && (!key || configuresProvider(codexHome))) {
    return { id: undefined, overrides: {}, retry: undefined };
  }
  const maxRetries = wholeNumber(env, "AGENTVM_MAX_RETRIES") ?? RETRIES;
  const provider = {
    // Codex compacts a conversation with the help of a service of this name.
    name: url ? "OpenAI-compatible" : "OpenAI",
    base_url: url || OPENAI,
    ...(key ? { env_key: KEY } : {}),
    wire_api: "responses",
    supports_websockets: false,
    request_max_retries: 0,
    stream_max_retries: maxRetries,
  };
  const overrides = { model_provider: ID, [`model_providers.${ID}`]: provider };
  const delayMs = wholeNumber(env, "AGENTVM_RETRY_DELAY_MS") ?? RATE_LIMIT_DELAY_MS;
  return { id: ID, overrides, retry: { maxRetries, delayMs } };
}

/** Codex can be asked only when it runs, and then its provider can't be changed any more. */
function configuresProvider(codexHome: string): boolean {
  let text: string;
  try {
    text = readFileSync(join(codexHome, "config.toml"), "utf8");
  } catch {
    return false; // not there, or not readable: Codex would not read it either
  }
  const [top = ""] = text.split(/^\s*\[/m, 1);
  return /^\s*"?model_provider"?\s*=/m.test(top);
}

export function noKey(): RpcError {
  return new RpcError(
    ErrorCode.authRequired,
    `Codex has no key for a model service: set ${KEY}, or log in with Codex (~/.codex/auth.json)`,
    { type: "missing_api_key" },
  );
}

export function wholeNumber(env: Env, name: string): number | undefined {
  const text = env[name];
  if (text === undefined || text === "") return undefined;
  if (!/^\d{1,9}$/.test(text)) {
    const message = `${name} must be a whole number, not ${JSON.stringify(text)}`;
    throw new RpcError(ErrorCode.internalError, message);
  }
  return Number(text);
}

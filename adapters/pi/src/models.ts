/** Which model service is used, with which address and which key. */

import type { AgentSession, ModelRuntime, SettingsManager } from "@earendil-works/pi-coding-agent";
import type { Sdk } from "./sdk.js";
import { ErrorCode, RpcError } from "./shared/errors.js";

/** The environment's names for a service, as its own client libraries read them. */
const SERVICES = [
  { provider: "anthropic", baseUrl: "ANTHROPIC_BASE_URL", apiKey: "ANTHROPIC_API_KEY" },
  { provider: "openai", baseUrl: "OPENAI_BASE_URL", apiKey: "OPENAI_API_KEY" },
] as const;

type Env = Readonly<Record<string, string | undefined>>;

/**
 * Pi's models and credentials (its own `models.json` and `auth.json` included), with the addresses
 * of the environment on top. Those stay in memory: nothing is written that another process reads.
 */
export async function createModelRuntime(sdk: Sdk, env: Env): Promise<ModelRuntime> {
  const runtime = await sdk.ModelRuntime.create({ refreshOnCreate: false });
  // Registering a provider starts a refresh that nobody can await, and of two refreshes at once the
  // later one discards what the other has found: awaiting one of our own beside it could end with no
  // model that has a key.
  const refresh = runtime.refresh.bind(runtime);
  const refreshes: ReturnType<typeof refresh>[] = [];
  runtime.refresh = (options) => {
    const refreshing = refresh(options);
    refreshes.push(refreshing);
    return refreshing;
  };
  for (const { provider, baseUrl } of SERVICES) {
    const url = env[baseUrl]?.trim().replace(/\/+$/, "");
    if (url) runtime.registerProvider(provider, { baseUrl: url });
  }
  runtime.refresh = refresh;
  if (refreshes.length === 0) refreshes.push(refresh({ allowNetwork: false }));
  await Promise.all(refreshes);
  return runtime;
}

/**
 * Applies the environment's retry limits over Pi's settings. Without them Pi retries an overloaded
 * or unreachable service 3 times, after 2, 4 and 8 seconds.
 */
export function applyRetryLimits(settings: SettingsManager, env: Env): void {
  const maxRetries = wholeNumber(env, "AGENTVM_MAX_RETRIES");
  const baseDelayMs = wholeNumber(env, "AGENTVM_RETRY_DELAY_MS");
  if (maxRetries === undefined && baseDelayMs === undefined) return;
  settings.applyOverrides({
    retry: {
      ...(maxRetries === undefined ? {} : { enabled: maxRetries > 0, maxRetries }),
      ...(baseDelayMs === undefined ? {} : { baseDelayMs }),
    },
  });
}

export function wholeNumber(env: Env, name: string): number | undefined {
  const text = env[name];
  if (text === undefined || text === "") return undefined;
  if (!/^\d{1,9}$/.test(text)) {
    throw new RpcError(ErrorCode.invalidParams, `${name} must be a whole number, not "${text}"`);
  }
  return Number(text);
}

/** Throws `auth_required`, naming the variable to set, when no request could be made. */
export async function requireKey(session: AgentSession, env: Env): Promise<void> {
  const { modelRuntime, settingsManager } = session;
  const selected = session.model?.provider;
  // Where no model has a key, Pi selects a placeholder of a provider that does not exist.
  const model = selected !== undefined && modelRuntime.getProvider(selected) ? selected : undefined;
  if (model !== undefined && (await modelRuntime.checkAuth(model)) !== undefined) return;

  const provider = model ?? settingsManager.getDefaultProvider() ?? addressed(env);
  const service = SERVICES.find((candidate) => candidate.provider === provider);
  const names = service ? [service.apiKey] : SERVICES.map(({ apiKey }) => apiKey);
  const remedy =
    provider && !service
      ? `set the API key of ${provider}`
      : `set ${names.join(" or ")} in the session's env`;
  throw new RpcError(
    ErrorCode.authRequired,
    `No API key for ${provider ?? "any model provider"}: ${remedy}`,
    { type: "missing_api_key", ...(provider ? { provider } : {}), variables: names },
  );
}

/** The provider whose address the environment gives, if it gives just one. */
function addressed(env: Env): string | undefined {
  const [service, another] = SERVICES.filter(({ baseUrl }) => env[baseUrl]);
  return another ? undefined : service?.provider;
}

/** Pi's SDK, loaded in the background while the client is still introducing itself. */

import { existsSync, readFileSync } from "node:fs";

export type Sdk = typeof import("@earendil-works/pi-coding-agent");

const ENTRY = import.meta.resolve("@earendil-works/pi-coding-agent");

/** Version of the SDK, without loading it. */
export function sdkVersion(): string {
  const manifest = readFileSync(new URL("../package.json", ENTRY), "utf8");
  return (JSON.parse(manifest) as { version: string }).version;
}

/**
 * The package carries its SDK twice: as some 900 modules (its `main`), and bundled into a few files
 * for its own command line. Importing the bundle takes a third of the time.
 */
export async function loadSdk(): Promise<Sdk> {
  const bundle = new URL("./bundle/index.js", ENTRY);
  return (await import(existsSync(bundle) ? bundle.href : ENTRY)) as Sdk;
}

/**
 * What Pi and the commands it runs read from the environment. Only the model's service is contacted:
 * no update check, no package installation, no telemetry, no remote model catalogue.
 */
export function prepareEnvironment(env: NodeJS.ProcessEnv): void {
  env.PI_OFFLINE ??= "1";
  env.PI_TELEMETRY ??= "0";
  env.PI_SKIP_VERSION_CHECK ??= "1";
  // As Pi's own entry points do: programs look here to see that an agent is calling.
  env.PI_CODING_AGENT = "true";
  env.AI_AGENT = "pi";
}

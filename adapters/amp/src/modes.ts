/** Amp's agent modes: each is a choice of model, system prompt and tools. */

import { modeIdOf } from "./shared/acp.js";
import { invalidParams } from "./shared/errors.js";

/** Amp's own default, which its service and the user's settings decide. */
export const DEFAULT_MODE = "default";

const MODES = [
  { id: DEFAULT_MODE, name: "Default", description: "The mode that Amp chooses" },
  { id: "low", name: "Low", description: "Fast and economical, for simple tasks" },
  { id: "medium", name: "Medium", description: "Balanced, for everyday tasks" },
  { id: "high", name: "High", description: "More capable, for difficult tasks" },
  { id: "ultra", name: "Ultra", description: "The most capable" },
];

/** ACP's `SessionModeState`. */
export function modeState(currentModeId: string): object {
  return { currentModeId, availableModes: MODES };
}

/** Of `session/set_mode`. */
export function modeOf(params: unknown): string {
  const mode = modeIdOf(params);
  if (MODES.some(({ id }) => id === mode)) return mode;
  const ids = MODES.map(({ id }) => id).join(", ");
  throw invalidParams(`modeId can't be "${mode}"; it can be: ${ids}`);
}

import type { CreateSessionOptions } from "agentvm";
import type { ModelRequest } from "../model-server.js";
import type { Choices, TestedAgent } from "./tested-agent.js";

/** Which values a request to the model was made with: one, if the agent tells them apart. */
export function inForce(choices: Choices, request: ModelRequest | undefined): string[] {
  return Object.entries(choices).flatMap(([value, holds]) =>
    request !== undefined && holds(request) ? [value] : [],
  );
}

/** The last value of each kind: no agent has chosen all of them by itself. */
export function lastChoices(it: TestedAgent): CreateSessionOptions {
  return optionsOf(it, (choices) => Object.keys(choices).at(-1));
}

/** The values that a request to the model was made with. */
export function choicesIn(it: TestedAgent, request: ModelRequest | undefined) {
  return optionsOf(it, (choices) => inForce(choices, request)[0]);
}

function optionsOf(
  { models, modes, thoughtLevels }: TestedAgent,
  choose: (choices: Choices) => string | undefined,
): CreateSessionOptions {
  const [model, mode, thoughtLevel] = [models, modes, thoughtLevels].map(choose);
  return {
    ...(model !== undefined && { model }),
    ...(mode !== undefined && { mode }),
    ...(thoughtLevel !== undefined && { thoughtLevel }),
  };
}

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
export function lastChoices({ models, modes, thoughtLevels }: TestedAgent) {
  const last = (choices: Choices) => Object.keys(choices).at(-1);
  const [model, mode, thoughtLevel] = [models, modes, thoughtLevels].map(last);
  const options: CreateSessionOptions = {
    ...(model !== undefined && { model }),
    ...(mode !== undefined && { mode }),
    ...(thoughtLevel !== undefined && { thoughtLevel }),
  };
  return options;
}

/** What of these options a request to the model was made with. */
export function choicesIn(it: TestedAgent, request: ModelRequest | undefined) {
  const { models, modes, thoughtLevels } = it;
  const value = (choices: Choices) => inForce(choices, request)[0];
  const [model, mode, thoughtLevel] = [models, modes, thoughtLevels].map(value);
  const options: CreateSessionOptions = {
    ...(model !== undefined && { model }),
    ...(mode !== undefined && { mode }),
    ...(thoughtLevel !== undefined && { thoughtLevel }),
  };
  return options;
}

/**
 * The session's instructions. Amp lets nobody append to the system prompt of one session (its AGENTS.md
 * files are the project's and the user's, and hold for every session), so they are the first block of a
 * message of the user, told once.
 */

import type { PromptPart } from "./shared/prompt.js";

const TAG = "session-instructions";

/** How the block begins. */
export const INSTRUCTIONS_TAG = `<${TAG}>`;

export function instructionsPart(instructions: string): PromptPart {
  return {
    type: "text",
    text: `${INSTRUCTIONS_TAG}
These instructions hold for the whole conversation, like those of the system prompt.

${instructions}
</${TAG}>`,
  };
}

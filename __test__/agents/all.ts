import { amp } from "./amp.js";
import { codex } from "./codex.js";
import { pi } from "./pi.js";
import type { TestedAgent } from "./tested-agent.js";

/** Amp is there for x64 alone. */
export const AGENTS: TestedAgent[] = process.arch === "x64" ? [pi, codex, amp] : [pi, codex];

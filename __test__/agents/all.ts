import { amp } from "./amp.js";
import { claude } from "./claude.js";
import { codex } from "./codex.js";
import { opencode } from "./opencode.js";
import { pi } from "./pi.js";
import type { TestedAgent } from "./tested-agent.js";

const EVERYWHERE: TestedAgent[] = [pi, claude, codex, opencode];

/** Amp is there for x64 alone. */
export const AGENTS = process.arch === "x64" ? [...EVERYWHERE, amp] : EVERYWHERE;

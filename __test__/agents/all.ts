import { amp } from "./amp.js";
import { codex } from "./codex.js";
import { pi } from "./pi.js";
import type { TestedAgent } from "./tested-agent.js";

export const AGENTS: TestedAgent[] = [pi, codex, amp];

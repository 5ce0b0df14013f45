/** The rules of `amp.permissions`. https://ampcode.com/manual/appendix#permissions-reference */

import { spawn } from "node:child_process";
import { text } from "node:stream/consumers";

export interface Rule {
  /** With `*` for anything. */
  tool: string;
  action: "allow" | "reject" | "ask" | "delegate";
  to?: string;
  message?: string;
}

/** What decides when no rule of the user matches. */
const BUILT_IN: Rule[] = [
  { tool: "Read", action: "allow" },
  { tool: "*", action: "ask" },
];

/** Why a call must not run; undefined if it may. */
export async function decide(
  rules: Rule[],
  name: string,
  input: object,
  { toolUseId, threadId }: { toolUseId: string; threadId: string },
): Promise<string | undefined> {
  const rule = [...rules, ...BUILT_IN].find(({ tool }) => matches(tool, name));
  switch (rule?.action) {
    case "allow":
      return undefined;
    case "reject":
      return rule.message ?? "not permitted";
    case "delegate": {
      const env = {
        AGENT: "amp",
        AMP_THREAD_ID: threadId,
        AGENT_TOOL_NAME: name,
        // Some versions leave it out.
        ...(process.env.STAND_IN_NAMES_NO_CALL ? {} : { AGENT_TOOL_USE_ID: toolUseId }),
      };
      const child = spawn(rule.to ?? "", [], { env: { ...process.env, ...env } });
      child.stdin.on("error", () => {});
      child.stdin.end(JSON.stringify(input));
      const exited = new Promise<number | null>((resolve, reject) => {
        child.once("close", resolve).once("error", reject);
      });
      const stderr = await text(child.stderr);
      const code = await exited;
      if (code === 0) return undefined;
      return code === 1 ? "nobody can be asked in execute mode" : stderr;
    }
    default:
      return "nobody can be asked in execute mode";
  }
}

function matches(pattern: string, name: string): boolean {
  const literal = pattern.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&"));
  return new RegExp(`^${literal.join(".*")}$`).test(name);
}

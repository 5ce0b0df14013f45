/** Amp's built-in tools, as far as tests need them. They do what they say. */

import { spawn } from "node:child_process";
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, resolve } from "node:path";
import { text } from "node:stream/consumers";
import type { Block } from "./model.mts";

type Input = Record<string, unknown>;

export interface Context {
  /** Runs a subagent to its answer. */
  subagent(prompt: string): Promise<string>;
}

export interface Tool {
  name: string;
  description: string;
  inputSchema: object;
  execute(input: Input, context: Context): Promise<string | Block[]> | string | Block[];
}

export const BUILT_IN: Tool[] = [
  tool("shell_command", ["command"], async ({ command, workdir }) => {
    const cwd = resolve(String(workdir ?? "."));
    // In a process group of its own, which a signal to Amp's does not reach.
    const child = spawn("/bin/sh", ["-c", String(command)], { cwd, detached: true });
    child.stdin.end();
    const exited = new Promise<number | null>((done) => child.once("exit", done));
    const [stdout, stderr] = await Promise.all([text(child.stdout), text(child.stderr)]);
    return JSON.stringify({ output: stdout + stderr, exitCode: await exited });
  }),
  tool("Read", ["path"], ({ path }) => readFileSync(resolve(String(path)), "utf8")),
  tool("create_file", ["path", "content"], ({ path, content }) => {
    mkdirSync(dirname(resolve(String(path))), { recursive: true });
    writeFileSync(resolve(String(path)), String(content));
    return `Successfully created file ${path}`;
  }),
  tool("edit_file", ["path", "old_str", "new_str"], ({ path, old_str: old, new_str: now }) => {
    const before = readFileSync(resolve(String(path)), "utf8");
    if (!before.includes(String(old))) throw new Error(`Could not find the text in ${path}`);
    writeFileSync(
      resolve(String(path)),
      before.replace(String(old), () => String(now)),
    );
    return `Successfully edited file ${path}`;
  }),
  tool("apply_patch", ["patchText"], ({ patchText }) => applyPatch(String(patchText))),
  tool("todo_write", ["todos"], () => "Todos written"),
  tool("Task", ["prompt"], ({ prompt }, { subagent }) => subagent(String(prompt))),
];

function tool(name: string, required: string[], execute: Tool["execute"]): Tool {
  const properties = Object.fromEntries(
    required.map((key) => [key, key === "todos" ? { type: "array" } : { type: "string" }]),
  );
  const inputSchema = { type: "object", properties, required };
  return { name, description: `The tool ${name}`, inputSchema, execute };
}

/** Files that are added, deleted, or updated in passages that are unique in the file. */
function applyPatch(patch: string): string {
  const files = patch.split(/^\*\*\* (?=Add|Update|Delete)/m).slice(1);
  for (const file of files) {
    const [header = "", ...rest] = file.replace(/^\*\*\* End Patch\s*/m, "").split("\n");
    const [, action, name = ""] = /^(Add|Update|Delete) File: (.+)$/.exec(header) ?? [];
    const path = resolve(name);
    if (action === "Delete") rmSync(path);
    else if (action === "Add") {
      const lines = rest.filter((line) => line.startsWith("+")).map((line) => line.slice(1));
      writeFileSync(path, lines.map((line) => `${line}\n`).join(""));
    } else {
      let content = readFileSync(path, "utf8");
      for (const passage of rest
        .join("\n")
        .split(/^@@.*\n/m)
        .slice(1)) {
        const lines = passage.split("\n").filter((line) => line !== "");
        const side = (other: string) =>
          lines.filter((line) => !line.startsWith(other)).map((line) => `${line.slice(1)}\n`);
        const before = side("+").join("");
        if (!content.includes(before)) throw new Error(`The patch does not apply to ${name}`);
        content = content.replace(before, () => side("-").join(""));
      }
      writeFileSync(path, content);
    }
  }
  return JSON.stringify({ output: `Patched ${files.length} files` });
}

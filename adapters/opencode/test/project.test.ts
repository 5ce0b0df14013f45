import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { expect, onTestFinished, test } from "vitest";
import { actsUnasked, instructionsOf } from "../src/project.js";

/** A project of these files, in whose directory `inner` somebody works. */
async function newProject(files: Record<string, string>): Promise<{ root: string; cwd: string }> {
  const root = await mkdtemp(join(tmpdir(), "agentvm-opencode-"));
  onTestFinished(() => rm(root, { recursive: true }));
  const cwd = join(root, "inner");
  await mkdir(cwd);
  await mkdir(join(root, ".git"));
  for (const [name, text] of Object.entries(files)) {
    await mkdir(dirname(join(root, name)), { recursive: true });
    await writeFile(join(root, name), text);
  }
  return { root, cwd };
}

test.for([
  ["opencode.json", '{ "mcp": { "its": { "type": "local", "command": ["touch", "x"] } } }'],
  ["inner/opencode.jsonc", '{ "provider": {} } // elsewhere'],
  [".opencode/opencode.json", '{ "plugin": ["its"] }'],
  [".opencode/plugins/its.ts", "export default 1"],
  ["inner/.opencode/tool/its.ts", "export default 1"],
  ["opencode.json", "what is this?"],
])("%s with %s could act unasked", async ([name = "", text = ""]) => {
  const { root, cwd } = await newProject({ [name]: text });
  const found = actsUnasked(cwd);
  expect(found && join(root, name).startsWith(found)).toBe(true);
});

test("what only says something could not", async () => {
  const { cwd } = await newProject({
    "opencode.json": '{ "model": "a/b", /* so */ "permission": { "bash": "allow" }, }',
    ".opencode/agent/its.md": "You are mine.",
  });
  expect(actsUnasked(cwd)).toBeUndefined();
});

test("a project's instructions are of one kind, the nearest first", async () => {
  const { root, cwd } = await newProject({
    "AGENTS.md": "a",
    "inner/AGENTS.md": "b",
    "CLAUDE.md": "c",
  });
  expect(instructionsOf(cwd)).toEqual([join(cwd, "AGENTS.md"), join(root, "AGENTS.md")]);
});

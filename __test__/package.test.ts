import { writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import * as imported from "agentvm";
import { expect, test } from "vitest";
import { newDirectory, runProgram } from "./fixtures.js";

test("the package can be imported, and required", () => {
  const required = createRequire(import.meta.url)("agentvm");
  expect(Object.keys(required).sort()).toEqual(["AgentVmError", "createClient"]);
  expect(imported.createClient).toBe(required.createClient);
});

test("its types need no @types/node where the DOM declares AbortSignal", async () => {
  const directory = await newDirectory();
  const program = join(directory, "program.ts");
  const project = join(directory, "tsconfig.json");
  await writeFile(program, 'export * from "agentvm";\n');
  await writeFile(
    project,
    JSON.stringify({
      compilerOptions: {
        strict: true,
        noEmit: true,
        skipLibCheck: false,
        target: "es2022",
        lib: ["es2022", "dom"],
        types: [],
        module: "nodenext",
        paths: { agentvm: [resolve("index.d.ts")] },
      },
      files: [program],
    }),
  );

  const tsc = "node_modules/typescript/bin/tsc";
  const { code, stdout } = await runProgram([tsc, "--project", project]);

  expect({ code, stdout }).toEqual({ code: 0, stdout: "" });
});

test("the example of an agent of one's own goes on after a sleep", async () => {
  const { code, stdout } = await runProgram(["--import=tsx", "examples/own-agent/index.ts"]);
  expect({ code, stdout }).toEqual({ code: 0, stdout: "Prompt 1. \nPrompt 2. GNU/Linux\n\n" });
});

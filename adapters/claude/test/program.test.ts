import { text } from "node:stream/consumers";
import { expect, test } from "vitest";
import { type Program, start } from "../src/program.js";

/** Tells its arguments, and what is in the file that the last one names. */
const TELL =
  "const args = process.argv.slice(1);" +
  "const file = args.at(-1).startsWith('/') ? require('fs').readFileSync(args.at(-1), 'utf8') : '';" +
  "console.log(JSON.stringify({ args, file }));";

async function told(...args: string[]) {
  const { signal } = new AbortController();
  const program: Program = {
    command: process.execPath,
    args: ["-e", TELL, "--", ...args],
    env: process.env,
    signal,
  };
  const { stdout } = start(program);
  if (!stdout) throw new Error("no standard output");
  return JSON.parse(await text(stdout));
}

test("the configuration of MCP servers is in a file, not in the arguments", async () => {
  const config = JSON.stringify({ mcpServers: { files: { headers: { a: "é".repeat(100_000) } } } });
  expect(await told("--verbose", "--mcp-config", config)).toEqual({
    args: ["--verbose", "--mcp-config", "/proc/self/fd/3"],
    file: config,
  });
});

test("without MCP servers the arguments stay as they are", async () => {
  expect(await told("--verbose")).toEqual({ args: ["--verbose"], file: "" });
});

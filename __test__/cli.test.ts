import { writeFile } from "node:fs/promises";
import { dirname } from "node:path";
import { version } from "agentvm/package.json";
import { expect, test } from "vitest";
import { agentStoreDir, newDirectory, runProgram } from "./fixtures.js";

const agentvm = (...args: string[]) => runProgram(["dist/cli.js", ...args]);

test.for(["--help", "-h", "help"])("%s explains the commands", async (command) => {
  const { code, stdout, stderr } = await agentvm(...command.split(" "));
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
  expect(stdout).toContain("Usage: agentvm");
  expect(stdout).toContain("install <agent>[@version]");
});

test("a command's --help explains it alone", async () => {
  const { code, stdout } = await agentvm("images", "--help");
  expect(code).toBe(0);
  expect(stdout).toMatch(/^Usage: agentvm <command>\n\n {2}images \[list\]/);
  expect(stdout).toContain("images prune");
  expect(stdout).not.toContain("install <agent>");
});

test("--version prints the version", async () => {
  expect(await agentvm("--version")).toMatchObject({ code: 0, stdout: `${version}\n` });
});

test.for([
  ["no command", [], "Usage: agentvm"],
  ["an unknown command", ["instal"], "INVALID_ARGUMENT: there is no command instal\n"],
  ["install without an agent", ["install"], "the names of agents"],
  ["install of all and one", ["install", "--all", "pi"], "the names of agents"],
  [
    "install with an unknown option",
    ["install", "--fast", "pi"],
    "INVALID_ARGUMENT: agentvm install: there is no option --fast: there is --all\n",
  ],
  [
    "remove with an option",
    ["remove", "-f", "pi"],
    "agentvm remove: there is no option -f: there is none\n",
  ],
  [
    "a value for what takes none",
    ["agents", "--json=yes"],
    "INVALID_ARGUMENT: agentvm agents: --json takes no value\n",
  ],
  [
    "an option without its value",
    ["ls", "--data-dir"],
    "INVALID_ARGUMENT: agentvm ls: --data-dir takes a value",
  ],
  [
    "an option for the value of another",
    ["ls", "--data-dir", "--json"],
    "INVALID_ARGUMENT: agentvm ls: --data-dir takes a value",
  ],
  ["remove without an agent", ["remove"], "the names of agents"],
  ["agents with a name", ["agents", "pi"], "agents: it takes options alone, not pi\n"],
  ["prune with a name", ["prune", "pi"], "pi"],
] as const)("%s is an error of usage", async ([, args, message]) => {
  const { code, stdout, stderr } = await agentvm(...args);
  expect({ code, stdout }).toEqual({ code: 2, stdout: "" });
  expect(stderr).toContain(message);
  expect(stderr).toContain(args.length > 0 ? "INVALID_ARGUMENT: " : "Usage: ");
  expect(stderr).toMatch(/agentvm --help|Usage: agentvm/);
});

test.for([
  ["pie", "AGENT_UNKNOWN", 1],
  ["pi@latest", "INVALID_ARGUMENT", 2],
] as const)("install %s fails with %s", async ([name, expected, exitCode]) => {
  const { code, stdout, stderr } = await agentvm("install", name);
  expect({ code, stdout }).toEqual({ code: exitCode, stdout: "" });
  expect(stderr).toMatch(new RegExp(`^${expected}: .*${name}.*\n$`));
});

test("install pi is done at once where Pi is installed", async () => {
  const { code, stderr } = await runProgram(["dist/cli.js", "install", "pi", "pi"], {
    AGENTVM_CACHE_DIR: dirname(agentStoreDir),
  });
  const said = `pi is installed in ${agentStoreDir}\n`;
  expect({ code, stderr }).toEqual({ code: 0, stderr: said + said });
});

test("a store that can't be made is an error that names it", async () => {
  const inTheWay = `${await newDirectory()}/file`;
  await writeFile(inTheWay, "");
  const { code, stderr } = await runProgram(["dist/cli.js", "install", "pi"], {
    AGENTVM_CACHE_DIR: inTheWay,
  });
  expect(code).toBe(1);
  expect(stderr).toContain(inTheWay);
});

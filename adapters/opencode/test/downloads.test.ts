import { mkdir, mkdtemp, readdir, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, onTestFinished, test } from "vitest";
import { configurationDirectories, needNothing } from "../src/downloads.js";

async function newDirectory(): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), "agentvm-opencode-"));
  onTestFinished(() => rm(directory, { recursive: true }));
  return directory;
}

test("OpenCode reads the user's directories and those of the projects above", async () => {
  const home = await newDirectory();
  const cwd = join(home, "project/inner");
  await mkdir(join(home, "project/.opencode"), { recursive: true });
  await mkdir(cwd);
  expect(configurationDirectories(cwd, { HOME: home })).toEqual([
    join(home, ".config/opencode"),
    join(home, "project/.opencode"),
  ]);
  const elsewhere = { HOME: home, XDG_CONFIG_HOME: "/etc/xdg" };
  expect(configurationDirectories(home, elsewhere)).toEqual(["/etc/xdg/opencode"]);
});

test("a directory that needs nothing has nothing installed, until it needs something", async () => {
  const directory = join(await newDirectory(), "opencode");
  await needNothing(directory);
  await needNothing(directory);
  expect(await readdir(directory)).toEqual(["node_modules", "package-lock.json"]);

  await mkdir(join(directory, "tools"));
  await needNothing(directory);
  expect(await readdir(directory)).toEqual(["tools"]);
});

test("what somebody has installed stays", async () => {
  const directory = await newDirectory();
  await mkdir(join(directory, "node_modules"));
  await writeFile(join(directory, "package.json"), "{}");
  await needNothing(directory);
  expect(await readdir(directory)).toEqual(["node_modules", "package.json"]);
});

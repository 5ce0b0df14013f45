import { mkdir, mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { expect, onTestFinished, test } from "vitest";
import { startModelServer } from "../../../__test__/model-server.js";
import { Adapter, ASK, run, service } from "./adapter.js";

const REJECT = { _meta: { agentvm: { permissionPolicy: "reject" } } };

/** A repository with that file, in whose directory `inner` somebody works. */
async function newProject(file?: string, text?: string): Promise<{ root: string; cwd: string }> {
  const root = await mkdtemp(join(tmpdir(), "amp-project-"));
  onTestFinished(() => rm(root, { recursive: true }));
  const cwd = join(root, "inner");
  // Git does not take a directory for a repository because of this.
  await mkdir(join(cwd, ".git"), { recursive: true });
  if (file) await write(join(root, file), text);
  return { root, cwd };
}

async function write(path: string, text = "{}"): Promise<void> {
  await mkdir(dirname(path), { recursive: true });
  await writeFile(path, text);
}

test.for([
  ["inner/.amp/plugins/its.ts", "inner/.amp/plugins"],
  [".amp/plugins/its.ts", ".amp/plugins"],
  [".amp/settings.json", ".amp/settings.json"],
  ["inner/.amp/settings.jsonc", "inner/.amp/settings.jsonc"],
] as const)(
  "a project with %s is refused where somebody wants to be asked",
  async ([file, named]) => {
    await using amp = await Adapter.start();
    const { root, cwd } = await newProject(file);
    const path = join(root, named);
    await symlink(cwd, join(amp.home, "link"));
    for (const settings of [
      { ...ASK, cwd },
      { ...REJECT, cwd },
      { ...ASK, cwd: join(amp.home, "link") },
    ]) {
      const { error } = await amp.call("session/new", { ...settings, mcpServers: [] });
      expect(error).toMatchObject({
        code: -32603,
        data: { type: "amp_project_acts_unasked", path },
      });
      expect(error?.message).toContain(`${path} without asking`);
      expect(error?.message).toContain('permissionPolicy to "allow"');
    }
  },
);

test.for([
  [".agents/skills/group/its/mcp.json", "{}"],
  ["inner/.claude/skills/its/SKILL.md", "---\nname: its\nmcpServers: {}\n---\n"],
  [".agents/skills/its/SKILL.md", '---\nname: its\n"mcpS\\u0065rvers": {}\n---\n'],
] as const)("%s brings an MCP server, which Amp would start", async ([file, text]) => {
  await using amp = await Adapter.start();
  const { root, cwd } = await newProject(file, text);
  const { error } = await amp.call("session/new", { ...ASK, cwd, mcpServers: [] });
  expect(error).toMatchObject({ data: { path: join(root, file) } });
});

test("a skill that only says something is none of that", async () => {
  await using amp = await Adapter.start();
  const text = "---\nname: its\n---\nSay `a\\b`.\n";
  const { cwd } = await newProject(".agents/skills/its/SKILL.md", text);
  const { error } = await amp.call("session/new", { ...ASK, cwd, mcpServers: [] });
  expect(error).toBeUndefined();
});

test("with allow it is what it is to Amp", async () => {
  await using amp = await Adapter.start();
  const { cwd } = await newProject(".amp/settings.json");
  const { error } = await amp.call("session/new", { cwd, mcpServers: [] });
  expect(error).toBeUndefined();
});

test("a stored session is not opened with ask when its project has got plugins", async () => {
  await using amp = await Adapter.start();
  const { cwd } = await newProject();
  const { sessionId } = await amp.request("session/new", { ...ASK, cwd, mcpServers: [] });
  await amp.request("session/close", { sessionId });
  await write(join(cwd, ".amp/plugins/its.ts"));
  const { error } = await amp.call("session/resume", { sessionId, ...ASK, cwd, mcpServers: [] });
  expect(error).toMatchObject({ data: { path: join(cwd, ".amp/plugins") } });
});

test("nor does a turn begin when the one before has written some", async () => {
  await using server = await startModelServer({
    script: [{ toolCalls: [run("mkdir -p .amp/plugins")] }, { text: "Done." }],
  });
  await using amp = await Adapter.start({ env: service(server) });
  const sessionId = await amp.newSession(ASK);
  const turn = amp.prompt(sessionId, "Write");
  amp.select(await amp.asked(), "allow_once");
  await turn;
  const { error } = await amp.prompt(sessionId, "Go on");
  expect(error).toMatchObject({ data: { path: join(amp.home, ".amp/plugins") } });
});

const { mkdtempSync, rmSync } = require("node:fs");
const { tmpdir } = require("node:os");
const { join } = require("node:path");
const { AgentVmError, createClient } = require("agentvm");

test("a VM runs a command under Jest, and its errors are those of the package", async () => {
  const directory = mkdtempSync(join(tmpdir(), "agentvm-jest-"));
  const client = createClient({
    dataDir: join(directory, "data"),
    agentStoreDir: join(directory, "agents"),
  });
  const agent = client.vm.getOrCreate(["jest"]);
  try {
    await agent.writeFile("greeting", new TextEncoder().encode("hello"));
    expect(await agent.exec("cat greeting")).toMatchObject({ stdout: "hello", exitCode: 0 });
    const failed = agent.readFile("nothing");
    await expect(failed).rejects.toMatchObject({ name: "AgentVmError", code: "ENOENT" });
    await expect(failed).rejects.toBeInstanceOf(AgentVmError);
  } finally {
    await agent.destroy();
    await client.close();
    rmSync(directory, { recursive: true, force: true });
  }
});

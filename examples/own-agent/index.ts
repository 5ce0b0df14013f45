// npx tsx examples/own-agent: an agent of one's own, any program of the VM that speaks ACP.

import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createClient } from "agentvm";

const dataDir = await mkdtemp(join(tmpdir(), "agentvm-example-"));
const client = createClient({
  dataDir,
  agents: { mybot: { command: "node", args: ["/home/user/mybot.mjs"] } },
});
try {
  const agent = client.vm.getOrCreate("own");
  await agent.writeFile("mybot.mjs", await readFile(join(import.meta.dirname, "mybot.mjs")));
  const { sessionId } = await agent.createSession("mybot");
  console.log((await agent.sendPrompt(sessionId, "Hello")).text);
  await agent.sleep(); // and with the next prompt the VM wakes up, and the agent goes on
  console.log((await agent.sendPrompt(sessionId, "!uname -o")).text);
  await agent.destroy();
} finally {
  await client.close();
  await rm(dataDir, { recursive: true, force: true });
}

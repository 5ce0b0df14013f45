import { expect, test } from "vitest";
import { envOf, newClient, newDirectory, newPiSession, newPiVm } from "./fixtures.js";
import { quickstartScript } from "./model-server.js";

const decode = (bytes: Uint8Array) => new TextDecoder().decode(bytes);

test("an agent writes a program in its VM, runs it and says what it printed", async () => {
  const { agent, session, sessionId } = await newPiSession(quickstartScript());
  expect(session).toMatchObject({
    sessionId: expect.stringMatching(/^[0-9a-f-]{36}$/),
    agentType: "pi",
    capabilities: { loadSession: true },
    agentInfo: { name: expect.any(String) },
  });

  const { response, text, stopReason } = await agent.sendPrompt(sessionId, "Say hello in Node");

  expect(stopReason).toBe("end_turn");
  expect(response).toMatchObject({ stopReason: "end_turn" });
  expect(text).toContain('running it printed "Hello from inside the VM"');
  expect(decode(await agent.readFile("/home/user/hello.js"))).toBe(
    'console.log("Hello from inside the VM");\n',
  );
});

test("text is the message of this turn, without thoughts and without earlier turns", async () => {
  const { agent, sessionId } = await newPiSession([
    { thinking: "hm", text: "The first answer, which comes in several chunks." },
    { text: "The second." },
  ]);
  const first = await agent.sendPrompt(sessionId, "one");
  const second = await agent.sendPrompt(sessionId, "two");
  expect(first.text).toBe("The first answer, which comes in several chunks.");
  expect(second.text).toBe("The second.");
});

test("a prompt may be ACP content blocks", async () => {
  const { agent, sessionId, model } = await newPiSession([{ text: "A dot." }]);
  const dot =
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
  await agent.sendPrompt(sessionId, [
    { type: "text", text: "What is this?" },
    { type: "image", data: dot, mimeType: "image/png" },
  ]);

  const { userText, body } = await model.request(0);
  expect(userText).toContain("What is this?");
  expect(JSON.stringify(body.messages)).toContain('"media_type":"image/png"');

  const events = await agent.getSessionEvents(sessionId);
  const blocks = events
    .map(({ event }) => event.params.update)
    .filter((update) => update?.sessionUpdate === "user_message_chunk")
    .map(({ content }) => content.type);
  expect(blocks).toEqual(["text", "image"]);
});

test("other stop reasons of the model are passed on", async () => {
  const { agent, sessionId } = await newPiSession([{ text: "And so", stopReason: "max_tokens" }]);
  const { stopReason, text } = await agent.sendPrompt(sessionId, "Go on for ever");
  expect({ stopReason, text }).toEqual({ stopReason: "max_tokens", text: "And so" });
});

test("a session works in its cwd, which is made", async () => {
  const { agent, session } = await newPiVm([
    { toolCalls: [{ name: "bash", input: { command: "pwd > where" } }] },
    { text: "Done." },
  ]);
  const { sessionId } = await session({ cwd: "/home/user/projects/one" });
  await agent.sendPrompt(sessionId, "Where are you?");
  expect(decode(await agent.readFile("projects/one/where"))).toBe("/home/user/projects/one\n");
});

test("an agent has the environment of its session and nothing of the host's", async () => {
  const { agent, session, model } = await newPiVm([
    { toolCalls: [{ name: "bash", input: { command: "env > env.txt" } }] },
    { text: "Done." },
  ]);
  process.env["AGENTVM_TEST_SECRET"] = "of the host";
  const { sessionId } = await session({ env: { ...envOf(model), GREETING: "hello, 世界" } });
  await agent.sendPrompt(sessionId, "Look around");
  delete process.env["AGENTVM_TEST_SECRET"];

  const env = decode(await agent.readFile("env.txt"));
  expect(env).toContain("GREETING=hello, 世界\n");
  expect(env).toContain("HOME=/home/user\n");
  expect(env).not.toContain("AGENTVM_TEST_SECRET");
  expect(env).not.toContain("of the host");
});

test("two VMs see nothing of each other", async () => {
  const client = await newClient({ dataDir: await newDirectory() });
  const [one, other] = [client.vm.getOrCreate(["one"]), client.vm.getOrCreate(["other"])];
  await one.writeFile("secret.txt", "of one");
  await one.exec(
    "sleep 601 >/dev/null 2>&1 & echo $! > /tmp/pid; until pgrep -x sleep; do :; done",
  );

  const seen = await other.exec("ls -A /home/user /tmp; pgrep -x sleep; true");
  expect(seen.stdout).not.toContain("secret.txt");
  expect(seen.stdout).not.toContain("pid");
  expect(seen.stdout).not.toMatch(/^\d+$/m);
  expect((await one.exec("pgrep -x sleep")).exitCode).toBe(0);
});

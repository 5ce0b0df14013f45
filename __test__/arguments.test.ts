import { Readable, Writable } from "node:stream";
import type { Agent } from "agentvm";
import { createClient } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, newClient, newDirectory, newOwnVm, newPiSession, newVm } from "./fixtures.js";

/** A call with something that its types forbid. */
// biome-ignore lint/suspicious/noExplicitAny: what JavaScript callers can do
type Untyped = any;

const agentWith = (env: Untyped) => ({ agents: { own: { command: "own", env } } });
const servers = (...mcpServers: Untyped[]) => ({ mcpServers });
const local = (more: Untyped) => servers({ type: "local", command: "true", ...more });
const remote = (more: Untyped) => servers({ type: "remote", url: "http://a.example", ...more });

/** What is no object of options. */
const NO_OBJECT: Untyped[] = [null, 7, "x", true, [], [1]];

test.for<[string, Untyped, string]>([
  ["an unknown name", { datadir: "/tmp" }, "datadir"],
  ["a path that is no string", { dataDir: 1 }, "dataDir"],
  ["null", { dataDir: null }, "dataDir"],
  ["an empty path", { dataDir: "" }, "dataDir"],
  ["a path with NUL", { dataDir: "/tmp/a\0b" }, "dataDir"],
  ["an empty store path", { agentStoreDir: "" }, "agentStoreDir"],
  ["a store path that is no string", { agentStoreDir: ["/tmp"] }, "agentStoreDir"],
  ["a boolean as text", { autoInstall: "no" }, "autoInstall"],
  ["another durability", { durability: "maximal" }, "durability"],
  ["one port", { loopbackExemptPorts: 80 }, "loopbackExemptPorts"],
  ["port 0", { loopbackExemptPorts: [0] }, "loopbackExemptPorts[0]"],
  ["a port beyond 65535", { loopbackExemptPorts: [80, 65_536] }, "loopbackExemptPorts[1]"],
  ["a fraction of a port", { loopbackExemptPorts: [80.5] }, "loopbackExemptPorts[0]"],
  ["a limit below an agent's first answer", { maxMessageBytes: 10 }, "maxMessageBytes"],
  ["a negative limit", { maxMessageBytes: -1 }, "maxMessageBytes"],
  ["NaN", { maxMessageBytes: Number.NaN }, "maxMessageBytes"],
  ["no time to sleep after", { sleepAfterMs: 0 }, "sleepAfterMs"],
  ["true for a time", { sleepAfterMs: true }, "sleepAfterMs"],
  ["an endless time", { sleepAfterMs: Number.POSITIVE_INFINITY }, "sleepAfterMs"],
  ["a negative time", { cancelGraceMs: -1 }, "cancelGraceMs"],
  ["an agent without a command", { agents: { own: {} } }, "agents.own"],
  ["an agent of a name that is taken", { agents: { pi: { command: "pi" } } }, "agents.pi"],
  ["a version that is a tag", { agents: { pi: { version: "latest" } } }, "agents.pi.version"],
  ["a version and more", { agents: { pi: { version: "1.0.0", args: [] } } }, "agents.pi"],
  [
    "a version of an own agent",
    { agents: { own: { command: "own", version: "1.0.0" } } },
    "agents.own.version",
  ],
  ["an agent that is lost in JSON", { agents: { own: undefined } }, "agents.own"],
  ["a variable that is not set", agentWith({ KEY: undefined }), "agents.own.env.KEY"],
  ["instructions that are no text", { additionalInstructions: 7 }, "additionalInstructions"],
])("createClient refuses %s, naming the option", async ([, options, field]) => {
  const dataDir = await newDirectory();
  await expectRefused(() => createClient({ dataDir, ...options }), field);
});

test("createClient refuses what is no object", async () => {
  for (const options of NO_OBJECT) await expectRefused(() => createClient(options), "options");
});

test("getOrCreate refuses what is no key", async () => {
  const client = await newClient();
  for (const key of ["", [], [""], ["a", ""], null, undefined, 7, {}, ["a", 7], [null], "\ud800"]) {
    await expectRefused(() => client.vm.getOrCreate(key as Untyped), "key");
  }
});

test.for<[string, Untyped, string]>([
  ["an unknown name", { evn: {} }, "evn"],
  ["an env that is no object", { env: "A=1" }, "env"],
  ["null", { env: null }, "env"],
  ["a list", { env: ["A=1"] }, "env"],
  ["a value that is no string", { env: { PORT: 80 } }, "env.PORT"],
  ["a name with =", { env: { "A=B": "1" } }, "env"],
  ["an empty name", { env: { "": "1" } }, "env"],
  ["a value with NUL", { env: { A: "\0" } }, "env"],
  ["a cwd that is no string", { cwd: 7 }, "cwd"],
  ["an empty cwd", { cwd: "" }, "cwd"],
  ["a cwd with NUL", { cwd: "/a\0b" }, "cwd"],
  ["a variable that is not set", { env: { KEY: undefined } }, "env.KEY"],
  ["a Map of variables", { env: new Map([["A", "1"]]) }, "env"],
  ["another policy", { permissionPolicy: "always" }, "permissionPolicy"],
  ["one server", { mcpServers: { type: "local", command: "true" } }, "mcpServers"],
  ["a server of no type", servers({ command: "true" }), "mcpServers[0]"],
  ["a server that is lost in JSON", servers(undefined), "mcpServers[0]"],
  ["a hole for a server", { mcpServers: new Array(1) }, "mcpServers[0]"],
  ["a server without a command", servers({ type: "local" }), "mcpServers[0]"],
  ["an empty command", local({ command: "" }), "mcpServers[0].command"],
  ["an argument that is no text", local({ args: ["a", 7] }), "mcpServers[0]"],
  ["a function as an argument", local({ args: ["a", () => "b"] }), "mcpServers[0].args[1]"],
  ["a server's variable that is not set", local({ env: { X: undefined } }), "mcpServers[0].env.X"],
  ["a server's variable of null", local({ env: { X: null } }), "mcpServers[0].env.X"],
  [
    "Headers, whose JSON is empty",
    remote({ headers: new Headers({ A: "1" }) }),
    "mcpServers[0].headers",
  ],
  ["a header that is not set", remote({ headers: { A: undefined } }), "mcpServers[0].headers.A"],
  ["a URL object", remote({ url: new URL("http://a.example") }), "mcpServers[0].url"],
  ["no URL", remote({ url: "a.example" }), "mcpServers[0].url"],
  ["another transport", remote({ transport: "ws" }), "mcpServers[0]"],
  [
    "instructions that are no text",
    { additionalInstructions: ["Be brief."] },
    "additionalInstructions",
  ],
  ["a boolean as text", { skipOsInstructions: "yes" }, "skipOsInstructions"],
  ["a model that is no text", { model: 7 }, "model"],
  ["a mode of null", { mode: null }, "mode"],
  ["a level that is no text", { thoughtLevel: 3 }, "thoughtLevel"],
  ["a boolean as number", { persistEnv: 1 }, "persistEnv"],
  ["a signal that is none", { signal: {} }, "signal"],
  ["a signal of null", { signal: null }, "signal"],
])("createSession refuses %s, naming the option", async ([, options, field]) => {
  const agent = await newVm();
  await expectRefused(() => agent.createSession("pi", options), field);
});

test.for<[string, Untyped, string]>([
  ["an unknown name", { timeout: 1 }, "timeout"],
  ["a cwd that is no string", { cwd: 7 }, "cwd"],
  ["null", { cwd: null }, "cwd"],
  ["another user", { user: "admin" }, "user"],
  ["a user id", { user: 0 }, "user"],
  ["a negative time", { timeoutMs: -1 }, "timeoutMs"],
  ["no time at all", { timeoutMs: 0 }, "timeoutMs"],
  ["a time as text", { timeoutMs: "5s" }, "timeoutMs"],
  ["an endless time", { timeoutMs: Number.POSITIVE_INFINITY }, "timeoutMs"],
  ["a negative limit", { maxOutputBytes: -1 }, "maxOutputBytes"],
  ["a limit of null", { maxOutputBytes: null }, "maxOutputBytes"],
  ["a value that is no string", { env: { A: null } }, "env.A"],
  ["a stdin that is neither text nor bytes", { stdin: [1, 2] }, "stdin"],
  ["a stdin of null", { stdin: null }, "stdin"],
  ["a signal that is none", { signal: "stop" }, "signal"],
])("exec refuses %s, naming the option", async ([, options, field]) => {
  const agent = await newVm();
  await expectRefused(() => agent.exec("true", options), field);
});

test("other calls name the argument that is wrong", async () => {
  const agent = await newVm();
  const bad = agent as Untyped;
  await expectRefused(() => bad.createSession(), "agentType");
  await expectRefused(() => bad.createSession(null), "agentType");
  for (const method of [
    "sendPrompt",
    "cancelPrompt",
    "resumeSession",
    "closeSession",
    "destroySession",
    "getSession",
    "setModel",
    "setMode",
    "setThoughtLevel",
    "setConfigOption",
    "getModes",
    "getConfigOptions",
    "rawSend",
    "respondPermission",
    "getEvents",
    "getSequencedEvents",
    "getSessionEvents",
    "sessionEvents",
  ]) {
    await expectRefused(() => bad[method](undefined, "text"), "sessionId");
    await expectRefused(() => bad[method](7, "text"), "sessionId");
  }
  await expectRefused(() => bad.setModel("id"), "model");
  await expectRefused(() => bad.setMode("id", null), "modeId");
  await expectRefused(() => bad.setThoughtLevel("id", 3), "level");
  await expectRefused(() => bad.setConfigOption("id", undefined, true), "optionId");
  for (const value of [undefined, () => true, Number.NaN]) {
    await expectRefused(() => bad.setConfigOption("id", "option", value), "value");
  }
  await expectRefused(() => bad.rawSend("id"), "method");
  await expectRefused(() => bad.rawSend("id", "method", { a: [() => 1] }), "params.a[0]");
  await expectRefused(() => bad.respondPermission("id", undefined, "once"), "permissionId");
  await expectRefused(() => bad.respondPermission("id", "id", true), "answer");
  await expectRefused(() => bad.exec(["ls"]), "command");
  await expectRefused(() => bad.exec("a\0b"), "command");
  await expectRefused(() => bad.readFile(), "path");
  await expectRefused(() => agent.readFile(""), "path");
  await expectRefused(() => agent.readFile("a\0b"), "path");
  await expectRefused(() => bad.readFile("a", { encoding: "hex" }), "encoding");
  await expectRefused(() => bad.readFile("a", { user: "nobody" }), "user");
  await expectRefused(() => bad.writeFile("a"), "content");
  await expectRefused(() => bad.writeFile("a", 7), "content");
  await expectRefused(() => bad.writeFile("a", new Uint16Array(1)), "content");
  await expectRefused(() => bad.writeFile("a", "", { modes: 0o600 }), "modes");
  await expectRefused(() => bad.writeFile("a", "", { mode: -1 }), "mode");
  await expectRefused(() => bad.writeFile("a", "", { mode: 0o10000 }), "mode");
  await expectRefused(() => bad.readFiles("a"), "paths");
  await expectRefused(() => bad.readFiles(["a", 7]), "paths[1]");
  await expectRefused(() => bad.writeFiles([{ path: "a" }]), "files[0].content");
  await expectRefused(() => bad.writeFiles([{ path: "a", content: "", modus: 1 }]), "modus");
  await expectRefused(() => bad.readdir("a", { recursive: true }), "recursive");
  await expectRefused(() => bad.move("a"), "to");
  await expectRefused(() => bad.chmod("a", "755"), "mode");
  await expectRefused(() => bad.chown("a", { uid: -1 }), "uid");
  await expectRefused(() => bad.chown("a", { user: 1 }), "user");
  await expectRefused(() => bad.symlink("a\0b", "l"), "target");
  await expectRefused(() => bad.readlink("a", { encoding: "hex" }), "encoding");
  await expectRefused(() => bad.uploadFile(7, "a"), "source");
  await expectRefused(() => bad.uploadFile([7], "a"), "source");
  await expectRefused(() => bad.uploadFile("", "a"), "source");
  await expectRefused(() => bad.downloadFile("a", {}), "destination");
  await expectRefused(() => bad.watch("a", { depth: 1 }), "depth");
  await expectRefused(() => bad.on("vmBooted"), "listener");
  await expectRefused(() => bad.once("vmBooted", "x"), "listener");
});

test("an unknown option is told with all that there are", async () => {
  const agent = await newVm();
  const bad = agent as Untyped;
  for (const [call, names] of [
    [() => bad.readFile("a", { lenght: 1 }), ["user", "offset", "length", "encoding"]],
    [() => bad.createReadStream("a", { lenght: 1 }), ["user", "offset", "length", "signal"]],
    [() => bad.readFiles(["a"], { offset: 1 }), ["user"]],
    [() => bad.downloadFile("a", "b", { mode: 1 }), ["user", "signal"]],
    [() => bad.readdir("a", { deep: true }), ["user", "signal"]],
    [() => bad.utimes("a", {}, { follow: false }), ["user", "followSymlinks"]],
    [() => bad.utimes("a", { mtime: 1 }), ["atimeMs", "mtimeMs"]],
    [() => bad.waitProcess(1, { timeoutMs: 1 }), ["signal"]],
    [() => bad.writeFiles([{ path: "a", data: "" }]), ["path", "content", "mode", "append"]],
  ] as [() => unknown, string[]][]) {
    const { message } = await failureOf(call);
    const told = names.map((name) => `"${name}"`).join(", ");
    expect(message).toMatch(new RegExp(`^(\\w+): there is no "\\1": there is ${told}$`));
  }
});

test("a wrong value is told as it was given", async () => {
  const agent = await newVm();
  const bad = agent as Untyped;
  const now = new Date();
  for (const [call, message] of [
    [() => bad.connect("80"), 'port: must be a whole number between 1 and 65535, not "80"'],
    [() => bad.chmod("a", "755"), 'mode: must be a whole number between 0 and 0o7777, not "755"'],
    [
      () => bad.exec("a", { timeoutMs: "80" }),
      'timeoutMs: must be a whole number of at least 1, not "80"',
    ],
    [
      () => bad.exec("a", { maxOutputBytes: 1.5 }),
      "maxOutputBytes: must be a whole number of at least 0, not 1.5",
    ],
    [() => bad.waitProcess("1"), 'pid: must be a positive whole number, not "1"'],
    [() => bad.exec("a", new Map()), "options: must be a plain object, not a Map"],
    [() => bad.exec("a", { cwd: new URL("file:///") }), "cwd: must be of what JSON has, not a URL"],
    [
      () => bad.utimes("a", now, now),
      "times: must be { atimeMs?, mtimeMs? }, in milliseconds since the epoch as of Date.now(), not a Date",
    ],
    [
      () => bad.utimes("a", { mtimeMs: now }),
      "mtimeMs: must be milliseconds since the epoch, not a Date",
    ],
    [() => bad.utimes("a", { mtimeMs: 0 }, now), "options: must be a plain object, not a Date"],
  ] as [() => unknown, string][]) {
    expect((await failureOf(call)).message).toBe(message);
  }
});

test("no message has more of a name or a path than can be read", async () => {
  const agent = await newVm();
  const bad = agent as Untyped;
  const [long, deep] = ["x".repeat(5000), `${"d".repeat(250)}/`.repeat(15)];
  await agent.writeFile("a", "");
  const cut = /"[^"…]{99,100}…[^"…]{99,100}"/;
  for (const call of [
    () => agent.readFile(deep),
    () => agent.stat(long),
    () => agent.move("a", deep),
    () => agent.copy(deep, "a"),
    () => agent.watch(deep),
    () => agent.readdirRecursive(deep),
    () => agent.exec("true", { cwd: deep }),
    () => agent.spawn(`/${deep}`),
    () => agent.uploadFile(`/${deep}`, "a"),
    () => agent.downloadFile("a", `/${deep}`),
    () => agent.getSession(long),
    () => agent.createSession(long),
    () => bad.exec("true", { [long]: 1 }),
    () => bad.exec("true", { env: { [`${long}=`]: "1" } }),
    () => bad.exec("true", { env: { [long]: 1 } }),
    () => bad.vmFetch(80, long),
    () => bad.readFile("a", { user: long }),
    () => bad.chmod("a", long),
  ]) {
    const { message } = await failureOf(call);
    expect(message.length, message).toBeLessThan(800);
    expect(message.length, message).toBeGreaterThan(150);
  }
  expect((await failureOf(() => agent.readFile(deep))).message).toMatch(cut);
});

test("what is no object of options is refused by every call", async () => {
  const agent = await newVm();
  for (const options of NO_OBJECT) {
    const id = "01a20f17-a84e-70d6-a176-692da91130ed";
    await expectRefused(() => agent.createSession("pi", options), "options");
    await expectRefused(() => agent.sendPrompt(id, "text", options), "options");
    await expectRefused(() => agent.resumeSession(id, options), "options");
    await expectRefused(() => agent.getEvents(id, options), "options");
    await expectRefused(() => agent.getSequencedEvents(id, options), "options");
    await expectRefused(() => agent.getSessionEvents(id, options), "options");
    await expectRefused(() => agent.sessionEvents(id, options), "options");
    await expectRefused(() => agent.exec("true", options), "options");
    await expectRefused(() => agent.readFile("a", options), "options");
    await expectRefused(() => agent.writeFile("a", "", options), "options");
    await expectRefused(() => agent.readFiles(["a"], options), "options");
    await expectRefused(() => agent.writeFiles([], options), "options");
    await expectRefused(() => agent.mkdir("a", options), "options");
    await expectRefused(() => agent.readdir("a", options), "options");
    await expectRefused(() => agent.readdirRecursive("a", options), "options");
    await expectRefused(() => agent.walk("a", options), "options");
    await expectRefused(() => agent.stat("a", options), "options");
    await expectRefused(() => agent.exists("a", options), "options");
    await expectRefused(() => agent.move("a", "b", options), "options");
    await expectRefused(() => agent.delete("a", options), "options");
    await expectRefused(() => agent.chmod("a", 0, options), "options");
    await expectRefused(() => agent.chown("a", {}, options), "options");
    await expectRefused(() => agent.symlink("a", "b", options), "options");
    await expectRefused(() => agent.readlink("a", options), "options");
    await expectRefused(() => agent.realpath("a", options), "options");
    await expectRefused(() => agent.uploadFile("/etc/hostname", "b", options), "options");
    await expectRefused(() => agent.downloadFile("a", "b", options), "options");
    await expectRefused(() => agent.createReadStream("a", options), "options");
    await expectRefused(() => agent.watch("a", options), "options");
  }
});

test("a prompt that is none is refused and starts no turn", async () => {
  const { agent, sessionId, model } = await newPiSession([]);
  const prompt = (text: Untyped, options?: Untyped) => agent.sendPrompt(sessionId, text, options);
  const nothing = [{ type: "text", text: "" }];
  for (const text of [undefined, null, 7, {}, "", [], nothing, () => "hi", Symbol("hi"), 7n]) {
    await expectRefused(() => prompt(text), "text");
  }
  for (const block of ["text", null, [], { text: "no type" }]) {
    await expectRefused(() => prompt([{ type: "text", text: "hi" }, block]), "text[1]");
  }
  for (const wrong of [7n, undefined, () => "hi", Number.NaN]) {
    await expectRefused(() => prompt([{ type: "text", text: "hi" }, wrong]), "text[1]");
    await expectRefused(() => prompt([{ type: "text", text: [wrong] }]), "text[0].text[0]");
  }
  await expectRefused(() => prompt("hi", { timeoutMs: 1 }), "timeoutMs");
  await expectRefused(() => prompt("hi", { signal: 1 }), "signal");
  expect(model.requests).toEqual([]);
  expect(await agent.getSessionEvents(sessionId)).toEqual([]);
});

test("resumeSession refuses what is no environment", async () => {
  const { agent, sessionId } = await newPiSession([]);
  const resume = (options: Untyped) => agent.resumeSession(sessionId, options);
  await expectRefused(() => resume({ env: { "A=B": "1" } }), "env");
  await expectRefused(() => resume({ env: null }), "env");
  await expectRefused(() => resume({ env: { A: 1 } }), "env.A");
  await expectRefused(() => resume({ cwd: "/" }), "cwd");
});

test("since and limit are whole numbers from 0", async () => {
  const { agent, sessionId } = await newPiSession([]);
  for (const method of ["getEvents", "getSequencedEvents", "getSessionEvents"] as const) {
    const events = (options: Untyped) => agent[method](sessionId, options);
    for (const wrong of [-1, 1.5, "1", null, Number.NaN]) {
      await expectRefused(() => events({ since: wrong }), "since");
      await expectRefused(() => events({ limit: wrong }), "limit");
    }
    await expectRefused(() => events({ method: 7 }), "method");
    await expectRefused(() => events({ from: 1 }), "from");
  }
});

test("sessionEvents refuses what it does not take at once", async () => {
  const agent = await newVm();
  const events = (options: Untyped) => () =>
    agent.sessionEvents("01a20f17-a84e-70d6-a176-692da91130ed", options);
  await expectRefused(events({ since: -1 }), "since");
  await expectRefused(events({ follow: "yes" }), "follow");
  await expectRefused(events({ limit: 1 }), "limit");
  await expectRefused(events({ signal: {} }), "signal");
});

test("calls that return no promise refuse at once what they do not take", async () => {
  const agent = (await newVm()) as Untyped;
  for (const [call, field] of [
    [() => agent.createReadStream("a", { lenght: 1 }), "lenght"],
    [() => agent.createReadStream("a", { offset: -1 }), "offset"],
    [() => agent.createReadStream("a", { user: "nobody" }), "user"],
    [() => agent.createReadStream("a", { signal: {} }), "signal"],
    [() => agent.createReadStream("", {}), "path"],
    [() => agent.walk("a", { deep: true }), "deep"],
    [() => agent.walk("a", { recursive: "yes" }), "recursive"],
    [() => agent.walk("a", { skipUnreadable: 1 }), "skipUnreadable"],
    [() => agent.walk("a\0b"), "path"],
    [() => agent.vmWebSocket("80", "/"), "port"],
    [() => agent.on("vmBooted"), "listener"],
  ] as [() => unknown, string][]) {
    expect(call).toThrow(
      expect.objectContaining({
        code: "INVALID_ARGUMENT",
        message: expect.stringMatching(`^${field}: `),
      }),
    );
  }
});

test("what a caller's own stream fails with comes as it was thrown", async () => {
  const agent = await newVm();
  const own = new Error("own");
  const source = new Readable({ read: () => source.destroy(own) });
  await expect(agent.uploadFile(source, "f")).rejects.toBe(own);
  await agent.writeFile("f", "text");
  const destination = new Writable({ write: (_chunk, _encoding, done) => done(own) });
  await expect(agent.downloadFile("f", destination)).rejects.toBe(own);
});

test("a value that contains itself is refused, and not followed for ever", async () => {
  const agent = await newVm();
  const circle: Untyped = { type: "local" };
  circle.command = circle;
  const error = await failureOf(() => agent.createSession("pi", { mcpServers: [circle] }));
  expect(error.code).toBe("INVALID_ARGUMENT");
  expect(error.message).toMatch(/^mcpServers\[0\]\.command/);
});

test("what is undefined in an object of options is not given, as a server's name", async () => {
  const { agent, session } = await newOwnVm();
  const server: Untyped = { type: "local", name: undefined, command: "true", env: undefined };
  const id = await session({ mcpServers: [server] });
  const { mcpServers } = JSON.parse((await agent.sendPrompt(id, "opened")).text);
  expect(mcpServers).toMatchObject([{ command: "true", env: [] }]);
});

test("an option that is undefined is one that is not given", async () => {
  const agent = await newVm();
  const options: Untyped = { cwd: undefined, env: undefined, signal: undefined, stdin: undefined };
  expect((await agent.exec("pwd", options)).stdout).toBe("/home/user\n");
});

test.for(["01a20f17-a84e-70d6-a176-692da91130ed", "nonsense", "", "../../etc"])(
  "a session id that names nothing, as %j, is SESSION_NOT_FOUND",
  async (id) => {
    const agent = await newVm();
    for (const call of [
      () => agent.sendPrompt(id, "Hello"),
      () => agent.cancelPrompt(id),
      () => agent.resumeSession(id),
      () => agent.closeSession(id),
      () => agent.getSession(id),
      () => agent.setModel(id, "large"),
      () => agent.setMode(id, "code"),
      () => agent.setThoughtLevel(id, "high"),
      () => agent.setConfigOption(id, "brave", true),
      () => agent.getModes(id),
      () => agent.getConfigOptions(id),
      () => agent.rawSend(id, "_own/echo"),
      () => agent.respondPermission(id, id, "once"),
      () => agent.getEvents(id),
      () => agent.getSequencedEvents(id),
      () => agent.getSessionEvents(id),
    ]) {
      const error = await failureOf(call);
      expect(error.code).toBe("SESSION_NOT_FOUND");
      expect(error.message).toContain("listPersistedSessions()");
    }
  },
);

test("a session of another VM is none of this one", async () => {
  const { client, sessionId } = await newPiSession([]);
  const other: Agent = client.vm.getOrCreate("another");
  const error = await failureOf(() => other.sendPrompt(sessionId, "Hello"));
  expect(error.code).toBe("SESSION_NOT_FOUND");
});

test("an error has a name, a code, a message and the stack of the call", async () => {
  const agent = await newVm();
  const error = await failureOf(function readsNothing() {
    return agent.readFile("nothing");
  });
  expect(error).toBeInstanceOf(Error);
  expect(error.name).toBe("AgentVmError");
  expect(error.stack).toMatch(/^AgentVmError: .*nothing/);
  expect(error.stack).toContain("readsNothing");
});

async function expectRefused(call: () => unknown, field: string): Promise<void> {
  const error = await failureOf(call);
  expect(error).toMatchObject({ code: "INVALID_ARGUMENT" });
  expect(error.message.split(":")[0]).toBe(field);
}

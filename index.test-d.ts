import type { Duplex } from "node:stream";
import { Readable } from "node:stream";
import { expectAssignable, expectError, expectNotAssignable, expectType } from "tsd";
import {
  type AddedEvent,
  type Agent,
  type AgentEvents,
  type AgentListing,
  type AgentStoreEntry,
  AgentVmError,
  type CancelResult,
  type Client,
  type ClientOptions,
  type ConfigOption,
  type ContentBlock,
  type CreateSessionOptions,
  createClient,
  type DirectoryEntry,
  type DoctorResult,
  type ErrorCode,
  type ExecOptions,
  type ExecResult,
  type FileEvent,
  type FileIterator,
  type FileStat,
  type ImageProgress,
  type ImagePruneResult,
  type ImageRecord,
  type ImageRemoval,
  type InstallProgress,
  type JsonObject,
  type JsonRpcNotification,
  type JsonValue,
  type ListeningPort,
  type McpServer,
  type PermissionOutcome,
  type PermissionRequest,
  type PermissionResponse,
  type PersistedEvent,
  type PersistedSession,
  type ProcessEnd,
  type ProcessRecord,
  type ProcessTree,
  type PromptResult,
  type PruneResult,
  type ReadFilesResult,
  type SequencedEvent,
  type Session,
  type SessionEventIterator,
  type SessionModes,
  type SessionState,
  type Shell,
  type ShellEnd,
  type ShellRecord,
  type SpawnedProcess,
  type VmConnection,
  type VmOptions,
  type VmProcess,
  type VmRecord,
  type VmStats,
  type WriteFilesResult,
} from ".";

// Clients

expectType<Client>(createClient());
expectType<Client>(
  createClient({
    dataDir: ".agentvm",
    agentStoreDir: "/var/lib/agents",
    autoInstall: false,
    durability: "full",
    loopbackExemptPorts: [8080] as const,
    maxMessageBytes: 1 << 20,
    sleepAfterMs: 60_000,
    cancelGraceMs: 1_000,
    agents: { mybot: { command: "node", args: ["bot.js"] as const, env: { A: "1" } } },
    additionalInstructions: "Be brief.",
  }),
);
expectError(createClient(null));
expectError(createClient({ datadir: "/tmp" }));
expectNotAssignable<ClientOptions>({ durability: "maximal" });
expectNotAssignable<ClientOptions>({ loopbackExemptPorts: 80 });
expectAssignable<ClientOptions>({ sleepAfterMs: false });
expectNotAssignable<ClientOptions>({ sleepAfterMs: true });
expectNotAssignable<ClientOptions>({ agents: { mybot: "node" } });
expectNotAssignable<ClientOptions>({ agents: { mybot: { args: [] } } });
expectAssignable<ClientOptions>({ agents: { pi: { version: "0.87.0" } } });
expectNotAssignable<ClientOptions>({ agents: { pi: { version: 1 } } });

// Installed agents

const { agents } = createClient();
expectType<Promise<AgentListing>>(agents.list());
expectType<Promise<void>>(agents.install("pi"));
expectType<Promise<void>>(
  agents.install("pi@0.87.0", {
    onProgress: ({ message, done }) => {
      expectType<string>(message);
      expectType<number>(done);
    },
    signal: new AbortController().signal,
  }),
);
expectError(agents.install());
expectError(agents.install("pi", { progress: () => {} }));
expectType<Promise<AgentStoreEntry[]>>(agents.remove("pi"));
expectType<Promise<PruneResult>>(agents.prune());
expectType<Promise<PruneResult>>(agents.prune({ dryRun: true }));

// Images of the store

const { images } = createClient();
expectType<Promise<ImageRecord[]>>(images.list());
expectType<Promise<ImageRecord>>(images.pull("python:3.12"));
expectType<Promise<ImageRecord>>(
  images.pull(
    { ociLayout: "./layout", tag: "v1" },
    { onProgress: ({ step }) => expectType<ImageProgress["step"]>(step) },
  ),
);
expectError(images.pull({ rootfs: "./debian" }));
expectError(images.pull(false));
expectType<Promise<ImageRemoval>>(images.remove("python:3.12"));
expectError(images.remove({ ociLayout: "./layout" }));
expectType<Promise<ImagePruneResult>>(images.prune({ dryRun: true }));

const client = createClient();
expectType<Agent>(client.vm.getOrCreate("key"));
expectType<Agent>(client.vm.getOrCreate("key", { sleepAfterMs: false }));
expectError(client.vm.getOrCreate("key", { dataDir: ".agentvm" }));
expectType<Agent>(client.vm.getOrCreate(["a", "b"] as const));
expectError(client.vm.getOrCreate(7));
expectError(client.vm.getOrCreate());
expectType<Promise<void>>(client.close());
expectAssignable<AsyncDisposable>(client);

const agent = client.vm.getOrCreate("key");
expectType<readonly string[]>(agent.key);
expectError(agent.key.push("more"));
expectAssignable<AsyncDisposable>(agent);

// Sessions

const { signal } = new AbortController();
expectType<Promise<Session>>(agent.createSession("pi"));
expectType<Promise<Session>>(
  agent.createSession("pi", {
    env: { ANTHROPIC_API_KEY: "key" } as const,
    cwd: "/home/user/project",
    mcpServers: [
      {
        type: "local",
        command: "npx",
        args: ["-y", "@modelcontextprotocol/server-filesystem", "/home/user"],
        env: {},
      },
      {
        type: "remote",
        url: "https://mcp.example.com/sse",
        headers: { Authorization: "Bearer my-token" },
      },
    ],
    additionalInstructions: "Always write tests before implementation.",
    skipOsInstructions: true,
    permissionPolicy: "reject",
    model: "anthropic/claude-opus-4-8",
    mode: "plan",
    thoughtLevel: "high",
    persistEnv: false,
    signal,
  }),
);
expectAssignable<Parameters<Agent["createSession"]>[0]>("a name that is not known yet");
expectError(agent.createSession());
expectNotAssignable<CreateSessionOptions>({ env: { PORT: 80 } });
// What `process.env` says of a variable that may be missing.
expectNotAssignable<CreateSessionOptions>({ env: { KEY: process.env["KEY"] } });
expectAssignable<CreateSessionOptions>({ permissionPolicy: "ask" });
expectNotAssignable<CreateSessionOptions>({ permissionPolicy: "always" });
expectAssignable<McpServer>({ type: "local", name: "files", command: "files" });
expectAssignable<McpServer>({ type: "remote", url: "https://mcp.example.com", transport: "http" });
expectNotAssignable<McpServer>({ type: "local", url: "https://mcp.example.com" });
expectNotAssignable<McpServer>({ type: "remote", command: "files" });
expectNotAssignable<McpServer>({ type: "remote", url: "https://a.example", transport: "ws" });
expectNotAssignable<McpServer>({ command: "files" });
expectError(agent.createSession("pi", { evn: {} }));

expectType<Promise<PromptResult>>(agent.sendPrompt("id", "text"));
expectType<Promise<PromptResult>>(
  agent.sendPrompt("id", [{ type: "text", text: "Look at this" }] as const, { signal }),
);
expectError(agent.sendPrompt("id"));
expectError(agent.sendPrompt("id", "text", { timeoutMs: 1 }));
expectAssignable<ContentBlock>({ type: "image", data: "aGk=", mimeType: "image/png" });
expectAssignable<ContentBlock>({ type: "resource_link", uri: "file:///a", name: "a" });
expectAssignable<ContentBlock>({ type: "resource", resource: { uri: "file:///a", text: "a" } });
expectNotAssignable<ContentBlock>({ type: "image", data: "aGk=" });
expectNotAssignable<ContentBlock>({ type: "resource", resource: { uri: "file:///a" } });
expectNotAssignable<ContentBlock>({ text: "no type" });

expectType<Promise<CancelResult>>(agent.cancelPrompt("id"));
expectType<Promise<SessionState>>(agent.resumeSession("id"));
expectType<Promise<SessionState>>(
  agent.resumeSession("id", { env: { KEY: "value" }, mcpServers: [] }),
);
expectType<Promise<void>>(agent.closeSession("id"));
expectType<Promise<void>>(agent.destroySession("id"));
expectType<Promise<SessionState[]>>(agent.listSessions());
expectType<Promise<SessionState>>(agent.getSession("id"));
expectType<Promise<PersistedSession[]>>(agent.listPersistedSessions());

declare const session: PersistedSession;
expectAssignable<Session>(session);
expectType<"open" | "closed" | "suspended">(session.status);
expectType<number>(session.createdAt);
declare const state: SessionState;
expectAssignable<PersistedSession>(state);
expectType<{ turnId: string; startedAt: number } | null>(state.turn);
expectType<PermissionRequest[]>(state.pendingPermissions);
expectType<"ask" | "allow" | "reject">(state.permissionPolicy);
declare const turn: PromptResult;
expectType<string>(turn.text);
expectType<string>(turn.stopReason);

// Configuration

expectType<Promise<JsonObject>>(agent.setModel("id", "model"));
expectType<Promise<JsonObject>>(agent.setMode("id", "plan"));
expectType<Promise<JsonObject>>(agent.setThoughtLevel("id", "high"));
expectType<Promise<JsonObject>>(agent.setConfigOption("id", "brave", true));
expectType<Promise<JsonObject>>(agent.setConfigOption("id", "model", "large"));
expectError(agent.setConfigOption("id", "model", 7));
expectError(agent.setConfigOption("id", "model"));
expectError(agent.setModel("id"));
expectType<Promise<SessionModes | null>>(agent.getModes("id"));
expectType<Promise<ConfigOption[]>>(agent.getConfigOptions("id"));
declare const option: ConfigOption;
if (option.type === "boolean") {
  expectType<boolean>(option.currentValue);
} else {
  expectType<string>(option.currentValue);
}
expectType<Promise<JsonValue>>(agent.rawSend("id", "session/set_mode", { modeId: "plan" }));
expectType<Promise<JsonValue>>(agent.rawSend("id", "_mybot/ping"));
expectError(agent.rawSend("id", "_mybot/ping", ["params"]));

// Permissions

expectType<Promise<PermissionResponse>>(agent.respondPermission("id", "permission", "once"));
expectType<Promise<PermissionResponse>>(agent.respondPermission("id", "permission", "allow-7"));
expectError(agent.respondPermission("id", "permission", true));
expectError(agent.respondPermission("id", "once"));
declare const outcome: PermissionOutcome;
if (outcome.outcome === "selected") {
  expectType<string>(outcome.optionId);
}

// The event log

const query = { since: 3, method: "session/update", limit: 10 } as const;
expectType<Promise<JsonRpcNotification[]>>(agent.getEvents("id", query));
expectType<Promise<SequencedEvent[]>>(agent.getSequencedEvents("id", query));
expectType<Promise<PersistedEvent[]>>(agent.getSessionEvents("id", query));
expectError(agent.getSessionEvents("id", { since: "3" }));
expectError(agent.getEvents("id", { follow: true }));
expectType<SessionEventIterator>(agent.sessionEvents("id"));
expectError(agent.sessionEvents("id", { limit: 1 }));
expectAssignable<AsyncDisposable>(agent.sessionEvents("id"));
for await (const event of agent.sessionEvents("id", { since: 1, follow: true, signal })) {
  expectType<PersistedEvent>(event);
}
declare const persisted: PersistedEvent;
expectType<number>(persisted.seq);
expectType<JsonRpcNotification>(persisted.event);
declare const sequenced: SequencedEvent;
expectType<number>(sequenced.sequenceNumber);
expectType<JsonRpcNotification>(sequenced.notification);

declare const added: AddedEvent;
expectAssignable<JsonRpcNotification>(added);
expectAssignable<AddedEvent>(persisted.event as AddedEvent);
switch (added.method) {
  case "_agentvm/turn_start":
    expectType<string>(added.params.turnId);
    break;
  case "_agentvm/turn_end":
    expectType<string | undefined>(added.params.stopReason);
    expectType<ErrorCode | undefined>(added.params.error?.code);
    expectType<string | undefined>(added.params.interrupted?.reason);
    break;
  case "_agentvm/permission_outcome":
    expectType<"policy" | "caller" | "agentvm">(added.params.decidedBy);
    expectType<PermissionOutcome>(added.params.outcome);
    break;
  case "session/update":
    if (added.params.update.sessionUpdate === "user_message_chunk") {
      expectType<ContentBlock>(added.params.update.content);
    }
    break;
}

// Commands and files

expectType<Promise<ExecResult>>(agent.exec("ls"));
expectAssignable<ExecOptions>({
  cwd: "/tmp",
  env: { A: "1" },
  user: "root",
  stdin: new Uint8Array(1),
  timeoutMs: 1000,
  maxOutputBytes: 1024,
  signal,
});
expectAssignable<ExecOptions>({ stdin: Buffer.from("text") });
expectNotAssignable<ExecOptions>({ user: "admin" });
expectNotAssignable<ExecOptions>({ stdin: 7 });
expectError(agent.exec(["ls"]));
declare const ended: ExecResult;
expectType<number | null>(ended.exitCode);
expectType<string | null>(ended.signal);
expectType<boolean>(ended.truncated);

expectType<Promise<SpawnedProcess>>(agent.spawn("ls", ["-l"] as const, { cwd: "/tmp", signal }));
expectType<Promise<void>>(agent.writeProcessStdin(1, new Uint8Array(1)));
expectType<Promise<ProcessEnd>>(agent.waitProcess(1, { signal }));
expectType<Promise<void>>(agent.signalProcess(1, "SIGINT"));
expectType<Promise<ProcessRecord[]>>(agent.listProcesses());
expectType<Promise<VmProcess[]>>(agent.allProcesses());
expectType<Promise<ProcessTree[]>>(agent.processTree());
expectError(agent.spawn("ls", "-l"));
expectError(agent.spawn("ls", [], { shell: true }));
expectError(agent.waitProcess("1"));
agent.on("processOutput", ({ data, stream }) => {
  expectType<Uint8Array>(data);
  expectType<"stdout" | "stderr">(stream);
});
expectType<Promise<Shell>>(agent.openShell({ cols: 80, user: "root" }));
expectType<Promise<void>>(agent.writeShell("shell-1", "ls\r"));
expectType<Promise<void>>(agent.resizeShell("shell-1", { cols: 80, rows: 24 }));
expectType<Promise<ShellEnd>>(agent.waitShell("shell-1"));
expectError(agent.resizeShell("shell-1", { cols: 80 }));
expectError(agent.openShell({ shell: "zsh" }));
agent.on("shellData", ({ data }) => expectType<Uint8Array>(data));
agent.on("processExit", (end) => expectType<{ pid: number } & ProcessEnd>(end));

expectType<Promise<Response>>(agent.vmFetch(3000, "/", { method: "POST", body: "text" }));
expectType<Promise<VmConnection>>(agent.connect(3000));
expectAssignable<Promise<Duplex>>(agent.connect(3000, { signal: new AbortController().signal }));
expectType<Promise<void>>(agent.waitForPort(3000));
expectType<Promise<ListeningPort[]>>(agent.listeningPorts());
agent.vmWebSocket(3000, "/", ["a", "b"] as const).send("text");
expectError(agent.vmFetch("3000", "/"));
expectError(agent.connect(3000, { host: "example.org" }));
expectType<Promise<DoctorResult>>(client.doctor());

expectType<Promise<Uint8Array>>(agent.readFile("a", { user: "user" }));
expectType<Promise<string>>(agent.readFile("a", { encoding: "utf8", length: 2 }));
expectType<Promise<Uint8Array>>(agent.readFile("a", { encoding: "buffer" }));
expectError(agent.readFile("a", { encoding: "latin1" }));
expectType<Promise<void>>(agent.copy("a", "b", { recursive: true, overwrite: false }));
expectError(agent.copy("a"));
expectType<Promise<void>>(agent.utimes("a", { mtimeMs: Date.now() }, { followSymlinks: false }));
expectError(agent.utimes("a", { mtime: new Date() }));
expectType<Promise<void>>(agent.uploadFile(new Blob(["a"]), "a"));
expectType<Promise<ShellRecord[]>>(agent.listShells());
expectType<Promise<VmRecord[]>>(client.vm.list());
expectType<Promise<void>>(agent.writeFile("a", "text"));
expectType<Promise<void>>(agent.writeFile("a", new Uint8Array(1)));
expectError(agent.writeFile("a"));
expectError(agent.writeFile("a", new Uint16Array(1)));
expectError(agent.readFile("a", "utf8"));
expectType<Promise<Uint8Array>>(agent.readFile(new Uint8Array(1), { offset: 1, length: 2 }));
expectType<Promise<void>>(agent.writeFile("a", "", { mode: 0o755, append: true, user: "root" }));
expectType<Promise<ReadFilesResult[]>>(agent.readFiles(["a"]));
expectType<Promise<WriteFilesResult[]>>(agent.writeFiles([{ path: "a", content: "" }]));
expectError(agent.writeFiles([{ path: "a" }]));
expectType<Promise<void>>(agent.mkdir("a", { recursive: true, mode: 0o700 }));
expectType<Promise<DirectoryEntry[]>>(agent.readdir("a"));
expectType<Promise<DirectoryEntry[]>>(agent.readdirRecursive("a", { signal }));
expectType<FileIterator<DirectoryEntry>>(agent.walk("a", { recursive: false }));
expectType<Promise<FileStat>>(agent.stat("a", { followSymlinks: false }));
expectType<Promise<boolean>>(agent.exists("a"));
expectType<Promise<void>>(agent.move("a", "b", { overwrite: false }));
expectType<Promise<void>>(agent.delete("a", { recursive: true, force: true, signal }));
expectType<Promise<void>>(agent.chmod("a", 0o644));
expectType<Promise<void>>(agent.chown("a", { gid: 0 }, { user: "root" }));
expectType<Promise<void>>(agent.symlink("target", "a"));
expectType<Promise<string>>(agent.readlink("a"));
expectType<Promise<Uint8Array>>(agent.realpath("a", { encoding: "buffer" }));
expectType<Promise<void>>(agent.uploadFile("/host", "a", { mode: 0o755, signal }));
expectType<Promise<void>>(agent.uploadFile(new Blob([]).stream(), "a"));
expectType<Promise<void>>(agent.uploadFile(Readable.from([]), "a"));
expectError(agent.uploadFile(5, "a"));
expectType<Promise<void>>(agent.downloadFile("a", new URL("file:///host")));
expectType<Promise<void>>(agent.downloadFile("a", process.stdout));
expectType<Readable>(agent.createReadStream("a", { offset: 1 }));
expectType<Promise<FileIterator<FileEvent>>>(agent.watch("a", { recursive: true, signal }));
for await (const change of await agent.watch("a")) {
  if (change.type === "moved") expectType<string>(change.from);
  if (change.type !== "overflow") expectType<string>(change.path);
}

// Life

expectType<Promise<void>>(agent.sleep());
expectType<Promise<void>>(agent.wake());
expectType<Promise<void>>(agent.destroy());

// Events

expectType<() => void>(
  agent.on("sessionEvent", (value) => {
    expectType<AgentEvents["sessionEvent"]>(value);
    expectType<number>(value.sequenceNumber);
    expectType<string>(value.event.method);
  }),
);
agent.once("vmShutdown", ({ reason }) => {
  expectType<"sleep" | "destroy" | "close" | "error">(reason);
});
agent.on("vmBooted", ({ baseChanged, layersSuspect }) => {
  expectType<boolean>(baseChanged);
  expectType<boolean>(layersSuspect);
});
agent.on("permissionRequest", ({ sessionId, request }) => {
  expectType<string>(sessionId);
  expectType<PermissionRequest>(request);
  expectType<string>(request.toolName);
});
agent.on("sessionStatus", ({ status, turnId, pendingPermissions }) => {
  expectType<"open" | "closed" | "suspended" | "destroyed">(status);
  expectType<string | null>(turnId);
  expectType<number>(pendingPermissions);
});
agent.on("networkDenied", ({ host, port, protocol, rule, count }) => {
  expectType<string>(host);
  expectType<number>(port);
  expectType<"tcp" | "udp" | "dns" | "other">(protocol);
  expectType<string>(rule);
  expectType<number>(count);
});
expectType<Promise<void>>(agent.setNetwork({ default: "allowlist", allow: ["*.example.com"] }));
expectError(agent.setNetwork({ default: "private" }));
expectAssignable<VmOptions>({ network: { deny: ["10.0.0.0/8"] as const } });
agent.on("limitReached", ({ limit, detail }) => {
  expectType<"memoryBytes" | "pids" | "diskBytes" | "minFreeDiskBytes">(limit);
  expectType<string>(detail);
});
agent.on("secretMisdirected", ({ secret, host, port, place, count }) => {
  expectType<string>(secret + host);
  expectType<"header" | "url" | "plaintext">(place);
  expectType<number>(port + count);
});
createClient({ secrets: { KEY: { value: "v", hosts: ["api.example.com"], query: ["key"] } } });
client.vm.getOrCreate("vm", { secrets: {} });
expectError(createClient({ secrets: { KEY: { value: "v" } } }));
expectType<Promise<void>>(agent.setSecrets({ KEY: { value: "v", hosts: ["api.example.com"] } }));
agent.on("imageProgress", ({ image, step, bytes, totalBytes }) => {
  expectType<string>(image);
  expectType<"resolving" | "downloading" | "unpacking">(step);
  expectType<number>(bytes + totalBytes);
});
createClient({ image: "python:3.12", imageStoreDir: "/images" });
client.vm.getOrCreate("vm", { image: { ociLayout: "layout", tag: "v1" } });
client.vm.getOrCreate("vm", { image: { rootfs: "debian" } });
client.vm.getOrCreate("vm", { image: false });
expectError(client.vm.getOrCreate("vm", { image: { rootfs: "debian", tag: "v1" } }));
expectType<Promise<VmStats>>(agent.stats());
client.vm.getOrCreate("vm", { limits: { memoryBytes: 1e9, cpus: 0.5, bestEffort: true } });
expectError(client.vm.getOrCreate("vm", { limits: { memory: 1e9 } }));
client.vm.getOrCreate("vm", { mounts: [{ path: "/work", hostPath: ".", readOnly: true }] });
expectError(client.vm.getOrCreate("vm", { mounts: [{ path: "/work" }] }));
agent.on("installProgress", (progress) => expectType<InstallProgress>(progress));
agent.on("vmShutdown", async ({ reason }) => {
  await Promise.resolve(reason);
});
expectType<void>(agent.off("vmBooted", () => {}));
expectError(agent.on("sesionEvent", () => {}));
expectError(agent.on("vmBooted", ({ reason }) => reason));
expectError(agent.on("vmBooted"));

// Errors

declare const error: AgentVmError;
expectAssignable<Error>(error);
expectType<ErrorCode>(error.code);
expectAssignable<ErrorCode>("SESSION_BUSY");
expectAssignable<ErrorCode>("PERMISSION_NOT_FOUND");
expectAssignable<ErrorCode>("ENOENT");
expectNotAssignable<new () => AgentVmError>(AgentVmError);

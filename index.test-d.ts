import { expectAssignable, expectError, expectNotAssignable, expectType } from "tsd";
import {
  type Agent,
  type AgentEvents,
  AgentVmError,
  type CancelResult,
  type Client,
  type ClientOptions,
  type ContentBlock,
  type CreateSessionOptions,
  createClient,
  type ErrorCode,
  type ExecOptions,
  type ExecResult,
  type InstallProgress,
  type JsonRpcNotification,
  type PersistedEvent,
  type PersistedSession,
  type PromptResult,
  type Session,
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
  }),
);
expectError(createClient(null));
expectError(createClient({ datadir: "/tmp" }));
expectNotAssignable<ClientOptions>({ durability: "maximal" });
expectNotAssignable<ClientOptions>({ loopbackExemptPorts: 80 });

const client = createClient();
expectType<Agent>(client.vm.getOrCreate("key"));
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
    permissionPolicy: "reject",
    persistEnv: false,
    signal,
  }),
);
expectAssignable<Parameters<Agent["createSession"]>[0]>("a name that is not known yet");
expectError(agent.createSession());
expectNotAssignable<CreateSessionOptions>({ env: { PORT: 80 } });
// What `process.env` says of a variable that may be missing.
expectNotAssignable<CreateSessionOptions>({ env: { KEY: process.env["KEY"] } });
expectNotAssignable<CreateSessionOptions>({ permissionPolicy: "ask" });
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
expectType<Promise<PersistedSession>>(agent.resumeSession("id", { env: { KEY: "value" } }));
expectType<Promise<void>>(agent.closeSession("id"));
expectType<Promise<PersistedSession[]>>(agent.listPersistedSessions());
expectType<Promise<PersistedEvent[]>>(agent.getSessionEvents("id", { since: 3, limit: 10 }));
expectError(agent.getSessionEvents("id", { since: "3" }));

declare const session: PersistedSession;
expectAssignable<Session>(session);
expectType<"open" | "closed" | "suspended">(session.status);
expectType<number>(session.createdAt);
declare const turn: PromptResult;
expectType<string>(turn.text);
expectType<string>(turn.stopReason);
declare const persisted: PersistedEvent;
expectType<number>(persisted.seq);
expectType<JsonRpcNotification>(persisted.event);

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

expectType<Promise<Uint8Array>>(agent.readFile("a", { user: "user" }));
expectType<Promise<void>>(agent.writeFile("a", "text"));
expectType<Promise<void>>(agent.writeFile("a", new Uint8Array(1)));
expectError(agent.writeFile("a"));
expectError(agent.writeFile("a", new Uint16Array(1)));
expectError(agent.readFile("a", "utf8"));

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
agent.on("installProgress", (progress) => expectType<InstallProgress>(progress));
expectType<void>(agent.off("vmBooted", () => {}));
expectError(agent.on("sesionEvent", () => {}));
expectError(agent.on("vmBooted", ({ reason }) => reason));
expectError(agent.on("vmBooted"));

// Errors

declare const error: AgentVmError;
expectAssignable<Error>(error);
expectType<ErrorCode>(error.code);
expectAssignable<ErrorCode>("SESSION_BUSY");
expectAssignable<ErrorCode>("ENOENT");
expectNotAssignable<new () => AgentVmError>(AgentVmError);

// What programs may write, and what the compiler has to refuse (tsd).

import { expectAssignable, expectError, expectType } from "tsd";
import {
  type Agent,
  AgentVmError,
  type CancelResult,
  type Client,
  createClient,
  type ErrorCode,
  type ExecResult,
  type JsonRpcNotification,
  type PersistedEvent,
  type PersistedSession,
  type PromptResult,
  type Session,
} from ".";

const { signal } = new AbortController();

// Clients

expectType<Client>(createClient());
const client = createClient({
  dataDir: "/var/lib/agents",
  agentStoreDir: "/var/cache/agents",
  autoInstall: false,
  durability: "full",
  loopbackExemptPorts: [8080] as const,
  maxMessageBytes: 1024,
});
expectError(createClient({ datadir: "a mistyped name" }));
expectError(createClient({ durability: "none" }));
expectAssignable<AsyncDisposable>(client);
expectType<Promise<void>>(client.close());

// VMs

const agent = client.vm.getOrCreate(["my-agent"]);
expectType<Agent>(agent);
expectType<Agent>(client.vm.getOrCreate("my-agent"));
expectType<Agent>(client.vm.getOrCreate(["user", "project"] as const));
expectError(client.vm.getOrCreate());
expectError(client.vm.getOrCreate(7));
expectType<readonly string[]>(agent.key);
expectError(agent.key.push("another"));
expectAssignable<AsyncDisposable>(agent);
expectType<Promise<void>>(agent.wake());
expectType<Promise<void>>(agent.sleep());
expectType<Promise<void>>(agent.destroy());

// Sessions

expectType<Promise<Session>>(agent.createSession("pi"));
expectType<Promise<Session>>(
  agent.createSession("pi", {
    env: { ANTHROPIC_API_KEY: "key" },
    cwd: "/home/user/project",
    permissionPolicy: "reject",
    persistEnv: false,
    signal,
  }),
);
// A name of a later version is the business of the running one.
expectType<Promise<Session>>(agent.createSession("another-agent"));
expectError(agent.createSession());
expectError(agent.createSession("pi", { env: { KEY: undefined } }));
expectError(agent.createSession("pi", { permissionPolicy: "ask" }));
expectType<Promise<PersistedSession>>(agent.resumeSession("id", { env: {} }));
expectType<Promise<void>>(agent.closeSession("id"));
expectType<Promise<PersistedSession[]>>(agent.listPersistedSessions());
expectAssignable<Session>({} as PersistedSession);

// Turns

expectType<Promise<PromptResult>>(agent.sendPrompt("id", "Hello"));
expectType<Promise<PromptResult>>(
  agent.sendPrompt("id", [{ type: "text", text: "Hello" }] as const, { signal }),
);
expectError(agent.sendPrompt("id"));
expectError(agent.sendPrompt("id", [{ type: "text" }]));
expectError(agent.sendPrompt("id", [{ type: "resource", resource: { uri: "file:///a" } }]));
expectType<Promise<CancelResult>>(agent.cancelPrompt("id"));

// Events

expectType<() => void>(
  agent.on("sessionEvent", ({ sessionId, sequenceNumber, event }) => {
    expectType<string>(sessionId);
    expectType<number>(sequenceNumber);
    expectType<JsonRpcNotification>(event);
  }),
);
expectType<() => void>(
  agent.once("vmShutdown", ({ reason }) => {
    expectType<"sleep" | "destroy" | "close" | "error">(reason);
  }),
);
agent.on("installProgress", ({ step }) => {
  expectType<"waiting" | "runtime" | "agent">(step);
});
expectType<void>(agent.off("vmBooted", () => {}));
expectError(agent.on("sessionevent", () => {}));
expectError(agent.on("vmBooted", (value: string) => value));
expectType<Promise<PersistedEvent[]>>(agent.getSessionEvents("id", { since: 3, limit: 10 }));
expectError(agent.getSessionEvents("id", { after: 3 }));

// Commands and files

expectType<Promise<ExecResult>>(
  agent.exec("true", {
    env: { A: "b" },
    cwd: "/tmp",
    user: "root",
    stdin: new Uint8Array(),
    timeoutMs: 1000,
    maxOutputBytes: 1024,
    signal,
  }),
);
expectError(agent.exec(["true"]));
expectError(agent.exec("true", { user: "nobody" }));
expectType<Promise<Uint8Array>>(agent.readFile("notes.txt", { user: "user" }));
expectType<Promise<void>>(agent.writeFile("notes.txt", "text"));
expectType<Promise<void>>(agent.writeFile("notes.bin", new Uint8Array([1])));
expectType<Promise<void>>(agent.writeFile("notes.bin", Buffer.from("text")));
expectError(agent.writeFile("notes.txt"));
expectError(agent.writeFile("notes.txt", { text: "an object" }));

// Errors

const caught: unknown = undefined;
if (caught instanceof AgentVmError) {
  expectAssignable<Error>(caught);
  expectType<ErrorCode>(caught.code);
  expectType<unknown>(caught.data);
}

import { expect, test } from "vitest";
import { Bridge } from "../src/bridge.js";
import type { Message } from "../src/message.js";

interface Status {
  name: string;
  status: "connected" | "failed" | "pending";
  error?: string;
}

/** A bridge with an adapter that knows one session, `s`. */
function newBridge({
  statuses = [],
  modes = ["default", "plan", "auto", "bypassPermissions"],
}: {
  statuses?: Status[][];
  modes?: string[];
} = {}) {
  const session = {
    modes: { currentModeId: "auto", availableModes: modes.map((id) => ({ id })) },
    configOptions: [],
    query: {
      mcpServerStatus: async () => (statuses.length > 1 ? statuses.shift() : statuses[0]) ?? [],
    },
  };
  const sessions: Record<string, typeof session | undefined> = { s: session };
  const toAgent: Message[] = [];
  const toClient: Message[] = [];
  const arrivals = new Set<() => void>();
  const agent = {
    sessions,
    async setSessionMode({ modeId }: { modeId: string }) {
      session.modes.currentModeId = modeId;
      const update = { sessionUpdate: "config_option_update" };
      await bridge.fromAgent(notification("session/update", { sessionId: "s", update }));
      return {};
    },
    closeSession: () => {
      sessions.s = undefined;
      return Promise.resolve();
    },
  };
  const bridge = new Bridge(
    () => agent,
    (message) => {
      toClient.push(message);
      for (const arrived of arrivals) arrived();
    },
    (message) => void toAgent.push(message),
  );
  return {
    bridge,
    sessions,
    toAgent,
    toClient,
    answered: () =>
      new Promise<Message>((resolve) => {
        const check = () => {
          const answer = toClient.find(({ method }) => method === undefined);
          if (answer) resolve(answer);
        };
        arrivals.add(check);
        check();
      }),
  };
}

const request = (id: number, method: string, params: object): Message => ({
  jsonrpc: "2.0",
  id,
  method,
  params,
});

const notification = (method: string, params: object): Message => ({
  jsonrpc: "2.0",
  method,
  params,
});

const newSession = (permissionPolicy: string, mcpServers: object[] = []) =>
  request(1, "session/new", { mcpServers, _meta: { agentvm: { permissionPolicy } } });

const opened: Message = { jsonrpc: "2.0", id: 1, result: { sessionId: "s" } };

test.for([
  ["allow", "bypassPermissions"],
  ["ask", "default"],
  ["reject", "default"],
] as const)("with the policy %s a session begins in the mode %s", async ([policy, mode]) => {
  const { bridge, answered, toClient } = newBridge();
  await bridge.fromClient(newSession(policy));
  await bridge.fromAgent(opened);
  expect((await answered()).result.modes.currentModeId).toBe(mode);
  // The answer says it: no update is needed.
  expect(toClient).toHaveLength(1);
});

test("where settings forbid to bypass permissions, a session that may do all begins with asking", async () => {
  const { bridge, answered } = newBridge({ modes: ["default", "plan"] });
  await bridge.fromClient(newSession("allow"));
  await bridge.fromAgent(opened);
  expect((await answered()).result.modes.currentModeId).toBe("default");
});

test("a resumed session keeps the mode that it had", async () => {
  const { bridge, answered } = newBridge();
  await bridge.fromClient(request(1, "session/resume", { sessionId: "s" }));
  await bridge.fromAgent({ jsonrpc: "2.0", id: 1, result: {} });
  expect((await answered()).result.modes.currentModeId).toBe("auto");
});

test("a session begins when its MCP servers are connected", async () => {
  const name = "files";
  const { bridge, answered } = newBridge({
    statuses: [[{ name, status: "pending" }], [{ name, status: "connected" }]],
  });
  await bridge.fromClient(newSession("ask", [{ name }]));
  await bridge.fromAgent(opened);
  expect(await answered()).toMatchObject({ result: { sessionId: "s" } });
});

test("a session with an MCP server that can't be used does not begin", async () => {
  const { bridge, answered, sessions } = newBridge({
    statuses: [[{ name: "files", status: "failed", error: "Connection closed" }]],
  });
  await bridge.fromClient(newSession("ask", [{ name: "files" }]));
  await bridge.fromAgent(opened);
  expect((await answered()).error).toEqual({
    code: -32603,
    message: "Can't use the MCP server files: Connection closed",
    data: {
      type: "mcp_server_failed",
      server: "files",
      transport: "stdio",
      reason: "Connection closed",
    },
  });
  expect(sessions.s).toBeUndefined();
});

const failed = (api_error_status: number) =>
  notification("_claude/sdkMessage", {
    sessionId: "s",
    message: {
      type: "assistant",
      parent_tool_use_id: null,
      error: "authentication_failed",
      api_error_status,
      message: { content: [{ type: "text", text: "no such key" }] },
    },
  });

test("a prompt's error says what the model's service answered, by its status", async () => {
  const { bridge, toClient } = newBridge();
  await bridge.fromClient(request(7, "session/prompt", { sessionId: "s" }));
  await bridge.fromAgent(failed(401));
  await bridge.fromAgent({ jsonrpc: "2.0", id: 7, error: { code: -32603, message: "Internal" } });
  expect(toClient).toEqual([
    {
      jsonrpc: "2.0",
      id: 7,
      error: {
        code: -32000,
        message: "The model request failed (HTTP 401): no such key",
        data: { status: 401, type: "authentication_failed", message: "no such key" },
      },
    },
  ]);
});

test("an earlier prompt's failure is not that of a later one", async () => {
  const { bridge, toClient } = newBridge();
  await bridge.fromAgent(failed(401));
  await bridge.fromClient(request(8, "session/prompt", { sessionId: "s" }));
  const error = { code: -32603, message: "Internal" };
  await bridge.fromAgent({ jsonrpc: "2.0", id: 8, error });
  expect(toClient.at(-1)?.error).toEqual(error);
});

test("warnings are not pieces of the answer's text", async () => {
  const { bridge, toAgent } = newBridge();
  await bridge.fromClient(request(0, "initialize", { clientCapabilities: { terminal: false } }));
  expect(toAgent[0]?.params.clientCapabilities).toEqual({
    terminal: false,
    session: { notices: {} },
  });
});

test("a prompt whose session has lost its program is not answered", async () => {
  const { bridge, answered, sessions, toClient } = newBridge();
  await bridge.fromClient(newSession("ask"));
  await bridge.fromAgent(opened);
  await answered();
  await bridge.fromClient(request(7, "session/prompt", { sessionId: "s" }));
  sessions.s = undefined;
  expect(bridge.hasLost()).toBe(false);

  await bridge.fromAgent({ jsonrpc: "2.0", id: 7, error: { code: -32603, message: "It died" } });

  expect(bridge.hasLost()).toBe(true);
  expect(toClient.map(({ id }) => id)).toEqual([1]);
});

test("a session that the client has closed is not lost", async () => {
  const { bridge, answered, sessions } = newBridge();
  await bridge.fromClient(newSession("ask"));
  await bridge.fromAgent(opened);
  await answered();
  await bridge.fromClient(request(7, "session/close", { sessionId: "s" }));
  sessions.s = undefined;
  await bridge.fromAgent({ jsonrpc: "2.0", id: 7, result: {} });
  expect(bridge.hasLost()).toBe(false);
});

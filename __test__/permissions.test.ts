import type { Agent, AgentEvents, PermissionRequest } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, newOwnVm, told } from "./fixtures.js";

type Asked = AgentEvents["permissionRequest"];

const USUAL = "permission allow_once,allow_always,reject_once";

/** Answers every request the same, and keeps what was asked. */
function answering(agent: Agent, answer: string): Asked[] {
  const asked: Asked[] = [];
  agent.on("permissionRequest", async (value) => {
    asked.push(value);
    await agent.respondPermission(value.sessionId, value.request.permissionId, answer);
  });
  return asked;
}

async function pendingOf(agent: Agent, sessionId: string): Promise<PermissionRequest[]> {
  return (await agent.getSession(sessionId)).pendingPermissions;
}

/** A turn in which the agent waits for an answer, and the request. */
async function waiting() {
  const own = await newOwnVm();
  const sessionId = await own.session({ permissionPolicy: "ask" });
  const asked = told(
    own.agent,
    "sessionStatus",
    ({ pendingPermissions }) => pendingPermissions > 0,
  );
  const turn = own.agent.sendPrompt(sessionId, USUAL);
  await asked;
  const [request] = await pendingOf(own.agent, sessionId);
  if (!request) throw new Error("nothing is pending");
  return { ...own, sessionId, turn, request, permissionId: request.permissionId };
}

test("a listener is told what the agent asks, and the agent is told the answer", async () => {
  const { agent, session } = await newOwnVm();
  const asked = answering(agent, "once");
  const sessionId = await session();

  const { text } = await agent.sendPrompt(sessionId, USUAL);

  expect(text).toBe("id-allow_once");
  expect(asked).toEqual([
    {
      sessionId,
      request: {
        permissionId: expect.any(String),
        toolName: "execute",
        description: "rm -rf /",
        options: ["allow_once", "allow_always", "reject_once"].map((kind) => ({
          optionId: `id-${kind}`,
          name: kind,
          kind,
        })),
        params: expect.objectContaining({
          sessionId,
          toolCall: expect.objectContaining({ toolCallId: "t1", rawInput: { n: 1 } }),
        }),
      },
    },
  ]);
});

test.for([
  ["once", "id-allow_once"],
  ["always", "id-allow_always"],
  ["reject", "id-reject_once"],
  ["id-allow_always", "id-allow_always"],
] as const)("the answer %j chooses the option %j", async ([answer, optionId]) => {
  const { agent, sessionId, permissionId, turn } = await waiting();
  expect(await agent.respondPermission(sessionId, permissionId, answer)).toEqual({
    outcome: { outcome: "selected", optionId },
  });
  expect((await turn).text).toBe(optionId);
});

test("the first answer counts", async () => {
  const { agent, sessionId, permissionId, turn } = await waiting();
  const answers = await Promise.allSettled([
    agent.respondPermission(sessionId, permissionId, "reject"),
    agent.respondPermission(sessionId, permissionId, "once"),
  ]);
  expect(answers).toMatchObject([
    { status: "fulfilled", value: { outcome: { optionId: "id-reject_once" } } },
    { status: "rejected", reason: { code: "PERMISSION_NOT_FOUND" } },
  ]);
  expect((await turn).text).toBe("id-reject_once");
});

test("an answer that the request does not offer is refused with those that it does, and nothing is lost", async () => {
  const { agent, sessionId, permissionId, turn } = await waiting();
  const error = await failureOf(() => agent.respondPermission(sessionId, permissionId, "maybe"));
  expect(error.code).toBe("INVALID_ARGUMENT");
  expect(error.message).toContain("id-allow_once");
  await agent.respondPermission(sessionId, permissionId, "once");
  await turn;
});

test("an answer to what nobody asked is PERMISSION_NOT_FOUND", async () => {
  const { agent, session } = await newOwnVm();
  const sessionId = await session();
  for (const permissionId of ["01a20f17-a84e-70d6-a176-692da91130ed", "nonsense", ""]) {
    const error = await failureOf(() => agent.respondPermission(sessionId, permissionId, "once"));
    expect(error.code).toBe("PERMISSION_NOT_FOUND");
  }
});

test("request and outcome are in the log, with who decided", async () => {
  const { agent, sessionId, permissionId, request, turn } = await waiting();
  await agent.respondPermission(sessionId, permissionId, "once");
  await turn;

  const [asked] = await agent.getEvents(sessionId, { method: "_agentvm/permission_request" });
  expect(asked?.params).toMatchObject({ sessionId, permissionId, request: request.params });
  const [outcome] = await agent.getEvents(sessionId, { method: "_agentvm/permission_outcome" });
  expect(outcome?.params).toMatchObject({
    sessionId,
    permissionId,
    outcome: { outcome: "selected", optionId: "id-allow_once" },
    decidedBy: "caller",
    _meta: { agentvm: {} },
  });
});

test("a request that nobody listens to waits, and the next listener is told", async () => {
  const { agent, sessionId, request, turn } = await waiting();
  expect((await agent.listSessions())[0]).toMatchObject({
    sessionId,
    permissionPolicy: "ask",
    turn: { turnId: expect.any(String), startedAt: expect.any(Number) },
    pendingPermissions: [request],
  });

  let returned = false;
  const asked = await new Promise<Asked>((resolve) => {
    agent.once("permissionRequest", (value) => {
      expect(returned).toBe(true);
      resolve(value);
    });
    returned = true;
  });

  expect(asked).toEqual({ sessionId, request });
  await agent.respondPermission(sessionId, request.permissionId, "once");
  await turn;
  expect(await agent.getSession(sessionId)).toMatchObject({ turn: null, pendingPermissions: [] });
});

test("every listener is told every request once, whenever it came", async () => {
  const { agent, session } = await newOwnVm();
  const sessionId = await session({ permissionPolicy: "ask" });
  const early: string[] = [];
  const late: string[] = [];
  const last: string[] = [];
  const note = (to: string[]) => (value: Asked) => to.push(value.request.permissionId);
  agent.on("permissionRequest", note(early));
  // In the middle of the batch that brings the request, and again when it has been brought.
  agent.on("sessionEvent", ({ event }) => {
    if (event.method === "_agentvm/permission_request") agent.on("permissionRequest", noteLate);
  });
  const noteLate = note(late);
  const turn = agent.sendPrompt(sessionId, `${USUAL}\n${USUAL}`);

  const first = await told(agent, "permissionRequest");
  agent.on("permissionRequest", note(last));
  await told(agent, "permissionRequest");
  // Nothing to wait for would tell that something does not happen: a whole call in between.
  await agent.exec("true");
  expect([early, late, last]).toEqual(Array(3).fill([first.request.permissionId]));

  const { permissionId } = first.request;
  const next = told(
    agent,
    "permissionRequest",
    (value) => value.request.permissionId !== permissionId,
  );
  await agent.respondPermission(sessionId, first.request.permissionId, "once");
  const second = (await next).request.permissionId;
  await agent.respondPermission(sessionId, second, "once");
  await turn;
  const both = [first.request.permissionId, second];
  expect([early, late, last]).toEqual(Array(3).fill(both));
});

test("a once listener is told one request, though several wait", async () => {
  const { agent, session } = await newOwnVm();
  const sessions = [
    await session({ permissionPolicy: "ask" }),
    await session({ permissionPolicy: "ask" }),
  ];
  const turns: Promise<unknown>[] = [];
  for (const sessionId of sessions) {
    const asked = told(
      agent,
      "sessionStatus",
      (value) => value.sessionId === sessionId && value.pendingPermissions > 0,
    );
    turns.push(agent.sendPrompt(sessionId, USUAL));
    await asked;
  }
  const asked: Asked[] = [];
  agent.once("permissionRequest", (value) => asked.push(value));
  await agent.exec("true");
  expect(asked).toHaveLength(1);

  answering(agent, "once");
  await Promise.all(turns);
  expect(asked).toHaveLength(1);
});

test.for([
  ["allow", "id-allow_once"],
  ["reject", "id-reject_once"],
] as const)("the policy %j answers without asking", async ([permissionPolicy, outcome]) => {
  const { agent, session } = await newOwnVm();
  const asked = answering(agent, "always");
  const sessionId = await session({ permissionPolicy });
  expect((await agent.sendPrompt(sessionId, USUAL)).text).toBe(outcome);
  expect(asked).toEqual([]);
  const [event] = await agent.getEvents(sessionId, { method: "_agentvm/permission_outcome" });
  expect(event?.params).toMatchObject({ decidedBy: "policy" });
});

test("without a policy a session asks if somebody listens when it is made, and goes on to", async () => {
  const { agent, session } = await newOwnVm();
  const alone = await session();
  const off = agent.on("permissionRequest", () => {});
  const listened = await session();
  off();
  await agent.closeSession(listened);

  expect(await agent.getSession(alone)).toMatchObject({ permissionPolicy: "allow" });
  expect(await agent.getSession(listened)).toMatchObject({ permissionPolicy: "ask" });
  expect((await agent.sendPrompt(alone, USUAL)).text).toBe("id-allow_once");
  answering(agent, "reject");
  expect((await agent.sendPrompt(listened, USUAL)).text).toBe("id-reject_once");
});

test.for<[string, (agent: Agent, sessionId: string) => Promise<unknown>]>([
  ["turn", (agent, sessionId) => agent.cancelPrompt(sessionId)],
  ["session", (agent, sessionId) => agent.closeSession(sessionId)],
  ["agent", (agent) => agent.exec("pkill -KILL -x node")],
])("a request that outlives its %s ends, with a reason in the log", async ([, end]) => {
  const { agent, sessionId, permissionId, turn } = await waiting();
  const ended = turn.catch(() => {});
  await end(agent, sessionId);
  await ended;

  expect(await pendingOf(agent, sessionId)).toEqual([]);
  const error = await failureOf(() => agent.respondPermission(sessionId, permissionId, "once"));
  expect(error.code).toBe("PERMISSION_NOT_FOUND");
  const [outcome] = await agent.getEvents(sessionId, { method: "_agentvm/permission_outcome" });
  expect(outcome?.params).toMatchObject({
    permissionId,
    outcome: { outcome: "cancelled" },
    decidedBy: "agentvm",
    reason: expect.any(String),
  });
});

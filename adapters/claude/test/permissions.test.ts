import { expect, test } from "vitest";
import type { Message } from "../src/message.js";
import { Permissions } from "../src/permissions.js";

const ONCE = { optionId: "allow-once", kind: "allow_once" };
const NO = { optionId: "reject", kind: "reject_once" };
const RULE = { optionId: "allow-with-updates", kind: "allow_always" };

const asking = (id: number, command: string, options: object[] = [ONCE, NO], name = "Bash") =>
  ({
    jsonrpc: "2.0",
    id,
    method: "session/request_permission",
    params: { toolCall: { name, rawInput: { command, description: `no. ${id}` } }, options },
  }) satisfies Message;

const answering = (id: number, optionId: string): Message => ({
  jsonrpc: "2.0",
  id,
  result: { outcome: { outcome: "selected", optionId } },
});

function optionsOf(request: ReturnType<Permissions["request"]>): string[] {
  if ("answer" in request) throw new Error("it is answered");
  return request.ask.params.options.map(({ optionId }: { optionId: string }) => optionId);
}

test("a call that is always allowed is not asked about again, another is", () => {
  const permissions = new Permissions();
  expect(optionsOf(permissions.request(asking(1, "touch a")))).toEqual([
    "allow-once",
    "agentvm-always",
    "reject",
  ]);

  expect(permissions.answer(answering(1, "agentvm-always"))).toEqual(answering(1, "allow-once"));

  expect(permissions.request(asking(2, "touch a"))).toEqual({ answer: answering(2, "allow-once") });
  expect(permissions.request(asking(3, "touch b"))).toHaveProperty("ask");
});

test("what is allowed once is asked about again", () => {
  const permissions = new Permissions();
  permissions.request(asking(1, "touch a"));
  expect(permissions.answer(answering(1, "allow-once"))).toEqual(answering(1, "allow-once"));
  expect(permissions.request(asking(2, "touch a"))).toHaveProperty("ask");
});

test("a rule that Claude Code would write into the project's settings is not offered", () => {
  const permissions = new Permissions();
  const request = permissions.request(asking(1, "npm test", [ONCE, RULE, NO]));
  expect(optionsOf(request)).toEqual(["allow-once", "agentvm-always", "reject"]);
  permissions.answer(answering(1, "agentvm-always"));
  const again = permissions.request(asking(2, "npm test", [ONCE, RULE, NO]));
  expect(again).toEqual({ answer: answering(2, "allow-once") });
});

test("a rule for files, which Claude Code keeps in memory, is what is offered", () => {
  const request = new Permissions().request(asking(1, "", [ONCE, RULE, NO], "Edit"));
  expect(optionsOf(request)).toEqual(["allow-once", "allow-with-updates", "reject"]);
});

test("a tool of an MCP server is allowed with whatever input", () => {
  const permissions = new Permissions();
  permissions.request(asking(1, "a", [ONCE, RULE, NO], "mcp__files__read"));
  permissions.answer(answering(1, "agentvm-always"));
  expect(permissions.request(asking(2, "b", [ONCE, RULE, NO], "mcp__files__read"))).toHaveProperty(
    "answer",
  );
  expect(permissions.request(asking(3, "a", [ONCE, RULE, NO], "mcp__files__write"))).toHaveProperty(
    "ask",
  );
});

test("a plan is never approved for good", () => {
  const request = new Permissions().request(asking(1, "", [ONCE, NO], "ExitPlanMode"));
  expect(optionsOf(request)).toEqual(["allow-once", "reject"]);
});

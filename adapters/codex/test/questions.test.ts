import { expect, test } from "vitest";
import type { Item, Question } from "../src/codex.js";
import { Questions } from "../src/questions.js";
import type { Connection } from "../src/shared/protocol.js";
import { TurnTranslator } from "../src/translate.js";

interface Option {
  kind: string;
  name: string;
}

/** A session whose client answers "always" where it can, else "once". */
function newSession() {
  const asked: Option[][] = [];
  const connection = {
    request: (_method: string, { options }: { options: Option[] }) => {
      asked.push(options);
      const [once, always] = ["allow_once", "allow_always"];
      const optionId = options.some(({ kind }) => kind === always) ? always : once;
      return Promise.resolve({ outcome: { outcome: "selected", optionId } });
    },
  } as unknown as Connection;
  const translator = new TurnTranslator(() => {});
  const turn = { translator, signal: new AbortController().signal };
  const questions = new Questions(connection, "main", "ask");
  return {
    asked,
    /** A call begins, and its server asks about it. */
    async call(server: string, tool: string, args: object, threadId = "main") {
      const item = { type: "mcpToolCall", id: `${asked.length}`, server, tool, arguments: args };
      if (threadId === "main") {
        translator.translate({
          method: "item/started",
          params: { threadId, item: item as unknown as Item },
        });
      }
      const question = {
        method: "mcpServer/elicitation/request",
        params: {
          threadId,
          serverName: server,
          message: "",
          _meta: { codex_approval_kind: "mcp_tool_call", tool_params: args },
        },
      } as Question;
      return await questions.answer(question, turn);
    },
    async run(command: string) {
      const params = { threadId: "main", itemId: command, command };
      return await questions.answer(
        { method: "item/commandExecution/requestApproval", params },
        turn,
      );
    },
  };
}

test("always says that it is for all commands, and is", async () => {
  const { asked, run } = newSession();
  expect(await run("touch one")).toEqual({ decision: "accept" });
  expect(await run("rm two")).toEqual({ decision: "accept" });
  expect(asked.map((options) => options[1]?.name)).toEqual([
    "Always allow exec_command in this session, whatever it is called with",
  ]);
});

test("always for one tool of a server is not for one of another whose names read the same", async () => {
  const { asked, call } = newSession();
  await call("a_b", "c", { n: 1 });
  await call("a_b", "c", { n: 2 });
  expect(asked).toHaveLength(1);
  await call("a", "b_c", { n: 1 });
  expect(asked).toHaveLength(2);
});

test("there is no always for a subagent's call, of which only the server is known", async () => {
  const { asked, call } = newSession();
  await call("files", "read", {});
  for (const tool of ["read", "remove"]) await call("files", tool, {}, "subagent");
  const kinds = asked.map((options) => options.map(({ kind }) => kind));
  expect(kinds).toEqual([
    ["allow_once", "allow_always", "reject_once"],
    ["allow_once", "reject_once"],
    ["allow_once", "reject_once"],
  ]);
});

import { createRequire } from "node:module";
import * as imported from "agentvm";
import { expect, test } from "vitest";

test("the package can be imported, and required", () => {
  const required = createRequire(import.meta.url)("agentvm");
  expect(Object.keys(required).sort()).toEqual(["AgentVmError", "createClient"]);
  expect(imported.createClient).toBe(required.createClient);
});

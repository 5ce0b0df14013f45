import { createRequire } from "node:module";
import { version } from "agentvm";
import { expect, test } from "vitest";

test("the package can be imported, and required", () => {
  const required = createRequire(import.meta.url)("agentvm");
  expect(version).toMatch(/^\d+\.\d+\.\d+/);
  expect(required.version).toBe(version);
});

const { version } = require("agentvm");

test("the package works under Jest", () => {
  expect(version).toMatch(/^\d+\.\d+\.\d+/);
});

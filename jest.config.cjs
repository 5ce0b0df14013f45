// Jest runs only what shows that the package works under it, from CommonJS.

/** @type {import("jest").Config} */
module.exports = {
  roots: ["<rootDir>/__test__/jest"],
  testMatch: ["**/*.test.cjs"],
  moduleFileExtensions: ["js", "cjs", "json", "node"],
  testEnvironment: "node",
  transform: {},
  testTimeout: 60_000,
};

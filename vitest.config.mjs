import { defineConfig } from "vitest/config";

export default defineConfig({
  // The checks run the tests as a user who can't write here, too.
  cacheDir: process.env["AGENTVM_VITEST_CACHE"] ?? "target/vitest",
  test: {
    include: ["__test__/**/*.test.ts"],
    globalSetup: "__test__/agent-store.ts",
    // The package is tested as it is built: CommonJS, loaded by Node and not by Vite.
    server: { deps: { external: [/\/dist\/.*\.js$/] } },
    pool: "forks",
    maxWorkers: 2,
    retry: 0,
    allowOnly: false,
    testTimeout: 60_000,
    hookTimeout: 60_000,
    dangerouslyIgnoreUnhandledErrors: false,
    reporters: ["default"],
  },
});

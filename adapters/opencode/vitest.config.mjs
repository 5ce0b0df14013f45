import { defineConfig } from "vitest/config";

export default defineConfig({
  cacheDir: "../../target/vitest/opencode",
  test: {
    include: ["test/**/*.test.ts"],
    // Each test starts an agent process; more at once than this only slows all of them down.
    maxWorkers: 2,
    testTimeout: 60_000,
    retry: 0,
    allowOnly: false,
  },
});

import { defineConfig } from "vitest/config";

export default defineConfig({
  cacheDir: "../../target/vitest/codex",
  test: {
    include: ["test/**/*.test.ts"],
    testTimeout: 60_000,
    retry: 0,
    allowOnly: false,
  },
});

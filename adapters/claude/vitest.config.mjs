import { defineConfig } from "vitest/config";

export default defineConfig({
  cacheDir: "../../target/vitest/claude",
  test: {
    include: ["test/**/*.test.ts"],
    testTimeout: 60_000,
    retry: 0,
    allowOnly: false,
  },
});

// npm run quickstart: from a bare clone to an agent at work in a VM.

import { build, setUp } from "./build.mjs";
import { main, runNode } from "./command.mjs";

await main(async () => {
  await setUp();
  await build();
  await runNode("tsx/dist/cli.mjs", ["examples/quickstart.ts", ...process.argv.slice(2)]);
});

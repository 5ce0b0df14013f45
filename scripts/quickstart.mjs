// npm run quickstart: from a bare clone to an agent at work in a VM.

import { build, setUp } from "./build.mjs";
import { main, runNode } from "./command.mjs";

await main(async () => {
  await setUp();
  await build();
  console.log(
    "── The quickstart (examples/quickstart.ts; the first one installs Pi and its Node: some 360 MB, a minute)",
  );
  await runNode("tsx/dist/cli.mjs", ["examples/quickstart.ts", ...process.argv.slice(2)]);
});

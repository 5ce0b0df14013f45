#!/usr/bin/env node
/** Codex as an ACP agent on standard input and output. */

import { Agent } from "./agent.js";
import { serve } from "./shared/serve.js";

await serve((connection) => {
  const agent = new Agent(connection, process.env);
  // Without Codex nothing can be answered: whoever has started this starts both again.
  void agent.lost.then(async (end) => {
    process.stderr.write(`${end}\n`);
    await connection.flush();
    process.exit(1);
  });
  return agent;
});

#!/usr/bin/env node
/** Amp as an ACP agent on standard input and output. */

import { Agent } from "./agent.js";
import { serve } from "./shared/serve.js";

// Nothing but Amp's service is contacted. A newer Amp comes with a newer adapter.
process.env.AMP_SKIP_UPDATE_CHECK ??= "1";

await serve((connection) => new Agent(connection, process.env));

#!/usr/bin/env node
/** Pi as an ACP agent on standard input and output. */

import { Agent } from "./agent.js";
import { prepareEnvironment } from "./sdk.js";
import { serve } from "./shared/serve.js";

prepareEnvironment(process.env);
await serve((connection) => new Agent(connection, process.env));

export { createClient } from "./client";
export { AgentVmError } from "./errors";

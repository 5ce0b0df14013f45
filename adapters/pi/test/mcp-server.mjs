/**
 * A small MCP server on standard input and output that misbehaves on request: for what no well-behaved
 * server shows. The others are tested against `@modelcontextprotocol/server-everything`.
 *
 *     node mcp-server.mjs [noisy] [stubborn] [silent]
 */

import { spawn } from "node:child_process";
import { createInterface } from "node:readline";

const habits = process.argv.slice(2);
const schema = { type: "object", properties: {}, additionalProperties: false };
const tool = (name) => ({ name, description: `The tool ${name}`, inputSchema: schema });
let tools = ["pid", "environment", "wait", "die", "replace", "cancelled", "long"].map(tool);
const cancelled = [];

const send = (message) =>
  process.stdout.write(`${JSON.stringify({ jsonrpc: "2.0", ...message })}\n`);
const text = (value) => ({ content: [{ type: "text", text: String(value) }] });

if (habits.includes("noisy")) {
  console.log("Welcome to the noisy server!");
  console.error("noise ".repeat(100_000));
}
if (habits.includes("stubborn")) {
  process.on("SIGTERM", () => {});
  setInterval(() => {}, 1000);
}
const child = spawn("sleep", ["1000"], { stdio: "ignore" });
child.unref();

const CALLS = {
  pid: () => text(`${process.pid} ${child.pid}`),
  environment: () => text(JSON.stringify(process.env)),
  wait: () => undefined,
  die: () => {
    console.error("out of cheese");
    process.exit(3);
  },
  replace: () => {
    tools = [tool("pid"), tool("fresh")];
    send({ method: "notifications/tools/list_changed" });
    return text("replaced");
  },
  fresh: () => text("still warm"),
  long: () => text("é".repeat(100_000)),
  cancelled: () => text(`cancelled: ${cancelled.length}`),
};

const METHODS = {
  initialize: ({ protocolVersion }) => ({
    protocolVersion,
    capabilities: { tools: { listChanged: true } },
    serverInfo: { name: "test", version: "1" },
  }),
  "tools/list": () => ({ tools }),
  "tools/call": ({ name }) => CALLS[name](),
};

createInterface({ input: process.stdin }).on("line", (line) => {
  const { id, method, params } = JSON.parse(line);
  if (method === "notifications/cancelled") cancelled.push(params.requestId);
  if (id === undefined || habits.includes("silent")) return;
  const result = METHODS[method]?.(params);
  if (result !== undefined) send({ id, result });
});

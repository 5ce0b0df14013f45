// A server of the Model Context Protocol with one tool, `greet`. As a program it speaks on its stdin and
// stdout; `answer` is for a test that serves it over HTTP.

import { realpathSync } from "node:fs";
import { createInterface } from "node:readline";

/** @type {Record<string, (params: any) => unknown>} */
const methods = {
  initialize: ({ protocolVersion }) => ({
    protocolVersion,
    capabilities: { tools: {} },
    serverInfo: { name: "greeter", version: "1" },
  }),
  "tools/list": () => ({
    tools: [
      {
        name: "greet",
        description: "Greets somebody",
        inputSchema: {
          type: "object",
          properties: { name: { type: "string" } },
          required: ["name"],
        },
      },
    ],
  }),
  "tools/call": ({ arguments: { name } }) => ({
    content: [{ type: "text", text: `${process.env["GREETING"] ?? "Hello"}, ${name}!` }],
  }),
};

/** The answer to a message; undefined to a notification. @param {any} message */
export function answer({ id, method, params }) {
  if (id === undefined) return undefined;
  const handler = methods[method];
  const outcome = handler
    ? { result: handler(params) }
    : { error: { code: -32601, message: `no method ${method}` } };
  return { jsonrpc: "2.0", id, ...outcome };
}

// As the command of a package it is started by a link.
if (process.argv[1] && realpathSync(process.argv[1]) === import.meta.filename) {
  createInterface({ input: process.stdin }).on("line", (line) => {
    const reply = answer(JSON.parse(line));
    if (reply) process.stdout.write(`${JSON.stringify(reply)}\n`);
  });
}

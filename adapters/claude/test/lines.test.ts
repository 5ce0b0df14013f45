import { Readable } from "node:stream";
import { expect, test } from "vitest";
import { readMessages } from "../src/lines.js";

test("a message ends at a newline, and at no other character", async () => {
  const prompt = { jsonrpc: "2.0", method: "a", params: { text: "one\u2028two\u0085three" } };
  const next = { jsonrpc: "2.0", method: "b" };
  const text = `${JSON.stringify(prompt)}\n${JSON.stringify(next)}\n`;
  const messages = [];
  for await (const message of readMessages(Readable.from([Buffer.from(text)]))) {
    messages.push(message);
  }
  expect(messages).toEqual([prompt, next]);
});

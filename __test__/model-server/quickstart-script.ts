import type { ModelRequest, Reply } from "./reply.js";

/**
 * The model's part in the quickstart: writes a program, runs it, and says what it printed. The tool
 * calls are in the words of Pi's tools.
 */
export function quickstartScript(home = "/home/user"): (request: ModelRequest) => Reply {
  const path = `${home}/hello.js`;
  return ({ toolResults }) => {
    switch (toolResults.length) {
      case 0:
        return {
          thinking: "A one-line program will do. I write it first, then run it to be sure.",
          text: "I'll write the program and run it.",
          toolCalls: [
            {
              name: "write",
              input: { path, content: 'console.log("Hello from inside the VM");\n' },
            },
          ],
          delayMs: 20,
        };
      case 1:
        return { toolCalls: [{ name: "bash", input: { command: `node ${path}` } }], delayMs: 20 };
      default:
        return {
          text: `Done: ${path} is written, and running it printed "${toolResults.at(-1)?.trim()}".`,
          delayMs: 20,
        };
    }
  };
}

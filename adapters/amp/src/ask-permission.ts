/**
 * The program that Amp runs to decide about a tool call (`delegate` of its permissions). It passes the
 * question to the adapter, over the socket that is its argument, and ends with the answer.
 *
 * Amp gives it the call's input as JSON on standard input, and its name and id in the environment. The
 * exit code 0 allows the call; 2 rejects it, and the model is told what standard error says.
 * https://ampcode.com/manual/appendix#permissions-reference
 */

import { connect } from "node:net";
import { text } from "node:stream/consumers";

const REJECT = 2;

interface Answer {
  refusal?: string;
}

async function ask(socketPath: string): Promise<Answer> {
  const input: unknown = JSON.parse(await text(process.stdin));
  const { AGENT_TOOL_NAME: name, AGENT_TOOL_USE_ID: toolCallId } = process.env;
  const socket = connect(socketPath);
  socket.write(`${JSON.stringify({ name, toolCallId, input })}\n`);
  return JSON.parse(await text(socket)) as Answer;
}

try {
  const { refusal } = await ask(process.argv[2] ?? "");
  if (refusal !== undefined) {
    process.stderr.write(refusal);
    process.exitCode = REJECT;
  }
} catch (error) {
  process.stderr.write(`Not executed: permission could not be asked for: ${String(error)}`);
  process.exitCode = REJECT;
}

/** What agents ask a model's service beside answers: is it there, which models has it, how long is this. */

import type { ServerResponse } from "node:http";

/** Answers such a request; false to any other. */
export function answerHousekeeping(
  method: string,
  path: string,
  response: ServerResponse,
): boolean {
  if (method === "HEAD") {
    response.writeHead(200).end();
    return true;
  }
  const answer = ANSWERS.find((answer) => answer.method === method && answer.path.test(path));
  if (!answer) return false;
  response.writeHead(200, { "content-type": "application/json" });
  response.end(JSON.stringify(answer.body));
  return true;
}

const ANSWERS = [
  {
    method: "GET",
    path: /\/models$/,
    // What Anthropic and OpenAI answer, in one. No model is told: an agent takes those that it knows.
    body: { object: "list", data: [], has_more: false, first_id: null, last_id: null },
  },
  { method: "POST", path: /\/v1\/messages\/count_tokens$/, body: { input_tokens: 10 } },
];

import { expect, test } from "vitest";
import { ModelRequests, type SdkMessage } from "../src/retries.js";

const answerBegins: SdkMessage = {
  type: "stream_event",
  parent_tool_use_id: null,
  event: { type: "message_start" },
};

const answerEnds = (abandoned?: { api_message_id: string; from_block_index: number }) =>
  ({
    type: "stream_event",
    parent_tool_use_id: null,
    event: { type: "message_stop" },
    ...(abandoned && { abandoned_blocks: abandoned }),
  }) satisfies SdkMessage;

const brokeOff = answerEnds({ api_message_id: "m1", from_block_index: 0 });

const retry = (status: number | null): SdkMessage => ({
  type: "system",
  subtype: "api_retry",
  attempt: 2,
  max_retries: 10,
  retry_delay_ms: 1200,
  error_status: status,
  error: status ? "overloaded" : "unknown",
});

test("a repetition is told with what failed and how long it waits", () => {
  expect(new ModelRequests().observe(retry(529))).toEqual({
    attempt: 2,
    maxAttempts: 10,
    delayMs: 1200,
    error: { status: 529, type: "overloaded", message: "HTTP 529 (overloaded)" },
  });
});

test("the text of an answer that broke off is void once it is repeated", () => {
  const requests = new ModelRequests();
  expect(requests.observe(brokeOff)).toBeUndefined();
  expect(requests.observe(retry(null))).toMatchObject({ discardedMessageId: "m1" });
  expect(requests.observe(answerBegins)).toBeUndefined();
});

test("an answer that begins anew without a word about it is a repetition, too", () => {
  const requests = new ModelRequests();
  for (const attempt of [1, 2]) {
    requests.observe(brokeOff);
    expect(requests.observe(answerBegins)).toMatchObject({ attempt, discardedMessageId: "m1" });
  }
  requests.observe(answerEnds());
  requests.observe(brokeOff);
  expect(requests.observe(answerBegins)).toMatchObject({ attempt: 1 });
});

test("what was complete of a broken answer stands", () => {
  const requests = new ModelRequests();
  requests.observe(answerEnds({ api_message_id: "m1", from_block_index: 1 }));
  expect(requests.observe(answerBegins)).toBeUndefined();
});

test("a subagent's answers are not the session's", () => {
  const requests = new ModelRequests();
  requests.observe({ ...brokeOff, parent_tool_use_id: "call" });
  expect(requests.observe(answerBegins)).toBeUndefined();
});

test("a final failure is kept with its status and words", () => {
  const requests = new ModelRequests();
  requests.observe(brokeOff);
  const said = requests.observe({
    type: "assistant",
    parent_tool_use_id: null,
    error: "rate_limit",
    api_error_status: 429,
    message: { content: [{ type: "text", text: "slow down" }] },
  });
  expect(said).toBeUndefined();
  expect(requests.failure).toEqual({ status: 429, type: "rate_limit", message: "slow down" });
});

import { readdir } from "node:fs/promises";
import { expect, test } from "vitest";
import { startModelServer } from "../../../__test__/model-server.js";
import { Adapter, anthropic } from "./adapter.js";

function openai(server: { openaiUrl: string }) {
  return {
    ANTHROPIC_API_KEY: undefined,
    OPENAI_API_KEY: "openai-key",
    OPENAI_BASE_URL: server.openaiUrl,
  };
}

async function failedTurn(pi: Adapter) {
  const { error, result } = await pi.prompt(await pi.newSession(), "Hello");
  expect(result).toBeUndefined();
  return error;
}

test("a refused key is auth_required with the provider's own words", async () => {
  const error = { status: 401, type: "authentication_error", message: "invalid x-api-key" };
  await using server = await startModelServer({ script: [{ error }] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  expect(await failedTurn(pi)).toMatchObject({
    code: -32000,
    message: expect.stringContaining("invalid x-api-key"),
    data: { provider: "anthropic", ...error },
  });
});

test.for([
  { status: 400, type: "invalid_request_error", message: "max_tokens: too large" },
  { status: 403, type: "permission_error", message: "not with this key" },
  { status: 404, type: "not_found_error", message: "model: no-such-model" },
  { status: 429, type: "rate_limit_error", message: "slow down" },
  { status: 500, type: "api_error", message: "Internal server error" },
  { status: 529, type: "overloaded_error", message: "Overloaded" },
])("HTTP $status of Anthropic is an error of the prompt", async (error) => {
  await using server = await startModelServer({ script: [{ error }] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  expect(await failedTurn(pi)).toMatchObject({
    code: error.status === 403 ? -32000 : -32603,
    data: { provider: "anthropic", ...error },
  });
  expect(server.requests).toHaveLength(1);
});

test.for([
  { status: 401, type: "invalid_api_key", message: "Incorrect API key provided" },
  { status: 429, type: "rate_limit_exceeded", message: "Rate limit reached" },
  { status: 500, type: "server_error", message: "The server had an error" },
])("HTTP $status of OpenAI is an error of the prompt", async (error) => {
  await using server = await startModelServer({ script: [{ error }] });
  await using pi = await Adapter.start({ env: openai(server) });
  expect(await failedTurn(pi)).toMatchObject({
    code: error.status === 401 ? -32000 : -32603,
    data: { provider: "openai", ...error },
  });
});

test("an error event in the middle of a stream is an error of the prompt", async () => {
  const streamError = { type: "overloaded_error", message: "Overloaded" };
  await using server = await startModelServer({ script: [{ text: "I was", streamError }] });
  await using pi = await Adapter.start({ env: anthropic(server) });
  expect(await failedTurn(pi)).toMatchObject({ code: -32603, data: streamError });
});

test("a connection that drops in the middle of a stream is an error of the prompt", async () => {
  await using server = await startModelServer({
    script: [{ text: "I was about to say something", dropConnection: { afterChunks: 1 } }],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  expect(await failedTurn(pi)).toMatchObject({ code: -32603, data: { provider: "anthropic" } });
});

test.for<[string, string]>([
  ["broken JSON in an event", "event: content_block_delta\ndata: {{{not json\n\n"],
  ["a stream that just ends", ""],
  ["bytes that are no event stream", "<html>504 Gateway Time-out</html>\n"],
])("%s is an error of the prompt", async ([, data]) => {
  await using server = await startModelServer({
    script: [{ text: "One, two, three, four, five", malformed: { afterChunks: 1, data } }],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  expect(await failedTurn(pi)).toMatchObject({ code: -32603, data: { provider: "anthropic" } });
});

test("an empty answer with status 200 is an error of the prompt", async () => {
  await using server = await startModelServer({
    script: [{ malformed: { afterChunks: 0, data: "<html>Sign in to the Wi-Fi</html>" } }],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  expect(await failedTurn(pi)).toMatchObject({ code: -32603, data: { provider: "anthropic" } });
});

test("a service that can't be reached is an error of the prompt", async () => {
  await using pi = await Adapter.start({ env: { ANTHROPIC_BASE_URL: "http://127.0.0.1:1" } });
  expect(await failedTurn(pi)).toMatchObject({ code: -32603, data: { provider: "anthropic" } });
});

test("a session works on after a failed turn", async () => {
  await using server = await startModelServer({
    script: [
      { error: { status: 500, type: "api_error", message: "Internal server error" } },
      { text: "Better now." },
    ],
  });
  await using pi = await Adapter.start({ env: anthropic(server) });
  const sessionId = await pi.newSession();
  expect((await pi.prompt(sessionId, "Hello")).error).toBeDefined();
  expect((await pi.prompt(sessionId, "Again")).result).toEqual({ stopReason: "end_turn" });
});

test("an overload is retried and announced, and the turn succeeds", async () => {
  const error = { status: 429, type: "rate_limit_error", message: "slow down" };
  await using server = await startModelServer({ script: [{ error }, { text: "Now then." }] });
  await using pi = await Adapter.start({
    env: { ...anthropic(server), AGENTVM_MAX_RETRIES: "2", AGENTVM_RETRY_DELAY_MS: "5" },
  });
  const sessionId = await pi.newSession();
  expect((await pi.prompt(sessionId, "Hello")).result).toEqual({ stopReason: "end_turn" });

  expect(pi.messages.filter(({ method }) => method === "_agentvm/retry")).toMatchObject([
    { params: { sessionId, attempt: 1, maxAttempts: 2, delayMs: 5, error } },
  ]);
  expect(pi.textOf("agent_message_chunk")).toBe("Now then.");
});

test("a retry after a broken stream says which message is void", async () => {
  const bash = { name: "bash", input: { command: "touch ran" }, id: "t" };
  await using server = await startModelServer({
    script: [
      { text: "41", toolCalls: [bash], streamError: { type: "overloaded_error", message: "Oh" } },
      { text: "42" },
    ],
  });
  await using pi = await Adapter.start({
    env: { ...anthropic(server), AGENTVM_MAX_RETRIES: "1", AGENTVM_RETRY_DELAY_MS: "5" },
  });
  await pi.prompt(await pi.newSession(), "Hello");

  const [first, second] = pi.updatesOf("agent_message_chunk");
  expect(first).toMatchObject({ content: { text: "41" } });
  expect(second).toMatchObject({ content: { text: "42" } });
  const retry = pi.messages.find(({ method }) => method === "_agentvm/retry");
  expect(retry?.params.discardedMessageId).toBe(first.messageId);
  expect(second.messageId).not.toBe(first.messageId);
  expect(pi.updatesOf("tool_call_update")).toMatchObject([{ toolCallId: "t", status: "failed" }]);
  expect(await readdir(pi.home)).not.toContain("ran");
});

test("retries end at the limit with the last error", async () => {
  const error = { status: 529, type: "overloaded_error", message: "Overloaded" };
  await using server = await startModelServer({ script: () => ({ error }) });
  await using pi = await Adapter.start({
    env: { ...anthropic(server), AGENTVM_MAX_RETRIES: "2", AGENTVM_RETRY_DELAY_MS: "1" },
  });
  expect(await failedTurn(pi)).toMatchObject({ code: -32603, data: error });
  expect(server.requests).toHaveLength(3);
});

test("cancel ends the wait for a retry", async () => {
  const error = { status: 529, type: "overloaded_error", message: "Overloaded" };
  await using server = await startModelServer({ script: () => ({ error }) });
  await using pi = await Adapter.start({
    env: { ...anthropic(server), AGENTVM_MAX_RETRIES: "3", AGENTVM_RETRY_DELAY_MS: "60000" },
  });
  const sessionId = await pi.newSession();
  const turn = pi.prompt(sessionId, "Hello");
  await pi.message(({ method }) => method === "_agentvm/retry");
  pi.send({ method: "session/cancel", params: { sessionId } });
  expect((await turn).result).toEqual({ stopReason: "cancelled" });
});

test("without any key session/new is auth_required and names the variables", async () => {
  await using pi = await Adapter.start({ env: { ANTHROPIC_API_KEY: undefined } });
  const { error } = await pi.call("session/new", { cwd: pi.home, mcpServers: [] });
  expect(error).toMatchObject({ code: -32000, data: { type: "missing_api_key" } });
  expect(error?.message).toContain("ANTHROPIC_API_KEY or OPENAI_API_KEY");
  const files = await readdir(pi.home, { recursive: true });
  expect(files.filter((file) => file.endsWith(".jsonl"))).toEqual([]);
});

test("with an address but no key the message names that service's key", async () => {
  await using pi = await Adapter.start({
    env: { ANTHROPIC_API_KEY: undefined, OPENAI_BASE_URL: "http://127.0.0.1:1/v1" },
  });
  const { error } = await pi.call("session/new", { cwd: pi.home, mcpServers: [] });
  expect(error?.message).toBe("No API key for openai: set OPENAI_API_KEY in the session's env");
});

import { expect, test } from "vitest";
import type { TurnError } from "../src/codex.js";
import { isRefusal, modelError, readTurnError } from "../src/model-failure.js";

function read(error: Partial<TurnError>) {
  const whole = { message: "failed", codexErrorInfo: null, additionalDetails: null, ...error };
  return readTurnError(whole, "gpt");
}

test("a status is what Codex tells beside the message", () => {
  expect(read({ codexErrorInfo: { httpConnectionFailed: { httpStatusCode: 401 } } })).toEqual({
    model: "gpt",
    status: 401,
    type: "httpConnectionFailed",
    message: "failed",
  });
  const dropped = read({
    codexErrorInfo: { responseStreamDisconnected: { httpStatusCode: null } },
  });
  expect(dropped).toEqual({ model: "gpt", type: "responseStreamDisconnected", message: "failed" });
  expect(read({ codexErrorInfo: "serverOverloaded" }).type).toBe("serverOverloaded");
  expect(read({})).toEqual({ model: "gpt", message: "failed" });
});

test("a message that is the service's answer is taken apart", () => {
  const message = '{"error":{"type":"invalid_request_error","message":"Bad thing","code":null}}';
  expect(read({ message, codexErrorInfo: "other" })).toEqual({
    model: "gpt",
    type: "invalid_request_error",
    message: "Bad thing",
  });
  expect(read({ message: '"text"' }).message).toBe('"text"');
  expect(read({ message: "null" }).message).toBe("null");
});

test("what Codex says of an attempt is in the details", () => {
  const error = { message: "Reconnecting... 1/5", additionalDetails: "the connection dropped" };
  expect(read(error).message).toBe("the connection dropped");
});

test("a key that is refused is told from a service that is down", () => {
  const failure = { model: "gpt", message: "no" };
  for (const refused of [{ status: 401 }, { status: 403 }, { type: "unauthorized" }]) {
    expect(isRefusal({ ...failure, ...refused })).toBe(true);
    expect(modelError({ ...failure, ...refused }).code).toBe(-32000);
  }
  const down = modelError({ ...failure, status: 500 });
  expect(down).toMatchObject({
    code: -32603,
    message: "gpt failed (HTTP 500): no",
    data: { model: "gpt", status: 500 },
  });
});

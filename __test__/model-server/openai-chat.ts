/** OpenAI Chat Completions, streamed: https://platform.openai.com/docs/api-reference/chat */

import { chunks, type Frame, type Message, type ModelApi, textOf, toolCallId } from "./reply.js";

const FINISH_REASONS = {
  end_turn: "stop",
  max_tokens: "length",
  refusal: "content_filter",
} as const;

const ROLES: Record<string, Message["role"]> = { assistant: "model", tool: "tool" };

// biome-ignore-start lint/suspicious/noExplicitAny: request bodies are whatever the agent sent
export const openaiChat: ModelApi = {
  name: "openai-chat",
  path: /\/chat\/completions$/,

  read(body: any) {
    const system: string[] = [];
    const messages: Message[] = [];
    for (const { role, content } of body?.messages ?? []) {
      const text = textOf(content);
      if (role === "system" || role === "developer") system.push(text);
      else messages.push({ role: ROLES[role] ?? "user", text });
    }
    const toolNames = (body?.tools ?? []).map((tool: any) => tool.function?.name);
    return { system, messages, toolNames };
  },

  encode(reply, request) {
    const frames: Frame[] = [];
    const base = {
      id: `chatcmpl-${request.index}`,
      object: "chat.completion.chunk",
      created: 0,
      model: request.body?.model ?? "scripted",
    };
    const send = (delta: object, finish_reason: string | null = null, chunk = false) =>
      frames.push({
        data: `data: ${JSON.stringify({ ...base, choices: [{ index: 0, delta, finish_reason }] })}\n\n`,
        chunk,
      });

    send({ role: "assistant", content: "" });
    for (const reasoning_content of chunks(reply.thinking ?? "", reply.chunkSize)) {
      send({ reasoning_content }, null, true);
    }
    for (const content of chunks(reply.text ?? "", reply.chunkSize)) {
      send({ content }, null, true);
    }
    for (const [index, call] of (reply.toolCalls ?? []).entries()) {
      const id = toolCallId(call, index, request);
      send({
        tool_calls: [{ index, id, type: "function", function: { name: call.name, arguments: "" } }],
      });
      for (const piece of chunks(JSON.stringify(call.input), reply.chunkSize)) {
        send({ tool_calls: [{ index, function: { arguments: piece } }] }, null, true);
      }
    }
    if (reply.streamError) {
      frames.push({
        data: `data: ${JSON.stringify({ error: reply.streamError })}\n\n`,
        chunk: false,
      });
      return frames;
    }
    const finish = reply.toolCalls?.length ? "tool_calls" : "stop";
    send({}, reply.stopReason ? FINISH_REASONS[reply.stopReason] : finish);
    const usage = { prompt_tokens: 10, completion_tokens: 10, total_tokens: 20 };
    frames.push({
      data: `data: ${JSON.stringify({ ...base, choices: [], usage })}\n\n`,
      chunk: false,
    });
    frames.push({ data: "data: [DONE]\n\n", chunk: false });
    return frames;
  },

  encodeError: ({ type, message }) => ({ error: { type, message, code: type, param: null } }),
};
// biome-ignore-end lint/suspicious/noExplicitAny: see above

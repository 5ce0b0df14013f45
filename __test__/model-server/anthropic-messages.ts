/** Anthropic Messages, streamed: https://docs.anthropic.com/en/api/messages-streaming */

import { chunks, type Frame, type Message, type ModelApi, textOf, toolCallId } from "./reply.js";

// biome-ignore-start lint/suspicious/noExplicitAny: request bodies are whatever the agent sent
export const anthropicMessages: ModelApi = {
  name: "anthropic-messages",
  path: /\/v1\/messages$/,

  read(body: any) {
    const system = [textOf(body?.system)];
    const messages: Message[] = [];
    const loaded = (body?.tools ?? []).filter((tool: any) => !tool.defer_loading);
    const tools = new Set<string>(loaded.map((tool: any) => tool.name));
    for (const { role, content } of body?.messages ?? []) {
      if (role === "system") {
        system.push(textOf(content));
        for (const { type, tool } of Array.isArray(content) ? content : []) {
          if (type === "tool_addition") tools.add(tool.name);
          if (type === "tool_removal") tools.delete(tool.name);
        }
      } else if (role === "assistant") {
        messages.push({ role: "model", text: textOf(content) });
      } else {
        const parts = Array.isArray(content) ? content : [];
        const results = parts.filter((part: any) => part.type === "tool_result");
        for (const { content } of results) messages.push({ role: "tool", text: textOf(content) });
        const text = textOf(content);
        if (results.length === 0) messages.push({ role: "user", text });
        else if (text !== "") messages.push({ role: "beside", text });
      }
    }
    return { system, messages, toolNames: [...tools] };
  },

  encode(reply, request) {
    const frames: Frame[] = [];
    const send = (type: string, fields: object, chunk = false) =>
      frames.push({
        data: `event: ${type}\ndata: ${JSON.stringify({ type, ...fields })}\n\n`,
        chunk,
      });

    send("message_start", {
      message: {
        id: `msg_${request.index}`,
        type: "message",
        role: "assistant",
        model: request.body?.model ?? "scripted",
        content: [],
        stop_reason: null,
        stop_sequence: null,
        usage: { input_tokens: 10, output_tokens: 1 },
      },
    });

    let index = 0;
    const block = (start: object, deltas: object[]) => {
      send("content_block_start", { index, content_block: start });
      for (const delta of deltas) send("content_block_delta", { index, delta }, true);
      send("content_block_stop", { index });
      index += 1;
    };

    if (reply.thinking !== undefined) {
      block({ type: "thinking", thinking: "", signature: "" }, [
        ...chunks(reply.thinking, reply.chunkSize).map((thinking) => ({
          type: "thinking_delta",
          thinking,
        })),
        { type: "signature_delta", signature: "c2NyaXB0ZWQ=" },
      ]);
    }
    if (reply.text !== undefined) {
      block(
        { type: "text", text: "" },
        chunks(reply.text, reply.chunkSize).map((text) => ({ type: "text_delta", text })),
      );
    }
    for (const [position, call] of (reply.toolCalls ?? []).entries()) {
      const id = toolCallId(call, position, request);
      block(
        { type: "tool_use", id, name: call.name, input: {} },
        chunks(JSON.stringify(call.input), reply.chunkSize).map((partial_json) => ({
          type: "input_json_delta",
          partial_json,
        })),
      );
    }

    if (reply.streamError) {
      send("error", { error: reply.streamError });
      return frames;
    }
    const stopReason = reply.stopReason ?? (reply.toolCalls?.length ? "tool_use" : "end_turn");
    send("message_delta", {
      delta: { stop_reason: stopReason, stop_sequence: null },
      usage: { output_tokens: 10 },
    });
    send("message_stop", {});
    return frames;
  },

  encodeError: ({ type, message }) => ({ type: "error", error: { type, message } }),
};
// biome-ignore-end lint/suspicious/noExplicitAny: see above

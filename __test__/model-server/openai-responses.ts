/** OpenAI Responses, streamed: https://platform.openai.com/docs/api-reference/responses-streaming */

import { chunks, type Frame, type ModelApi, textOf, toolCallId } from "./reply.js";

// biome-ignore-start lint/suspicious/noExplicitAny: request bodies are whatever the agent sent
export const openaiResponses: ModelApi = {
  name: "openai-responses",
  path: /\/responses$/,

  read(body: any) {
    let userText = "";
    let toolResults: string[] = [];
    const items =
      typeof body?.input === "string" ? [{ role: "user", content: body.input }] : body?.input;
    for (const item of items ?? []) {
      if (item.type === "function_call_output") {
        toolResults.push(textOf(item.output));
      } else if (item.role === "user") {
        userText = textOf(item.content);
        toolResults = [];
      }
    }
    return { userText, toolResults, toolNames: (body?.tools ?? []).map((tool: any) => tool.name) };
  },

  encode(reply, request) {
    const frames: Frame[] = [];
    const output: object[] = [];
    let sequence_number = 0;
    const send = (type: string, fields: object, chunk = false) => {
      const event = { type, sequence_number, ...fields };
      sequence_number += 1;
      frames.push({ data: `event: ${type}\ndata: ${JSON.stringify(event)}\n\n`, chunk });
    };
    const response = (status: string, fields: object = {}) => ({
      response: {
        id: `resp_${request.index}`,
        object: "response",
        created_at: 0,
        model: request.body?.model ?? "scripted",
        status,
        output,
        error: null,
        incomplete_details: null,
        usage: null,
        ...fields,
      },
    });

    send("response.created", response("in_progress"));
    if (reply.thinking !== undefined) {
      const at = { output_index: output.length, item_id: `rs_${request.index}` };
      const item = { id: at.item_id, type: "reasoning", summary: [] as object[] };
      const part = { type: "summary_text", text: reply.thinking };
      send("response.output_item.added", { ...at, item });
      send("response.reasoning_summary_part.added", {
        ...at,
        summary_index: 0,
        part: { type: "summary_text", text: "" },
      });
      for (const delta of chunks(reply.thinking, reply.chunkSize)) {
        send("response.reasoning_summary_text.delta", { ...at, summary_index: 0, delta }, true);
      }
      send("response.reasoning_summary_part.done", { ...at, summary_index: 0, part });
      const done = { ...item, summary: [part] };
      send("response.output_item.done", { ...at, item: done });
      output.push(done);
    }
    if (reply.text !== undefined) {
      const at = { output_index: output.length, item_id: `msg_${request.index}` };
      const item = { id: at.item_id, type: "message", role: "assistant", content: [] as object[] };
      const part = { type: "output_text", text: reply.text, annotations: [] };
      send("response.output_item.added", { ...at, item: { ...item, status: "in_progress" } });
      send("response.content_part.added", {
        ...at,
        content_index: 0,
        part: { ...part, text: "" },
      });
      for (const delta of chunks(reply.text, reply.chunkSize)) {
        send("response.output_text.delta", { ...at, content_index: 0, delta }, true);
      }
      send("response.output_text.done", { ...at, content_index: 0, text: reply.text });
      send("response.content_part.done", { ...at, content_index: 0, part });
      const done = { ...item, status: "completed", content: [part] };
      send("response.output_item.done", { ...at, item: done });
      output.push(done);
    }
    for (const [position, call] of (reply.toolCalls ?? []).entries()) {
      const at = { output_index: output.length, item_id: `fc_${request.index}_${position}` };
      const item = {
        id: at.item_id,
        type: "function_call",
        call_id: toolCallId(call, position, request),
        name: call.name,
      };
      const args = JSON.stringify(call.input);
      send("response.output_item.added", {
        ...at,
        item: { ...item, arguments: "", status: "in_progress" },
      });
      for (const delta of chunks(args, reply.chunkSize)) {
        send("response.function_call_arguments.delta", { ...at, delta }, true);
      }
      send("response.function_call_arguments.done", { ...at, arguments: args });
      const done = { ...item, arguments: args, status: "completed" };
      send("response.output_item.done", { ...at, item: done });
      output.push(done);
    }

    const usage = {
      input_tokens: 10,
      output_tokens: 10,
      total_tokens: 20,
      input_tokens_details: { cached_tokens: 0 },
      output_tokens_details: { reasoning_tokens: 0 },
    };
    if (reply.streamError) {
      const { type: code, message } = reply.streamError;
      send("response.failed", response("failed", { error: { code, message } }));
    } else if (reply.stopReason === "max_tokens") {
      const incomplete_details = { reason: "max_output_tokens" };
      send("response.incomplete", response("incomplete", { incomplete_details, usage }));
    } else {
      send("response.completed", response("completed", { usage }));
    }
    return frames;
  },

  encodeError: ({ type, message }) => ({ error: { type, message, code: type, param: null } }),
};
// biome-ignore-end lint/suspicious/noExplicitAny: see above

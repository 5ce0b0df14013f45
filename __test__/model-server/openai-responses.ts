/** OpenAI Responses, streamed: https://platform.openai.com/docs/api-reference/responses-streaming */

import { chunks, type Frame, type Message, type ModelApi, textOf, toolCallId } from "./reply.js";

const KINDS = {
  function: {
    type: "function_call",
    prefix: "fc",
    input: "arguments",
    event: "function_call_arguments",
  },
  custom: {
    type: "custom_tool_call",
    prefix: "ctc",
    input: "input",
    event: "custom_tool_call_input",
  },
} as const;

// biome-ignore-start lint/suspicious/noExplicitAny: request bodies are whatever the agent sent
export const openaiResponses: ModelApi = {
  name: "openai-responses",
  path: /\/responses$/,

  read(body: any) {
    const system = [textOf(body?.instructions)];
    const messages: Message[] = [];
    const toolNames: string[] = namesOf(body?.tools);
    const items =
      typeof body?.input === "string" ? [{ role: "user", content: body.input }] : body?.input;
    for (const item of items ?? []) {
      if (item.type?.endsWith("_call_output")) {
        messages.push({ role: "tool", text: textOf(item.output) });
      } else if (item.role === "system" || item.role === "developer") {
        system.push(textOf(item.content));
      } else if (item.role === "assistant") {
        messages.push({ role: "model", text: textOf(item.content) });
      } else if (item.role === "user") {
        messages.push({ role: "user", text: textOf(item.content) });
      } else {
        // Newer models of Codex get their tools as an item of the input.
        toolNames.push(...namesOf(item.tools));
      }
    }
    return { system, messages, toolNames };
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
      const kind = KINDS[typeof call.input === "string" ? "custom" : "function"];
      const at = {
        output_index: output.length,
        item_id: `${kind.prefix}_${request.index}_${position}`,
      };
      const item = {
        id: at.item_id,
        type: kind.type,
        call_id: toolCallId(call, position, request),
        ...nameOf(call.name, request.body),
      };
      const input = typeof call.input === "string" ? call.input : JSON.stringify(call.input);
      send("response.output_item.added", {
        ...at,
        item: { ...item, [kind.input]: "", status: "in_progress" },
      });
      for (const delta of chunks(input, reply.chunkSize)) {
        send(`response.${kind.event}.delta`, { ...at, delta }, true);
      }
      send(`response.${kind.event}.done`, { ...at, [kind.input]: input });
      const done = { ...item, [kind.input]: input, status: "completed" };
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
/** A tool of a namespace is called `<namespace><tool>` here, as it would be without one. */
function namesOf(tools: any[] | undefined): string[] {
  return (tools ?? []).flatMap((tool) =>
    tool.type === "namespace"
      ? namesOf(tool.tools).map((name) => `${tool.name}${name}`)
      : (tool.name ?? tool.type),
  );
}

/** The same back again. */
function nameOf(name: string, body: any): { name: string; namespace?: string } {
  const inputs = Array.isArray(body?.input) ? body.input : [];
  const tools = [body, ...inputs].flatMap((holder: any) => holder?.tools ?? []);
  const namespace = tools.find(
    (tool: any) => tool.type === "namespace" && namesOf([tool]).includes(name),
  )?.name;
  if (namespace === undefined) return { name };
  return { namespace, name: name.slice(namespace.length) };
}
// biome-ignore-end lint/suspicious/noExplicitAny: see above

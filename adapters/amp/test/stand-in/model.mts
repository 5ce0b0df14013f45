/** One streamed request of Anthropic's Messages API. */

import type { Tool } from "./tools.mts";

export type Block =
  | { type: "text"; text: string }
  | { type: "thinking"; thinking: string; signature: string }
  | { type: "image"; source: { type: "base64"; media_type: string; data: string } }
  | { type: "tool_use"; id: string; name: string; input: Record<string, unknown> }
  | {
      type: "tool_result";
      tool_use_id: string;
      content: string | Block[];
      is_error: boolean;
    };

export interface Message {
  role: "user" | "assistant";
  content: Block[];
}

export interface Answer {
  id: string;
  content: Block[];
  stopReason: string;
  usage: { input_tokens: number; output_tokens: number; max_tokens: number };
}

export class ModelError extends Error {
  readonly status: number | undefined;
  /** Whether the service has answered at all. */
  readonly answered: boolean;

  constructor(message: string, status?: number, answered = status !== undefined) {
    super(message);
    this.status = status;
    this.answered = answered;
  }
}

/** `accepted` is called when the service has let the request in. */
export async function requestModel(
  { model, messages, tools }: { model: string; messages: Message[]; tools: Tool[] },
  accepted: () => void,
): Promise<Answer> {
  const declared = tools.map(({ name, description, inputSchema }) => ({
    name,
    description,
    input_schema: inputSchema,
  }));
  const body = { model, max_tokens: 8192, stream: true, messages, tools: declared };
  let response: Response;
  try {
    response = await fetch(`${process.env.AMP_URL}/v1/messages`, {
      method: "POST",
      headers: { "content-type": "application/json", "x-api-key": process.env.AMP_API_KEY ?? "" },
      body: JSON.stringify(body),
    });
  } catch (error) {
    throw new ModelError(String(error));
  }
  if (response.status === 401) throw new ModelError("401", 401);
  accepted();
  if (!response.ok || response.body === null) {
    throw new ModelError(`${response.status} ${await response.text()}`, response.status);
  }
  try {
    return await read(response.body);
  } catch (error) {
    if (error instanceof ModelError) throw error;
    throw new ModelError(`the answer of the model broke off: ${String(error)}`, undefined, true);
  }
}

// biome-ignore-start lint/suspicious/noExplicitAny: events of many shapes
async function read(body: ReadableStream<Uint8Array>): Promise<Answer> {
  const content: any[] = [];
  const inputs: string[] = [];
  let [id, stopReason, input, output] = ["", "", 0, 0];
  for await (const event of events(body)) {
    switch (event.type) {
      case "message_start":
        id = event.message.id;
        input = event.message.usage.input_tokens;
        break;
      case "content_block_start":
        content[event.index] = { ...event.content_block };
        inputs[event.index] = "";
        break;
      case "content_block_delta": {
        const { delta, index } = event;
        const block = content[index];
        if (delta.type === "text_delta") block.text += delta.text;
        else if (delta.type === "thinking_delta") block.thinking += delta.thinking;
        else if (delta.type === "signature_delta") block.signature = delta.signature;
        else if (delta.type === "input_json_delta") inputs[index] += delta.partial_json;
        break;
      }
      case "content_block_stop": {
        const block = content[event.index];
        if (block.type === "tool_use") block.input = JSON.parse(inputs[event.index] || "{}");
        break;
      }
      case "message_delta":
        stopReason = event.delta.stop_reason;
        output = event.usage.output_tokens;
        break;
      case "message_stop":
        return {
          id,
          content,
          stopReason,
          usage: { input_tokens: input, output_tokens: output, max_tokens: 200_000 },
        };
      case "error":
        throw new ModelError(event.error.message, undefined, true);
    }
  }
  throw new ModelError("the answer of the model broke off", undefined, true);
}

async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<any> {
  let pending = "";
  for await (const piece of body.pipeThrough(new TextDecoderStream())) {
    const frames = (pending + piece).split("\n\n");
    pending = frames.pop() ?? "";
    for (const frame of frames) {
      const data = frame.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice("data: ".length));
    }
  }
}
// biome-ignore-end lint/suspicious/noExplicitAny: see above

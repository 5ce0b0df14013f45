/** A thread as Amp exports it → the ACP updates that tell it again. */

import { ErrorCode, RpcError } from "./shared/errors.js";
import type { Block } from "./stream.js";
import type { Translator } from "./translate.js";

interface ExportedMessage {
  role: string;
  id?: string | number;
  content: (Block | ExportedResult)[] | string;
}

/** The result of a tool as it is stored, which is not as it is streamed. */
interface ExportedResult {
  type: "tool_result";
  toolUseID: string;
  output?: unknown;
  status?: string;
  run?: { status: string; result?: unknown; error?: { message?: string } | string };
}

/** `text`: the output of `amp threads export`. */
export async function replay(
  text: string,
  translator: Translator,
  drained: () => Promise<void>,
): Promise<void> {
  for (const { role, id, content } of messagesOf(text)) {
    const messageId = String(id);
    const blocks = typeof content === "string" ? content : content.map(asStreamed);
    if (role === "user") translator.replayUser(blocks, messageId);
    if (role === "assistant" && typeof blocks !== "string") {
      const message = { id: messageId, content: blocks, stop_reason: null };
      await translator.assistant({
        type: "assistant",
        session_id: "",
        message,
        parent_tool_use_id: null,
      });
    }
    await drained();
  }
  translator.abandonCalls("Interrupted");
}

function messagesOf(text: string): ExportedMessage[] {
  let thread: unknown;
  try {
    thread = JSON.parse(text);
  } catch {
    // Said below.
  }
  const { messages } = (thread ?? {}) as { messages?: unknown };
  if (Array.isArray(messages)) return messages as ExportedMessage[];
  throw new RpcError(ErrorCode.internalError, "Amp's export of the thread is not understood", {
    type: "amp_protocol",
  });
}

function asStreamed(block: Block | ExportedResult): Block {
  if (block.type !== "tool_result" || !("toolUseID" in block)) return block as Block;
  const { toolUseID, run } = block;
  const status = run?.status ?? block.status;
  const failure = typeof run?.error === "string" ? run.error : run?.error?.message;
  const result = failure ?? run?.result ?? block.output ?? status ?? "";
  return {
    type: "tool_result",
    tool_use_id: toolUseID,
    content: typeof result === "string" || isBlocks(result) ? result : JSON.stringify(result),
    is_error: status !== "done",
  };
}

function isBlocks(value: unknown): value is Block[] {
  return Array.isArray(value) && value.every((item) => typeof item?.type === "string");
}

/**
 * Claude Code repeats a model request that failed. Its adapter does not tell an ordinary client, but
 * passes on the messages of the SDK that are asked for; from these it is told.
 */

/** What is asked for: filters for `_meta.claudeCode.emitRawSDKMessages`. */
export const WATCHED = [
  { type: "system", subtype: "api_retry" },
  { type: "stream_event" },
  { type: "assistant" },
];

/** The fields that are looked into. */
export type SdkMessage =
  | {
      type: "system";
      subtype: "api_retry";
      attempt: number;
      max_retries: number;
      retry_delay_ms: number;
      /** HTTP status; null: there was no answer, or not all of it. */
      error_status: number | null;
      /** A kind, such as `overloaded`. */
      error: string;
    }
  | {
      type: "stream_event";
      /** Of a subagent's message. */
      parent_tool_use_id: string | null;
      event: { type: string };
      /** At the end of a message that broke off: its blocks from this one on are void. */
      abandoned_blocks?: { api_message_id: string; from_block_index: number };
    }
  | {
      type: "assistant";
      parent_tool_use_id: string | null;
      /** Kind of a failure that is final: the message has the words for it. */
      error?: string;
      /** HTTP status. */
      api_error_status?: number | null;
      message: { content: string | { type: string; text?: string }[] };
    };

/** Parameters of `_agentvm/retry`, without the session. */
export interface Retry {
  attempt: number;
  maxAttempts?: number;
  delayMs?: number;
  discardedMessageId?: string;
  error: { status?: number; type?: string; message: string };
}

/** A request that is not repeated any more. */
export interface Failure {
  status?: number;
  type: string;
  message: string;
}

/** What happens to the model requests of one session. */
export class ModelRequests {
  /** In the turn that is under way. */
  failure: Failure | undefined;
  /** The message that broke off, until it is known what becomes of it. */
  #abandoned: string | undefined;
  /** Repetitions since a message was complete. */
  #attempts = 0;

  /** A repetition, if the message tells one. */
  observe(message: SdkMessage): Retry | undefined {
    if (message.type === "system") {
      this.#attempts += 1;
      const { attempt, max_retries, retry_delay_ms, error_status, error } = message;
      return {
        attempt,
        maxAttempts: max_retries,
        delayMs: retry_delay_ms,
        ...this.#discarded(),
        error:
          error_status === null
            ? { type: error, message: "The connection to the model's service broke off" }
            : { status: error_status, type: error, message: `HTTP ${error_status} (${error})` },
      };
    }
    if (message.parent_tool_use_id !== null) return undefined;
    if (message.type === "assistant") {
      if (message.error !== undefined) {
        const { error, api_error_status: status } = message;
        const words = textOf(message.message.content);
        this.failure = { ...(status ? { status } : {}), type: error, message: words };
        this.#abandoned = undefined; // and its prompt fails
        return undefined;
      }
      return this.#repeated();
    }
    const { event, abandoned_blocks } = message;
    if (event.type === "message_start") return this.#repeated();
    if (event.type !== "message_stop") return undefined;
    if (abandoned_blocks === undefined) this.#attempts = 0;
    else if (abandoned_blocks.from_block_index === 0) {
      this.#abandoned = abandoned_blocks.api_message_id;
    }
    return undefined;
  }

  /** An answer begins, though the one before broke off and nothing was said of a repetition. */
  #repeated(): Retry | undefined {
    if (this.#abandoned === undefined) return undefined;
    this.#attempts += 1;
    return {
      attempt: this.#attempts,
      ...this.#discarded(),
      error: { message: "The model's answer broke off" },
    };
  }

  #discarded(): Pick<Retry, "discardedMessageId"> {
    const id = this.#abandoned;
    this.#abandoned = undefined;
    return id === undefined ? {} : { discardedMessageId: id };
  }
}

function textOf(content: string | { type: string; text?: string }[]): string {
  if (typeof content === "string") return content;
  return content.map(({ text }) => text ?? "").join("");
}

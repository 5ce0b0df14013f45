/** ACP content blocks → the input of a turn of Codex. */

import type { ContentBlock } from "./shared/acp.js";
import { promptParts } from "./shared/prompt.js";

export type Input =
  | { type: "text"; text: string; text_elements: [] }
  | { type: "image"; url: string };

export function toInput(blocks: ContentBlock[]): Input[] {
  return promptParts(blocks).map((part) =>
    part.type === "text"
      ? { type: "text", text: part.text, text_elements: [] }
      : { type: "image", url: `data:${part.mimeType};base64,${part.data}` },
  );
}

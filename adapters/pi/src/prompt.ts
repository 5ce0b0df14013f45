/** ACP content blocks → what Pi's `prompt()` takes. */

import type { PromptOptions } from "@earendil-works/pi-coding-agent";
import type { ContentBlock } from "./shared/acp.js";
import { promptParts } from "./shared/prompt.js";

type PiImage = NonNullable<PromptOptions["images"]>[number];

export interface PiPrompt {
  text: string;
  images: PiImage[];
}

export function toPiPrompt(blocks: ContentBlock[]): PiPrompt {
  const texts: string[] = [];
  const images: PiImage[] = [];
  for (const part of promptParts(blocks)) {
    if (part.type === "text") texts.push(part.text);
    else images.push(part);
  }
  return { text: texts.join("\n\n"), images };
}

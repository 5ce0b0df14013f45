/** ACP content blocks → what Pi's `prompt()` takes. */

import { fileURLToPath } from "node:url";
import type { PromptOptions } from "@earendil-works/pi-coding-agent";
import type { ContentBlock, EmbeddedResource } from "./acp.js";
import { invalidParams } from "./errors.js";

type PiImage = NonNullable<PromptOptions["images"]>[number];

export interface PiPrompt {
  text: string;
  images: PiImage[];
}

export function toPiPrompt(blocks: ContentBlock[]): PiPrompt {
  const texts: string[] = [];
  const images: PiImage[] = [];
  for (const block of blocks) {
    switch (block.type) {
      case "text":
        texts.push(block.text);
        break;
      case "image":
        images.push({ type: "image", data: block.data, mimeType: block.mimeType });
        break;
      case "resource_link":
        texts.push(`[${block.name}](${pathOrUri(block.uri)})`);
        break;
      case "resource":
        addResource(block.resource, texts, images);
        break;
      case "audio":
        throw invalidParams("prompt: audio is not supported (see promptCapabilities)");
    }
  }
  return { text: texts.join("\n\n"), images };
}

function addResource(resource: EmbeddedResource, texts: string[], images: PiImage[]): void {
  if ("text" in resource) {
    texts.push(`<resource uri="${resource.uri}">\n${resource.text}\n</resource>`);
  } else if (resource.mimeType?.startsWith("image/")) {
    images.push({ type: "image", data: resource.blob, mimeType: resource.mimeType });
  } else {
    throw invalidParams(`prompt: the resource ${resource.uri} is neither text nor an image`);
  }
}

/** The model's tools take paths. */
function pathOrUri(uri: string): string {
  if (!uri.startsWith("file:")) return uri;
  try {
    return fileURLToPath(uri);
  } catch {
    return uri; // a file on another host: the model sees what the client wrote
  }
}

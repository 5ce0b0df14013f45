/** ACP content blocks → the text and the images that agents take. */

import { fileURLToPath } from "node:url";
import type { ContentBlock, EmbeddedResource } from "./acp.js";
import { invalidParams } from "./errors.js";

export type PromptPart =
  | { type: "text"; text: string }
  | { type: "image"; data: string; mimeType: string };

export function promptParts(blocks: ContentBlock[]): PromptPart[] {
  return blocks.map(promptPart);
}

function promptPart(block: ContentBlock): PromptPart {
  switch (block.type) {
    case "text":
      return { type: "text", text: block.text };
    case "image":
      return { type: "image", data: block.data, mimeType: block.mimeType };
    case "resource_link":
      return { type: "text", text: `[${block.name}](${pathOrUri(block.uri)})` };
    case "resource":
      return resourcePart(block.resource);
    case "audio":
      throw invalidParams("prompt: audio is not supported (see promptCapabilities)");
  }
}

function resourcePart(resource: EmbeddedResource): PromptPart {
  const { uri, mimeType } = resource;
  if ("text" in resource) {
    return { type: "text", text: `<resource uri="${uri}">\n${resource.text}\n</resource>` };
  }
  if (mimeType?.startsWith("image/")) return { type: "image", data: resource.blob, mimeType };
  throw invalidParams(`prompt: the resource ${uri} is neither text nor an image`);
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

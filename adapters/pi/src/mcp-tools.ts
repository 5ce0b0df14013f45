/** Tools of MCP servers as Pi has them: names, schemas, results. */

import { createHash, randomUUID } from "node:crypto";
import { writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { ToolDefinition } from "@earendil-works/pi-coding-agent";
import type { CallToolResult, ContentBlock, Tool } from "@modelcontextprotocol/client";
import type { PiToolResult } from "./tools.js";

/** The most text that a tool of Pi gives to the model. */
const MAX_TEXT_BYTES = 50 * 1024;

/** The longest name that every model API takes. */
const MAX_NAME = 64;

/**
 * `<server>_<tool>`, in which everything but letters, digits, `_` and `-` has become `_`. A name that
 * is too long or taken already ends in a hash of the two names, so that it is the same every time.
 */
export function toolName(server: string, tool: string, taken: ReadonlySet<string>): string {
  const plain = `${server}_${tool}`.replace(/[^A-Za-z0-9_-]/g, "_").replace(/^(?=[^A-Za-z_])/, "_");
  if (plain.length <= MAX_NAME && !taken.has(plain)) return plain;
  const hash = createHash("sha256").update(`${server}\0${tool}`).digest("hex").slice(0, 8);
  return `${plain.slice(0, MAX_NAME - hash.length - 1)}_${hash}`;
}

/** The server's JSON Schema, as strict model APIs want it. */
export function toolParameters({ inputSchema }: Tool): ToolDefinition["parameters"] {
  const { $schema: _, ...schema } = inputSchema;
  return { properties: {}, ...schema } as ToolDefinition["parameters"];
}

/**
 * Bounds a text for the model as Pi's own tools do theirs: the rest can be read from a file, whose
 * path the model is told.
 */
async function bounded(text: string): Promise<string> {
  const bytes = Buffer.from(text);
  if (bytes.length <= MAX_TEXT_BYTES) return text;
  const path = join(tmpdir(), `pi-mcp-${randomUUID()}.txt`);
  await writeFile(path, bytes, { flag: "wx", mode: 0o600 });
  // In streaming mode the decoder leaves out a character that the cut has split.
  const head = new TextDecoder().decode(bytes.subarray(0, MAX_TEXT_BYTES), { stream: true });
  return `${head}\n\n[The first ${MAX_TEXT_BYTES} of ${bytes.length} bytes. All of it is in ${path}]`;
}

/** Throws what the server reports as an error: that is how Pi's tools fail. */
export async function toPiResult(result: CallToolResult): Promise<Required<PiToolResult>> {
  const content = result.content.flatMap(toPiContent);
  const structured = result.structuredContent;
  // A server should have put it into a text as well.
  if (structured !== undefined && !content.some(({ type }) => type === "text")) {
    content.push({ type: "text", text: JSON.stringify(structured) });
  }
  for (const part of content) {
    if (part.type === "text") part.text = await bounded(part.text);
  }
  if (result.isError) {
    const texts = content.map((part) => (part.type === "text" ? part.text : `[${part.mimeType}]`));
    throw new Error(texts.join("\n") || "The tool failed and did not say why");
  }
  return { content, details: structured === undefined ? {} : { structuredContent: structured } };
}

function toPiContent(block: ContentBlock): NonNullable<PiToolResult["content"]> {
  switch (block.type) {
    case "text":
      return [{ type: "text", text: block.text }];
    case "image":
      return [{ type: "image", data: block.data, mimeType: block.mimeType }];
    case "audio":
      return [{ type: "text", text: `[audio, ${block.mimeType}: can't be shown to the model]` }];
    case "resource_link":
      return [{ type: "text", text: `[${block.title ?? block.name}](${block.uri})` }];
    case "resource": {
      const { uri, mimeType = "application/octet-stream" } = block.resource;
      if ("text" in block.resource) {
        return [
          { type: "text", text: `<resource uri="${uri}">\n${block.resource.text}\n</resource>` },
        ];
      }
      if (mimeType.startsWith("image/")) {
        return [{ type: "image", data: block.resource.blob, mimeType }];
      }
      return [
        { type: "text", text: `[resource ${uri}, ${mimeType}: can't be shown to the model]` },
      ];
    }
    default:
      return [];
  }
}

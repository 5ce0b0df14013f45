/** OpenCode's configuration files: JSON with comments and trailing commas. */

export type Json = Record<string, unknown>;

/** The object that the text holds; throws `SyntaxError` if it holds none. */
export function parseJsonc(text: string): Json {
  const value: unknown = JSON.parse(strictJson(text));
  const object = asObject(value);
  if (object === undefined) throw new SyntaxError("not a JSON object");
  return object;
}

export function asObject(value: unknown): Json | undefined {
  return typeof value === "object" && value !== null && !Array.isArray(value)
    ? (value as Json)
    : undefined;
}

const COMMENT = /\/\/[^\n]*|\/\*(?:[^*]|\*(?!\/))*\*\//.source;

/** A string, a comment, or a comma that nothing follows: strings come first, and so hide the rest. */
const TOKENS = new RegExp(
  String.raw`"(?:[^"\\]|\\.)*"|${COMMENT}|,(?=(?:\s|${COMMENT})*[}\]])`,
  "g",
);

function strictJson(text: string): string {
  return text.replace(TOKENS, (token) => (token.startsWith('"') ? token : ""));
}

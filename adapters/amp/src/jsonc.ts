/** JSON with comments and trailing commas, as Amp reads its settings. */

/** A string, which may hold anything, a comment, or a comma before a closing bracket. */
const TOKENS =
  /"(?:\\.|[^"\\])*"|\/\/[^\n]*|\/\*[\s\S]*?\*\/|,(?=(?:\s|\/\/[^\n]*|\/\*[\s\S]*?\*\/)*[}\]])/g;

/** Throws as `JSON.parse` does. */
export function parseJsonc(text: string): unknown {
  const withoutMark = text.replace(/^\uFEFF/, "");
  return JSON.parse(withoutMark.replace(TOKENS, (token) => (token.startsWith('"') ? token : " ")));
}

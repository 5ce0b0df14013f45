import { readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { expect, test } from "vitest";
import { ROOT } from "../fixtures.js";

const read = (path: string) => readFileSync(join(ROOT, path), "utf8");

/** A link in the table of attacks: a test's name, and its file. */
const LINK = /\[`([^`]+)`\]\(([^)]+)\)/g;

test("each attack in SECURITY.md has tests that there are", () => {
  const table = read("SECURITY.md")
    .split("\n## ")
    .find((section) => section.startsWith("Attacks"));
  const rows = (table ?? "").split("\n").filter((line) => line.startsWith("| "));
  expect(rows.length).toBeGreaterThan(20);
  for (const row of rows.slice(2)) {
    const tests = [...row.matchAll(LINK)];
    expect(tests, row).not.toEqual([]);
    for (const [_, name = "", file = ""] of tests) {
      // Vitest's, Rust's, or a fuzz target.
      const forms = [`"${name}"`, `fn ${name}()`];
      const isThere =
        forms.some((form) => read(file).includes(form)) || basename(file) === `${name}.rs`;
      expect(isThere, `${name} in ${file}`).toBe(true);
    }
  }
});

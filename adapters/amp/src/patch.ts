/** The patch format of `apply_patch`, as far as a client is shown it. */

export interface FileChange {
  path: string;
  passages: Passage[];
}

/** `oldText` is null for a file that is new. */
export interface Passage {
  oldText: string | null;
  newText: string;
}

const HEADER = /^\*\*\* (Add|Update|Delete) File: (.+)$/;

/**
 * `*** Add File`, `*** Update File` (in passages that begin with `@@`) and `*** Delete File`, between
 * `*** Begin Patch` and `*** End Patch`. Whether a patch is right is for Amp to say.
 */
export function parsePatch(patch: string): FileChange[] {
  const changes: FileChange[] = [];
  let adds = false;
  let change: FileChange | undefined;
  let passage: { old: string[]; new: string[] } | undefined;

  const endPassage = () => {
    if (change && passage && passage.old.length + passage.new.length > 0) {
      const oldText = adds ? null : text(passage.old);
      change.passages.push({ oldText, newText: text(passage.new) });
    }
    passage = undefined;
  };
  for (const line of patch.split(/\r?\n/)) {
    const header = HEADER.exec(line);
    if (header) {
      endPassage();
      adds = header[1] === "Add";
      change = { path: (header[2] as string).trim(), passages: [] };
      changes.push(change);
    } else if (line.startsWith("@@") || line.startsWith("*** ")) {
      endPassage();
    } else if (change) {
      passage ??= { old: [], new: [] };
      const content = line.slice(1);
      if (!line.startsWith("+")) passage.old.push(content);
      if (!line.startsWith("-")) passage.new.push(content);
    }
  }
  return changes;
}

function text(lines: string[]): string {
  return lines.map((line) => `${line}\n`).join("");
}

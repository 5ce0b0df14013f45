/** How the commands of `agentvm` print. */

export const print = (line: string) => process.stdout.write(`${line}\n`);
export const tell = (line: string) => process.stderr.write(`${line}\n`);

export const size = (bytes: number) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

export const sum = (entries: readonly { bytes: number }[]) =>
  entries.reduce((bytes, entry) => bytes + entry.bytes, 0);

export const time = (at: number) => new Date(at).toISOString().slice(0, 19).replace("T", " ");

/** One line for each step, which changes on a terminal; elsewhere a line for each message. */
export function progressLine(): (progress: { message: string; step: string }) => void {
  let last = "";
  return ({ message, step }) => {
    if (process.stderr.isTTY) {
      process.stderr.write(`${step === last ? "\r\x1b[K" : "\n"}${message}`);
    } else {
      tell(message);
    }
    last = step;
  };
}

export function table(rows: string[][]): void {
  const widths = rows.reduce<number[]>(
    (widths, row) => row.map((cell, column) => Math.max(widths[column] ?? 0, cell.length)),
    [],
  );
  for (const row of rows) {
    print(
      row
        .map((cell, column) => cell.padEnd(widths[column] ?? 0))
        .join("  ")
        .trimEnd(),
    );
  }
}

// How results are shown: a table for people, JSON for programs.

import { cpus, release, totalmem } from "node:os";
import type { Comparison } from "./measure";

export interface Machine {
  cpu: string;
  cores: number;
  memoryGiB: number;
  kernel: string;
  node: string;
  uid: number;
  date: string;
}

export function machine(): Machine {
  const cores = cpus();
  return {
    cpu: cores[0]?.model ?? "unknown",
    cores: cores.length,
    memoryGiB: Math.round(totalmem() / 2 ** 30),
    kernel: release(),
    node: process.version,
    uid: process.getuid?.() ?? -1,
    date: new Date().toISOString(),
  };
}

export function describe({ cpu, cores, memoryGiB, kernel, node, uid }: Machine): string {
  const who = uid === 0 ? "root" : `ordinary user (uid ${uid})`;
  return `${cores} × ${cpu}, ${memoryGiB} GiB, Linux ${kernel}, Node ${node}, as ${who}`;
}

/** A Markdown table: it reads well in a terminal too, and can be pasted. */
export function table({ title, goal, unit, rows, load }: Comparison): string {
  const [before, after] = load.map((value) => value.toFixed(2));
  const cells = [
    ["", "n", `p50 ${unit}`, `p95 ${unit}`, `p99 ${unit}`, "× baseline p50", "× p99"],
    ...rows.map(({ name, n, p50, p95, p99, ratio }) => [
      name,
      String(n),
      ...[p50, p95, p99].map(number),
      ratio ? ratio.p50.toFixed(2) + interval(ratio.interval) : "–",
      ratio ? ratio.p99.toFixed(2) : "–",
    ]),
  ];
  const widths = (cells[0] ?? []).map((_, column) =>
    Math.max(...cells.map((row) => (row[column] ?? "").length)),
  );
  const line = (row: string[]) =>
    `| ${row.map((cell, column) => (column === 0 ? cell.padEnd(widths[0] ?? 0) : cell.padStart(widths[column] ?? 0))).join(" | ")} |`;
  const rule = `|${widths.map((width, column) => (column === 0 ? "-".repeat(width + 2) : `${"-".repeat(width + 1)}:`)).join("|")}|`;
  const [head = [], ...body] = cells;
  return [
    `### ${title}`,
    "",
    line(head),
    rule,
    ...body.map(line),
    "",
    `${goal ? `Goal: ${goal}. ` : ""}Load average ${before} before, ${after} after.`,
    "",
  ].join("\n");
}

function interval(ends: readonly [number, number] | undefined): string {
  return ends ? ` (${ends.map((end) => end.toFixed(2)).join("–")})` : "";
}

function number(value: number): string {
  if (value >= 100) return value.toFixed(0);
  return value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

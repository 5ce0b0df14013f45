// Competitors that take turns in one run, and what their times come to.

import { loadavg } from "node:os";
import { setTimeout } from "node:timers/promises";

/** One way of doing the thing that is measured. */
export interface Competitor {
  name: string;
  /**
   * Does it once. Resolves to the milliseconds it took: what prepares it does not count. Several, if
   * it was several things.
   */
  run(turn: number): Promise<number | readonly number[]>;
}

export interface Comparison {
  title: string;
  /** What the first row is to be held against. */
  goal?: string;
  unit: string;
  rows: Row[];
  /** One-minute load averages before and after. */
  load: [number, number];
}

export interface Row {
  name: string;
  n: number;
  p50: number;
  p95: number;
  p99: number;
  /** This row divided by the baseline's, of the same run. */
  ratio?: { p50: number; p99: number };
}

/** Turns before the first that counts: caches fill, the JIT compiles. */
const WARM_UP = 3;

/**
 * Before each measurement, whoever's it is. The kernel takes network namespaces down in the
 * background, under the lock that a new one needs: nobody is to pay for another's.
 */
const SETTLE_MS = 30;

/**
 * Measures competitors in turn, each round in a random order, so that what the machine does meanwhile
 * hits all of them alike.
 *
 * @param baseline name of the competitor that the others are divided by
 */
export async function compare(
  {
    title,
    goal,
    baseline,
    unit = "ms",
  }: { title: string; goal?: string; baseline: string; unit?: string },
  competitors: readonly Competitor[],
  turns: number,
): Promise<Comparison> {
  const before = loadavg()[0] ?? 0;
  const times = new Map(competitors.map(({ name }) => [name, [] as number[]]));
  for (let turn = -WARM_UP; turn < turns; turn += 1) {
    for (const competitor of shuffled(competitors)) {
      await setTimeout(SETTLE_MS);
      const time = await competitor.run(turn);
      if (turn >= 0) times.get(competitor.name)?.push(...[time].flat());
    }
  }
  const rows = competitors.map(({ name }) => summarise(name, times.get(name) ?? []));
  return {
    title,
    ...(goal && { goal }),
    unit,
    rows: withRatios(rows, baseline),
    load: [before, loadavg()[0] ?? 0],
  };
}

function shuffled<T>(items: readonly T[]): T[] {
  const keyed = items.map((item) => ({ item, key: Math.random() }));
  return keyed.sort((a, b) => a.key - b.key).map(({ item }) => item);
}

export function summarise(name: string, values: readonly number[]): Row {
  const sorted = values.toSorted((a, b) => a - b);
  const [p50, p95, p99] = [0.5, 0.95, 0.99].map((quantile) => nearestRank(sorted, quantile));
  return { name, n: sorted.length, p50: p50 ?? 0, p95: p95 ?? 0, p99: p99 ?? 0 };
}

function nearestRank(sorted: readonly number[], quantile: number): number {
  return sorted[Math.max(0, Math.ceil(sorted.length * quantile) - 1)] ?? 0;
}

export function withRatios(rows: readonly Row[], baseline: string): Row[] {
  const base = rows.find(({ name }) => name === baseline);
  return rows.map((row) =>
    base === undefined || row === base
      ? row
      : { ...row, ratio: { p50: row.p50 / base.p50, p99: row.p99 / base.p99 } },
  );
}

/** Milliseconds that it takes. */
export async function timed(run: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await run();
  return performance.now() - start;
}

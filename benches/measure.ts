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
  ratio?: {
    p50: number;
    p99: number;
    /** Of the median of the ratios of each turn, with 95 % confidence; if turns were paired. */
    interval?: readonly [number, number];
  };
}

/** Turns before the first that counts: caches fill, the JIT compiles. */
const WARM_UP = 3;

/**
 * Before each measurement, whoever's it is. The kernel takes network namespaces down in the
 * background, under the lock that a new one needs: nobody is to pay for another's.
 */
const SETTLE_MS = 30;

/** Of things that are measured one after the other, without a pause. */
const IN_A_ROW = 20;

/**
 * Measures competitors in turn, each round in a random order, so that what the machine does meanwhile
 * hits all of them alike.
 *
 * @param baseline name of the competitor that the others are divided by
 * @param paired whether to tell how sure the ratios are: for long work, of which there are few turns.
 *   Each run is then one time
 */
export async function compare(
  {
    title,
    goal,
    baseline,
    unit = "ms",
    paired = false,
  }: { title: string; goal?: string; baseline: string; unit?: string; paired?: boolean },
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
  const rows = withRatios(
    competitors.map(({ name }) => summarise(name, times.get(name) ?? [])),
    baseline,
  );
  if (paired) {
    const base = times.get(baseline) ?? [];
    for (const { name, ratio } of rows) {
      if (ratio) ratio.interval = medianInterval(times.get(name) ?? [], base);
    }
  }
  return {
    title,
    ...(goal && { goal }),
    unit,
    rows,
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

/**
 * Where the median of `values[i] / base[i]` is with 95 % confidence, whatever their distribution: between
 * the order statistics that the binomial distribution (n, ½) leaves 2.5 % beyond, each.
 */
export function medianInterval(
  values: readonly number[],
  base: readonly number[],
): readonly [number, number] {
  const ratios = values.map((value, turn) => value / (base[turn] ?? Number.NaN));
  ratios.sort((a, b) => a - b);
  const rank = Math.max(0, Math.floor(ratios.length / 2 - 0.98 * Math.sqrt(ratios.length)));
  return [ratios.at(rank) ?? Number.NaN, ratios.at(-1 - rank) ?? Number.NaN];
}

/** Milliseconds that it takes. */
export async function timed(run: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await run();
  return performance.now() - start;
}

/** The same of each of a few that follow each other at once, as a program in a loop does them. */
export async function timedInARow(run: () => Promise<unknown>): Promise<number[]> {
  const times: number[] = [];
  for (let i = 0; i < IN_A_ROW; i += 1) times.push(await timed(run));
  return times;
}

import { setTimeout } from "node:timers/promises";
import type { Agent, FileEvent, FileIterator } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, newVm, told } from "./fixtures.js";

/** The events until one that the test makes last. */
async function until(changes: FileIterator<FileEvent>, last: string): Promise<string[]> {
  const told: string[] = [];
  for (;;) {
    const { value, done } = await changes.next();
    expect(done).toBeFalsy();
    if (value === undefined) return told;
    if (value.type === "overflow") told.push("overflow");
    else if (value.path === last) return told;
    else if (value.type === "moved") told.push(`moved ${value.from} ${value.path}`);
    else told.push(`${value.type} ${value.path}`);
  }
}

const run = async (agent: Agent, command: string) =>
  expect((await agent.exec(command)).exitCode).toBe(0);

test("what happens in a directory is told in order, a move as one", async () => {
  const agent = await newVm();
  await agent.mkdir("w/d", { recursive: true });
  await using changes = await agent.watch("w", { recursive: true });
  await run(agent, "cd w; mkfifo d/a; mv d/a b; mv d e; rm b; mkfifo e/c; mkfifo end");
  expect(await until(changes, "w/end")).toEqual([
    "created w/d/a",
    "moved w/d/a w/b",
    "moved w/d w/e",
    "deleted w/b",
    "created w/e/c",
  ]);
});

test("what is in a directory that appears is told, each once", async () => {
  const agent = await newVm();
  await run(agent, "mkdir -p w o/d; touch o/f o/d/g");
  await using changes = await agent.watch("w", { recursive: true });
  const made =
    "i=0; while [ $i -lt 100 ]; do mkdir -p n/$i/a/b; touch n/$i/a/b/f n/$i/g; i=$((i+1)); done";
  await run(agent, `mv o w/o; cd w; ${made}; mkfifo end`);
  const created = (await until(changes, "w/end")).filter((change) => change.startsWith("created"));
  const expected = ["w/o", "w/o/f", "w/o/d", "w/o/d/g", "w/n"];
  for (let i = 0; i < 100; i += 1) {
    expected.push(...["", "/a", "/a/b", "/a/b/f", "/g"].map((path) => `w/n/${i}${path}`));
  }
  expect(created.sort()).toEqual(expected.map((path) => `created ${path}`).sort());
});

test("without recursive, what is below a directory in it is not told", async () => {
  const agent = await newVm();
  await agent.mkdir("w/d", { recursive: true });
  await using changes = await agent.watch("w");
  await run(agent, "mkfifo w/d/x; mkfifo w/y; mkfifo w/end");
  expect(await until(changes, "w/end")).toEqual(["created w/y"]);
});

test("what the API writes is told, and so is the end of what is watched", async () => {
  const agent = await newVm();
  await agent.writeFile("f", "");
  const changes = await agent.watch("f");
  await agent.writeFile("f", "content");
  await agent.delete("f");
  const told: string[] = [];
  for await (const change of changes) {
    if (change.type !== "overflow") told.push(`${change.type} ${change.path}`);
  }
  expect(told).toContain("modified f");
  expect(told.at(-1)).toBe("deleted f");
});

test("a name that is not UTF-8 is told with its bytes", async () => {
  const agent = await newVm();
  await using changes = await agent.watch(".");
  await run(agent, "mkfifo $(printf 'b\\377d')");
  const { value } = await changes.next();
  if (value?.type !== "created") throw new Error(JSON.stringify(value));
  expect(value.path).toBe("./b\ufffdd");
  expect(Buffer.from(value.rawPath ?? []).toString("latin1")).toBe("./b\xffd");
});

test("who does not keep up is told that events were lost", { timeout: 60_000 }, async () => {
  const agent = await newVm();
  await agent.mkdir("w");
  const changes = await agent.watch("w");
  await run(agent, "cd w; seq 60000 | xargs touch; rm -rf ../w");
  let overflows = 0;
  for await (const { type } of changes) overflows += type === "overflow" ? 1 : 0;
  expect(overflows).toBeGreaterThan(0);
});

test.for([
  ["close()", (changes: FileIterator<FileEvent>) => changes.close()],
  ["return()", (changes: FileIterator<FileEvent>) => changes.return()],
] as const)("%s ends a wait for the next change", async ([, end]) => {
  const agent = await newVm();
  const changes = await agent.watch(".");
  const next = changes.next();
  await end(changes);
  expect(await next).toEqual({ done: true, value: undefined });
  expect((await changes.next()).done).toBe(true);
});

test("an abort ends it with ABORTED", async () => {
  const agent = await newVm();
  const abort = new AbortController();
  const changes = await agent.watch(".", { signal: abort.signal });
  const next = failureOf(() => changes.next());
  abort.abort();
  expect((await next).code).toBe("ABORTED");
  expect((await changes.next()).done).toBe(true);
});

test("sleep ends it with ABORTED", async () => {
  const agent = await newVm();
  const changes = await agent.watch(".");
  const next = failureOf(() => changes.next());
  await agent.sleep();
  expect((await next).code).toBe("ABORTED");
});

test("an open watch keeps its VM awake, a closed one does not", async () => {
  const agent = await newVm({ sleepAfterMs: 50 });
  let slept = false;
  const asleep = told(agent, "vmShutdown").then(() => {
    slept = true;
  });
  const changes = await agent.watch(".");
  await setTimeout(300);
  expect(slept).toBe(false);
  changes.close();
  await asleep;
});

test("a VM has so many watches, and a place for another when one is closed", async () => {
  const agent = await newVm();
  const open: FileIterator<FileEvent>[] = [];
  const more = async () => open.push(await agent.watch("."));
  const error = await failureOf(async () => {
    while (open.length <= 64) await more();
  });
  expect(error.code).toBe("EMFILE");
  expect(error.message).toContain("close one");
  open.pop()?.close();
  // Its process in the VM has still to end.
  await expect
    .poll(() =>
      more().then(
        () => true,
        () => false,
      ),
    )
    .toBe(true);
});

import { open, readdir, readFile, stat, symlink, truncate, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { PassThrough, Readable } from "node:stream";
import { buffer } from "node:stream/consumers";
import { pathToFileURL } from "node:url";
import type { Agent } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, gate, newDirectory, newVm } from "./fixtures.js";

const MiB = 2 ** 20;
const decode = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
const names = async (agent: Agent) => (await agent.readdir(".")).map(({ name }) => name).sort();

test("a file of the host is brought in and out again", async () => {
  const agent = await newVm();
  const host = await newDirectory();
  const content = Buffer.from(Array.from({ length: 3 * MiB + 1 }, (_, index) => index % 251));
  await writeFile(join(host, "in"), content);
  await agent.uploadFile(join(host, "in"), "f", { mode: 0o751 });
  expect(await agent.stat("f")).toMatchObject({ size: content.length, mode: 0o751, uid: 1000 });
  await agent.downloadFile("f", pathToFileURL(join(host, "out")));
  expect((await readFile(join(host, "out"))).equals(content)).toBe(true);
  expect(await names(agent)).toEqual(["f"]);
  expect((await readdir(host)).sort()).toEqual(["in", "out"]);
});

test.for([
  ["bytes", () => new TextEncoder().encode("abc")],
  ["a Readable", () => Readable.from(["a", Buffer.from("bc")])],
  ["a web stream", () => new Blob(["ab", "c"]).stream() as ReadableStream<Uint8Array>],
  ["an array of chunks", () => ["a", "b", "c"]],
  [
    "an async generator",
    async function* () {
      yield await Promise.resolve("ab");
      yield "c";
    },
  ],
] as const)("the content may be %s", async ([, source]) => {
  const agent = await newVm();
  await agent.uploadFile(source(), "f");
  expect(decode(await agent.readFile("f"))).toBe("abc");
  expect((await agent.stat("f")).mode).toBe(0o644);
});

test("a file appears when all of it is there, in the place of the old one", async () => {
  const agent = await newVm();
  await agent.writeFile("f", "old");
  const half = gate();
  const go = gate();
  const uploading = agent.uploadFile(
    (async function* () {
      yield "new ";
      half.open();
      await go.opened;
      yield "content";
    })(),
    "f",
  );
  await half.opened;
  expect(decode(await agent.readFile("f"))).toBe("old");
  go.open();
  await uploading;
  expect(decode(await agent.readFile("f"))).toBe("new content");
});

test.for([
  ["an abort", "ABORTED"],
  ["sleep", "ABORTED"],
] as const)(
  "%s leaves nothing of an upload whose source has nothing to give",
  async ([how, code]) => {
    const agent = await newVm();
    const abort = new AbortController();
    const half = gate();
    const uploading = failureOf(() =>
      agent.uploadFile(
        (async function* () {
          yield "half";
          half.open();
          await new Promise(() => {}); // for ever
        })(),
        "f",
        { signal: abort.signal },
      ),
    );
    await half.opened;
    if (how === "sleep") await agent.sleep();
    else abort.abort();
    expect((await uploading).code).toBe(code);
    expect(await names(agent)).toEqual([]);
  },
);

test("what the source throws is what the call rejects with", async () => {
  const agent = await newVm();
  const problem = new Error("no more");
  const source = new Readable({
    read() {
      this.push("x");
      this.destroy(problem);
    },
  });
  await expect(agent.uploadFile(source, "f")).rejects.toBe(problem);
  expect(await names(agent)).toEqual([]);
});

test("a failure of either side has its errno", async () => {
  const agent = await newVm();
  const host = await newDirectory();
  const from = join(host, "f");
  await writeFile(from, "x");
  const upload = (source: string, path: string) =>
    failureOf(() => agent.uploadFile(source, path)).then(({ code }) => code);
  expect(await upload(join(host, "none"), "f")).toBe("ENOENT");
  expect(await upload(host, "f")).toBe("EISDIR");
  expect(await upload(from, "none/f")).toBe("ENOENT");
  expect(await upload(from, "/home/user")).toMatch(/^E/);
  expect(await upload(from, "d/")).toBe("EISDIR");
  const download = (path: string, to: string) =>
    failureOf(() => agent.downloadFile(path, to)).then(({ code }) => code);
  await agent.writeFile("f", "x");
  expect(await download("none", from)).toBe("ENOENT");
  expect(await download(".", from)).toBe("EISDIR");
  expect(await download("f", join(host, "none", "f"))).toBe("ENOENT");
  expect(await download("f", host)).toBe("EISDIR");
  expect(await download("f", join(host, "d/"))).toBe("EISDIR");
  // Not replaced by a file.
  expect(await download("f", "/dev/null")).toBe("EINVAL");
  expect(await readFile(from, "utf8")).toBe("x");
  expect(await readdir(host)).toEqual(["f"]);
  expect(await names(agent)).toEqual(["f"]);
});

test("a file is read bit by bit, a part of it too", async () => {
  const agent = await newVm();
  await agent.writeFile("f", "0123456789");
  expect(decode(await buffer(agent.createReadStream("f")))).toBe("0123456789");
  const part = agent.createReadStream("f", { offset: 2, length: 3 });
  expect(decode(await buffer(part))).toBe("234");
  const out = new PassThrough();
  const collected = buffer(out);
  await agent.downloadFile("f", out);
  expect(decode(await collected)).toBe("0123456789");
});

test("a stream of a file that is not there, or is aborted, fails with a code", async () => {
  const agent = await newVm();
  await expect(buffer(agent.createReadStream("none"))).rejects.toMatchObject({ code: "ENOENT" });
  const signal = AbortSignal.abort();
  await expect(buffer(agent.createReadStream("f", { signal }))).rejects.toMatchObject({
    code: "ABORTED",
  });
});

test("2 GiB go in and out in constant memory", { timeout: 120_000 }, async () => {
  const agent = await newVm();
  const host = await newDirectory();
  const size = 2 ** 31 + 5;
  const from = join(host, "in");
  await writeFile(from, "begin");
  await truncate(from, size);
  const before = process.memoryUsage().rss;
  let most = before;
  const looking = setInterval(() => {
    most = Math.max(most, process.memoryUsage().rss);
  }, 20);
  // What is read of it is thrown away: the disk need not hold it.
  await agent.exec(`truncate -s ${size} f`);
  let length = 0;
  for await (const chunk of agent.createReadStream("f")) length += chunk.length;
  expect(length).toBe(size);
  clearInterval(looking);
  expect(most - before).toBeLessThan(192 * MiB);
});

test("a file that is cut while it is read ends there", async () => {
  const agent = await newVm();
  await agent.exec("head -c 4000000 /dev/zero > f");
  const stream = agent.createReadStream("f");
  let length = 0;
  for await (const chunk of stream) {
    if (length === 0) await agent.exec(": > f");
    length += chunk.length;
  }
  expect(length).toBeLessThan(4_000_000);
});

test("a download leaves the file of the host as it was until it is whole", async () => {
  const agent = await newVm();
  const host = await newDirectory();
  const to = join(host, "f");
  await writeFile(to, "old", { mode: 0o600 });
  await agent.exec("truncate -s 300000000 f");
  const abort = new AbortController();
  const downloading = failureOf(() => agent.downloadFile("f", to, { signal: abort.signal }));
  setImmediate(() => abort.abort());
  expect((await downloading).code).toBe("ABORTED");
  expect(await readFile(to, "utf8")).toBe("old");
  await agent.writeFile("f", "new");
  await agent.downloadFile("f", to);
  expect(await readFile(to, "utf8")).toBe("new");
  expect((await stat(to)).mode & 0o777).toBe(0o600);
  const handle = await open(to);
  await handle.close();
});

test("a download replaces no link, which a VM could have made in a mount", async () => {
  const agent = await newVm();
  await agent.writeFile("file", "evil");
  const directory = await newDirectory();
  const [kept, link] = [join(directory, "kept"), join(directory, "link")] as const;
  await writeFile(kept, "kept");
  await symlink(kept, link);
  await expect(agent.downloadFile("file", link)).rejects.toMatchObject({ code: "ELOOP" });
  expect(await readFile(kept, "utf8")).toBe("kept");
});

import type { Agent } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, newVm } from "./fixtures.js";

const run = async (agent: Agent, command: string) => {
  const { stdout, stderr, exitCode } = await agent.exec(command);
  expect(exitCode, stderr).toBe(0);
  return stdout.trim();
};

const text = (agent: Agent, path: string) => agent.readFile(path, { encoding: "utf8" });

test("a file is copied with its permissions, and replaces what is there", async () => {
  const agent = await newVm();
  await agent.writeFile("a", "new", { mode: 0o4750 });
  await agent.writeFile("b", "old, and longer");
  await agent.copy("a", "b");
  expect(await text(agent, "b")).toBe("new");
  expect((await agent.stat("b")).mode).toBe(0o750);
  const { code, message } = await failureOf(() => agent.copy("a", "b", { overwrite: false }));
  expect(code).toBe("EEXIST");
  expect(message).toBe(`can't copy "/home/user/a" to "/home/user/b" in the VM: File exists`);
});

test("a tree is copied with its modes and links, also into a directory that is there", async () => {
  const agent = await newVm();
  await run(
    agent,
    `mkdir -p tree/deep/er tree/shut && echo one > tree/one && echo two > tree/deep/er/two &&
     ln -s one tree/link && ln -s /nowhere tree/broken && chmod 500 tree/shut tree/deep/er &&
     mkdir -p there/deep && echo old > there/one && echo kept > there/deep/kept`,
  );
  await agent.copy("tree", "fresh", { recursive: true });
  expect(await run(agent, "diff -r --no-dereference tree fresh && readlink fresh/link")).toBe(
    "one",
  );
  expect(await run(agent, "stat -c %a fresh fresh/shut fresh/deep/er")).toBe("755\n500\n500");
  await agent.copy("tree", "there", { recursive: true });
  expect(await text(agent, "there/one")).toBe("one\n");
  expect(await text(agent, "there/deep/kept")).toBe("kept\n");
  expect((await failureOf(() => agent.copy("tree", "none"))).code).toBe("EISDIR");
});

test("a deep tree is copied, and a big file, from one file system to another", async () => {
  const agent = await newVm();
  await run(
    agent,
    `head -c 20000000 /dev/urandom > big && mkdir top && cd top &&
     i=0; while [ $i -lt 200 ]; do mkdir d && cd d && echo $i > f; i=$((i + 1)); done`,
  );
  await agent.copy("top", "/tmp/top", { recursive: true });
  await agent.copy("big", "/tmp/big");
  expect(await run(agent, "diff -r top /tmp/top && cmp big /tmp/big && echo same")).toBe("same");
});

test("a copy never goes through a link in its way, and never into itself", async () => {
  const agent = await newVm();
  await agent.writeFile("secret", "secret");
  await agent.writeFile("a", "a");
  await agent.symlink("secret", "link");
  await agent.copy("a", "link");
  expect(await text(agent, "secret")).toBe("secret");
  expect((await agent.stat("link", { followSymlinks: false })).type).toBe("file");
  await agent.mkdir("tree/in", { recursive: true });
  const within = await failureOf(() => agent.copy("tree", "tree/in/copy", { recursive: true }));
  expect(within.code).toBe("EINVAL");
  const itself = await failureOf(() => agent.copy("a", "./a"));
  expect(itself.code).toBe("EINVAL");
  expect(itself.message).toContain("nothing can be put into itself");
  expect(await text(agent, "a")).toBe("a");
  await run(agent, "mkfifo tree/fifo");
  const fifo = await failureOf(() => agent.copy("tree", "other", { recursive: true }));
  expect(fifo.code).toBe("EINVAL");
  expect(fifo.message).toMatch(/tree\/fifo" in the VM: it is a FIFO, .*cp -a/);
});

test("what is no file says what it is, and who can use it", async () => {
  const agent = await newVm();
  await run(agent, "mkfifo fifo");
  for (const [call, problem] of [
    [() => agent.copy("fifo", "other"), /fifo" in the VM: it is a FIFO, .*cp -a/],
    [() => agent.copy("/dev/null", "other"), /null" in the VM: it is a device, .*cp -a/],
    [() => agent.readFile("fifo"), /fifo" in the VM is a FIFO, .*exec/],
    [() => agent.readFile("/dev/null"), /null" in the VM is a device, .*exec/],
    [() => agent.readFile("/proc/version"), /version" in the VM is a file of \/proc, .*exec/],
  ] as const) {
    const error = await failureOf(call);
    expect(error.code).toBe("EINVAL");
    expect(error.message).toMatch(problem);
  }
  const unread = await failureOf(() => agent.writeFile("fifo", ""));
  expect(unread).toMatchObject({ code: "ENXIO", message: expect.stringContaining("exec") });
});

test("the times of a file are set, each by itself", async () => {
  const agent = await newVm();
  await agent.writeFile("a", "");
  await agent.utimes("a", { mtimeMs: 1_000_000_000_123.5, atimeMs: 0 });
  expect(await agent.stat("a")).toMatchObject({ mtimeMs: 1_000_000_000_123.5, atimeMs: 0 });
  await agent.utimes("a", { mtimeMs: -1500 });
  expect(await agent.stat("a")).toMatchObject({ mtimeMs: -1500, atimeMs: 0 });
  await agent.symlink("a", "link");
  await agent.utimes("link", { mtimeMs: 5000 }, { followSymlinks: false });
  expect((await agent.stat("a")).mtimeMs).toBe(-1500);
  expect((await agent.stat("link", { followSymlinks: false })).mtimeMs).toBe(5000);
  const wrong = await failureOf(() => agent.utimes("a", { mtimeMs: 1e300 }));
  expect(wrong.message).toContain("mtimeMs: must be milliseconds since the epoch");
});

test("a file is read as text, and a path that no bytes stand for is refused", async () => {
  const agent = await newVm();
  await agent.writeFile("a", new Uint8Array([104, 0xc3, 0xa4, 0xff]));
  expect(await text(agent, "a")).toBe("hä\ufffd");
  const wrong = await failureOf(() =>
    agent.readFile("a", { encoding: "latin1" as unknown as "utf8" }),
  );
  expect(wrong.message).toBe('encoding: must be "utf8" or "buffer", not "latin1"');
  const lone = await failureOf(() => agent.readFile("a\ud800"));
  expect(lone.code).toBe("INVALID_ARGUMENT");
  expect(lone.message).toContain("a surrogate is alone");
});

test("a Blob is uploaded, and what is no chunk is named", async () => {
  const agent = await newVm();
  await agent.uploadFile(new Blob(["hello ", new Uint8Array([119])]), "blob");
  expect(await text(agent, "blob")).toBe("hello w");
  const source = ["fine", 5] as unknown as Iterable<string>;
  const wrong = await failureOf(() => agent.uploadFile(source, "chunks"));
  expect(wrong.message).toBe("source: chunk 2: must be a string or a Uint8Array, not 5");
});

test("directories that may not be read are an error, or passed over", async () => {
  const agent = await newVm();
  await run(agent, "mkdir -p a/shut a/z && touch a/z/file && chmod 0 a/shut");
  expect((await failureOf(() => agent.readdirRecursive("a"))).code).toBe("EACCES");
  const listed = await agent.readdirRecursive("a", { skipUnreadable: true });
  expect(listed.map(({ path }) => path).sort()).toEqual(["a/shut", "a/z", "a/z/file"]);
});

test("a watch tells of an upload when it is there", async () => {
  const agent = await newVm();
  await using changes = await agent.watch("/home/user");
  await agent.uploadFile(new Uint8Array(10), "uploaded");
  await agent.delete("uploaded");
  const told = [];
  for await (const change of changes) {
    told.push(change);
    if (change.type === "deleted") break;
  }
  expect(told).toEqual([
    { type: "created", path: "/home/user/uploaded", isDirectory: false },
    { type: "deleted", path: "/home/user/uploaded", isDirectory: false },
  ]);
});

test("a listing that a program of the VM stops fails, and does not hang", async () => {
  const agent = await newVm();
  await using changes = await agent.watch("/home/user");
  const next = changes.next();
  const stopped = await agent.exec("pkill -STOP -x agentvm-files");
  if (stopped.exitCode === 0) {
    expect((await failureOf(() => next)).code).toBe("EINTR");
  } else {
    // Where PID 1 has another uid than `user`, it is out of reach.
    await agent.writeFile("new", "");
    expect(await next).toMatchObject({ value: { type: "created" } });
  }
  expect(await agent.exists("/home/user")).toBe(true);
});

test("holes stay holes", async () => {
  const agent = await newVm();
  await run(agent, "truncate -s 50M a && echo x >> a && truncate -s 100M a");
  await agent.copy("a", "b");
  const [size, blocks] = (await run(agent, "stat -c '%s %b' b")).split(" ").map(Number);
  expect(size).toBe(100 * 2 ** 20);
  expect(blocks).toBeLessThan(100);
  expect(await run(agent, "cmp a b && echo same")).toBe("same");
});

test("a link is not copied to where it leads", async () => {
  const agent = await newVm();
  await run(agent, "echo kept > f && ln -s f l");
  expect((await failureOf(() => agent.copy("l", "f"))).code).toBe("EINVAL");
  expect(await text(agent, "f")).toBe("kept\n");
});

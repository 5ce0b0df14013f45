import type { Agent } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, isRoot, newVm } from "./fixtures.js";

const decode = (bytes: Uint8Array | undefined) => new TextDecoder().decode(bytes);
const shell = async (agent: Agent, command: string) => {
  const { stdout, stderr, exitCode } = await agent.exec(command);
  expect(exitCode, stderr).toBe(0);
  return stdout;
};

test("a part of a file is read", async () => {
  const agent = await newVm();
  await agent.writeFile("digits", "0123456789");
  const part = async (options: object) => decode(await agent.readFile("digits", options));
  expect(await part({ offset: 3 })).toBe("3456789");
  expect(await part({ length: 2 })).toBe("01");
  expect(await part({ offset: 8, length: 100 })).toBe("89");
  expect(await part({ offset: 10 })).toBe("");
  expect(await part({ offset: Number.MAX_SAFE_INTEGER, length: 1 })).toBe("");
  expect(await part({ length: 0 })).toBe("");
});

test("append writes behind what a file holds, or makes it", async () => {
  const agent = await newVm();
  await agent.writeFile("log", "a", { append: true });
  await agent.writeFile("log", "b", { append: true });
  expect(decode(await agent.readFile("log"))).toBe("ab");
});

test("a mode holds as it is given, of a new file and of one that is there", async () => {
  const agent = await newVm();
  await agent.writeFile("new", "", { mode: 0o666 });
  await agent.writeFile("old", "");
  await agent.writeFile("old", "", { mode: 0o600 });
  expect((await agent.stat("new")).mode).toBe(0o666);
  expect((await agent.stat("old")).mode).toBe(0o600);
  await agent.chmod("old", 0o4711);
  expect((await agent.stat("old")).mode).toBe(0o4711);
});

test("many files are written with their directories, and read; each with its own error", async () => {
  const agent = await newVm();
  const written = await agent.writeFiles([
    { path: "a/b/one", content: "1" },
    { path: "/proc/nothing", content: "" },
    { path: "a/two", content: new Uint8Array([50]), mode: 0o755 },
  ]);
  expect(written.map(({ path, error }) => [path, error?.code])).toEqual([
    ["a/b/one", undefined],
    ["/proc/nothing", "ENOENT"],
    ["a/two", undefined],
  ]);
  expect((await agent.stat("a/two")).mode).toBe(0o755);
  const read = await agent.readFiles(["a/two", "missing", "a", "a/b/one"]);
  expect(read.map(({ content, error }) => error?.code ?? decode(content))).toEqual([
    "2",
    "ENOENT",
    "EISDIR",
    "1",
  ]);
});

test("directories are made, with parents if that is asked for", async () => {
  const agent = await newVm();
  await agent.mkdir("d");
  expect((await failureOf(() => agent.mkdir("d"))).code).toBe("EEXIST");
  expect((await failureOf(() => agent.mkdir("x/y"))).code).toBe("ENOENT");
  await agent.mkdir("x/y/z", { recursive: true, mode: 0o700 });
  await agent.mkdir("x/y/z", { recursive: true });
  expect((await agent.stat("x/y/z")).mode).toBe(0o700);
  expect((await agent.stat("d")).type).toBe("directory");
});

test("what is in the way of a directory is EEXIST at the end of its path, and ENOTDIR before", async () => {
  const agent = await newVm();
  await shell(agent, "touch f; ln -s f l; ln -s nowhere dangling");
  const code = async (path: string) =>
    (await failureOf(() => agent.mkdir(path, { recursive: true }))).code;
  for (const path of ["f", "f/", "l", "dangling"]) expect(await code(path)).toBe("EEXIST");
  for (const path of ["f/d", "f/d/e", "f/."]) expect(await code(path)).toBe("ENOTDIR");
});

test("a slash behind a path is for a directory alone", async () => {
  const agent = await newVm();
  await shell(agent, "mkdir d kept; touch f kept/f; ln -s f l; ln -s kept to-kept");
  const calls: [string, () => Promise<unknown>][] = [
    ...["f/", "f//", "l/", "to-kept/"].flatMap((path): [string, () => Promise<unknown>][] => [
      [`delete ${path}`, () => agent.delete(path)],
      [`delete ${path}, recursively`, () => agent.delete(path, { recursive: true, force: true })],
      [`move ${path}`, () => agent.move(path, "moved")],
    ]),
    ["move f to g/", () => agent.move("f", "g/")],
    ["copy f/", () => agent.copy("f/", "g")],
    ["copy f to g/", () => agent.copy("f", "g/")],
    ["copy l to to-kept/", () => agent.copy("l", "to-kept/")],
  ];
  for (const [what, call] of calls) expect((await failureOf(call)).code, what).toBe("ENOTDIR");
  expect((await failureOf(() => agent.symlink("f", "new/"))).code).toBe("ENOENT");
  expect(await shell(agent, "ls . kept")).toBe(".:\nd\nf\nkept\nl\nto-kept\n\nkept:\nf\n");
  await agent.move("d/", "e/");
  await agent.copy("e/", "d/", { recursive: true });
  await agent.delete("e/");
  await agent.delete("d/", { recursive: true });
  expect(await shell(agent, "ls")).toBe("f\nkept\nl\nto-kept\n");
});

test("what can't be read is skipped if that is asked for, whatever the reason", async () => {
  const agent = await newVm();
  // A zombie has a /proc/<pid>/net that opens and says EINVAL.
  await agent.spawn("sh", ["-c", "true & exec sleep 1000"]);
  const proc = await agent.readdirRecursive("/proc", { skipUnreadable: true });
  expect(proc.some(({ path }) => path === "/proc/sys/kernel/hostname")).toBe(true);
  const deep = "d".repeat(200);
  const down = `mkdir ${deep}; touch f$i; cd ${deep}`;
  await shell(agent, `for i in $(seq 20); do ${down}; done; mkdir ${deep}; touch f`);
  expect((await failureOf(() => agent.readdirRecursive("."))).code).toBe("ENAMETOOLONG");
  const told = await agent.readdirRecursive(".", { skipUnreadable: true });
  expect(told.filter(({ type }) => type === "file")).toHaveLength(21);
  await agent.delete(deep, { recursive: true });
});

test("entries come with their types, and paths that other calls take", async () => {
  const agent = await newVm();
  await shell(agent, "mkdir -p t/d; echo hi > t/d/f; ln -s nowhere t/l; mkfifo t/p");
  const top = await agent.readdir("t");
  expect(top.map(({ name, type }) => `${name} ${type}`).sort()).toEqual([
    "d directory",
    "l symlink",
    "p fifo",
  ]);
  const all = await agent.readdirRecursive("/home/user/t/");
  const file = all.find(({ type }) => type === "file");
  expect(file).toEqual({ name: "f", path: "/home/user/t/d/f", type: "file" });
  expect(decode(await agent.readFile(file?.path ?? ""))).toBe("hi\n");
  expect(all.map(({ name }) => name).sort()).toEqual(["d", "f", "l", "p"]);
  const walked: string[] = [];
  for await (const { path } of agent.walk("t")) walked.push(path);
  expect(walked.sort()).toEqual(["t/d", "t/d/f", "t/l", "t/p"]);
});

test("who walks may list, and has 256 walks at a time", async () => {
  const agent = await newVm();
  await shell(agent, "for i in $(seq 40); do mkdir -p t/$i/d; touch t/$i/d/f; done");
  const found = Array.from({ length: 40 }, async (_, index) => {
    let names = "";
    for await (const { path, type } of agent.walk(`t/${index + 1}`)) {
      if (type === "directory") names += (await agent.readdir(path)).map(({ name }) => name);
    }
    return names;
  });
  expect(await Promise.all(found)).toEqual(Array(40).fill("f"));
  const walks = Array.from({ length: 256 }, () => agent.walk("t"));
  for (const walk of walks) await walk.next();
  const oneMore = await failureOf(() => agent.walk("t").next());
  expect(oneMore).toMatchObject({ code: "EMFILE", message: expect.stringContaining("256") });
  await walks[0]?.close();
  expect((await agent.walk("t").next()).done).toBe(false);
  for (const walk of walks) await walk.close();
});

test("names that are not UTF-8 are listed, and taken as bytes", async () => {
  const agent = await newVm();
  await shell(agent, "mkdir d; printf 1 > d/$(printf 'b\\377d')");
  const [entry] = await agent.readdir("d");
  expect(entry).toMatchObject({ name: "b\ufffdd", path: "d/b\ufffdd", type: "file" });
  const raw = entry?.rawPath ?? "";
  expect([...raw]).toEqual([...Buffer.from("d/b\xffd", "latin1")]);
  expect(decode(await agent.readFile(raw))).toBe("1");
  await agent.move(raw, "plain");
  expect(await agent.readdir("d")).toEqual([]);
  const directory = Buffer.from("r\xff", "latin1");
  await agent.mkdir(directory);
  await agent.writeFile(Buffer.concat([directory, Buffer.from("/f")]), "");
  const [inside] = await agent.readdir(directory);
  expect(Buffer.from(inside?.rawPath ?? []).toString("latin1")).toBe("r\xff/f");
});

test("a stat tells of a file what it is", async () => {
  const agent = await newVm();
  const before = Date.now();
  await agent.writeFile("f", "12345");
  await agent.symlink("f", "l");
  const stat = await agent.stat("l");
  expect(stat).toMatchObject({
    type: "file",
    size: 5,
    mode: 0o644,
    uid: 1000,
    gid: 1000,
    nlink: 1,
  });
  expect(stat.mtimeMs).toBeGreaterThan(before - 1000);
  expect(stat.mtimeMs).toBeLessThan(Date.now() + 1000);
  expect(await agent.stat("l", { followSymlinks: false })).toMatchObject({
    type: "symlink",
    size: 1,
  });
  expect((await failureOf(() => agent.stat("none"))).code).toBe("ENOENT");
});

test("what is there exists, and nothing else does", async () => {
  const agent = await newVm();
  await agent.writeFile("f", "");
  await agent.symlink("nowhere", "l");
  const exist = ["f", ".", "none", "f/x", "l"].map((path) => agent.exists(path));
  expect(await Promise.all(exist)).toEqual([true, true, false, false, false]);
});

test("a move replaces what is there, unless it must not", async () => {
  const agent = await newVm();
  await agent.writeFile("a", "a");
  await agent.writeFile("b", "b");
  expect((await failureOf(() => agent.move("a", "b", { overwrite: false }))).code).toBe("EEXIST");
  await agent.move("a", "b");
  expect(decode(await agent.readFile("b"))).toBe("a");
  expect(await agent.exists("a")).toBe(false);
  const across = await failureOf(() => agent.move("b", "/tmp/b"));
  expect(across.code).toBe("EXDEV");
  expect(across.message).toContain("/tmp/b");
});

test("a directory is deleted with what is in it only if that is asked for", async () => {
  const agent = await newVm();
  await shell(agent, "mkdir -p d/e; touch d/e/f; mkdir empty");
  expect((await failureOf(() => agent.delete("d"))).code).toBe("ENOTEMPTY");
  await agent.delete("empty");
  await agent.delete("d", { recursive: true });
  expect(await agent.exists("d")).toBe(false);
  for (const recursive of [false, true]) {
    expect((await failureOf(() => agent.delete("d", { recursive }))).code).toBe("ENOENT");
    await agent.delete("d", { recursive, force: true });
  }
});

test("a link to a directory is deleted, and not what it leads to", async () => {
  const agent = await newVm();
  await shell(agent, "mkdir d; touch d/f; ln -s d l");
  await agent.delete("l", { recursive: true });
  expect(await shell(agent, "ls . d")).toBe(".:\nd\n\nd:\nf\n");
});

test("100,000 files are listed and deleted", { timeout: 60_000 }, async () => {
  const agent = await newVm();
  await shell(
    agent,
    "mkdir many && cd many && for d in $(seq 100); do mkdir $d; done && " +
      "seq 100 | while read d; do (cd $d && seq 1000 | xargs touch); done",
  );
  expect(await agent.readdirRecursive("many")).toHaveLength(100_100);
  await agent.delete("many", { recursive: true });
  expect(await agent.readdir(".")).toEqual([]);
});

test("a list whose paths take too much memory is refused", {
  timeout: 120_000,
}, async () => {
  const agent = await newVm();
  const deep = Array<string>(14).fill("x".repeat(250)).join("/");
  await shell(agent, `mkdir -p long/${deep} && cd long/${deep} && seq 40000 | xargs touch`);
  const failed = await failureOf(() => agent.readdirRecursive("long"));
  expect(failed.code).toBe("RESULT_TOO_LARGE");
});

test("links are made, read and resolved", async () => {
  const agent = await newVm();
  await shell(agent, "mkdir -p d; touch d/f");
  await agent.symlink("../d/f", "d/l");
  expect(await agent.readlink("d/l")).toBe("../d/f");
  expect(await agent.realpath("d/./l")).toBe("/home/user/d/f");
  const target = Buffer.from("x\xff", "latin1");
  await agent.symlink(target, "raw");
  expect([...(await agent.readlink("raw", { encoding: "buffer" }))]).toEqual([...target]);
  expect((await failureOf(() => agent.readlink("d"))).code).toBe("EINVAL");
  expect((await failureOf(() => agent.symlink("x", "raw"))).code).toBe("EEXIST");
});

test.runIf(isRoot)("the VM's root gives a file to whom it wants, user does not", async () => {
  const agent = await newVm();
  await agent.writeFile("f", "");
  expect((await failureOf(() => agent.chown("f", { uid: 0 }))).code).toBe("EPERM");
  await agent.chown("f", { uid: 0, gid: 7 }, { user: "root" });
  expect(await agent.stat("f")).toMatchObject({ uid: 0, gid: 7 });
  await agent.chown("f", { uid: 1000 }, { user: "root" });
  expect(await agent.stat("f")).toMatchObject({ uid: 1000, gid: 7 });
});

test.runIf(isRoot)("user changes nothing of root's; root does", async () => {
  const agent = await newVm();
  await agent.mkdir("/root/d", { user: "root" });
  await agent.chmod("/root", 0o755, { user: "root" });
  const calls: ((user?: "root") => Promise<unknown>)[] = [
    (user) => agent.writeFile("/root/d/f", "", { ...(user && { user }) }),
    (user) => agent.chmod("/root/d", 0o700, { ...(user && { user }) }),
    (user) => agent.readdir("/root/d", { ...(user && { user }) }), // of mode 0700 by now
    (user) => agent.move("/root/d/f", "/root/d/g", { ...(user && { user }) }),
    (user) => agent.delete("/root/d", { recursive: true, ...(user && { user }) }),
  ];
  for (const call of calls) {
    expect((await failureOf(() => call())).code).toMatch(/^(EACCES|EPERM)$/);
    await call("root");
  }
});

test.skipIf(isRoot)("a VM without a root says so", async () => {
  const agent = await newVm();
  const error = await failureOf(() => agent.stat("/", { user: "root" }));
  expect(error.code).toBe("VM_UNSUPPORTED");
});

test("an aborted call ends with ABORTED", async () => {
  const agent = await newVm();
  const signal = AbortSignal.abort();
  for (const call of [
    () => agent.readdir(".", { signal }),
    () => agent.readdirRecursive(".", { signal }),
    () => agent.walk(".", { signal }).next(),
    () => agent.watch(".", { signal }),
    () => agent.delete("x", { signal }),
  ]) {
    expect((await failureOf(call)).code).toBe("ABORTED");
  }
});

test.for([
  ["an empty path", (agent: Agent) => agent.readFile(""), "path"],
  ["a path with a NUL", (agent: Agent) => agent.stat("a\0b"), "path"],
  ["a number", (agent: Agent) => agent.readdir(5 as unknown as string), "path"],
  ["a mode that is none", (agent: Agent) => agent.chmod("f", 0o10000), "mode"],
  ["a negative offset", (agent: Agent) => agent.readFile("f", { offset: -1 }), "offset"],
  ["an unknown option", (agent: Agent) => agent.mkdir("d", { parents: true } as object), "parents"],
  ["an empty target", (agent: Agent) => agent.symlink("", "l"), "target"],
  [
    "a file without content",
    (agent: Agent) => agent.writeFiles([{ path: "f" } as never]),
    "files[0].content",
  ],
] as const)("%s is refused by name", async ([, call, field]) => {
  const agent = await newVm();
  const error = await failureOf(() => call(agent));
  expect(error.code).toBe("INVALID_ARGUMENT");
  expect(error.message).toMatch(field);
});

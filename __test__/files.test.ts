import { createHash, randomBytes } from "node:crypto";
import { expect, test } from "vitest";
import { failureOf, isRoot, newClient, newVm } from "./fixtures.js";

const decode = (bytes: Uint8Array) => new TextDecoder().decode(bytes);

test("what was written can be read, by the API and in the VM", async () => {
  const agent = await newVm();
  await agent.writeFile("/home/user/greeting.txt", "grüße, 世界\n");
  const content = await agent.readFile("/home/user/greeting.txt");
  expect(content).toBeInstanceOf(Uint8Array);
  expect(decode(content)).toBe("grüße, 世界\n");
  expect((await agent.exec("cat greeting.txt")).stdout).toBe("grüße, 世界\n");
});

test("what a command wrote can be read", async () => {
  const agent = await newVm();
  await agent.exec("echo result > out.txt");
  expect(decode(await agent.readFile("out.txt"))).toBe("result\n");
});

test("a relative path starts at /home/user", async () => {
  const agent = await newVm();
  await agent.exec("mkdir -p a/b");
  await agent.writeFile("a/b/../c.txt", "here");
  expect(decode(await agent.readFile("/home/user/a/c.txt"))).toBe("here");
});

test("bytes are kept as they are", async () => {
  const agent = await newVm();
  const bytes = Uint8Array.from({ length: 256 }, (_, index) => index);
  await agent.writeFile("bytes", bytes);
  expect([...(await agent.readFile("bytes"))]).toEqual([...bytes]);
});

test("a view is written, and not the buffer below it", async () => {
  const agent = await newVm();
  await agent.writeFile("view", new Uint8Array([1, 2, 3, 4, 5]).subarray(1, 4));
  expect([...(await agent.readFile("view"))]).toEqual([2, 3, 4]);
});

test("a file of 10 MB arrives whole, both ways", async () => {
  const agent = await newVm();
  const content = randomBytes(10_000_000);
  await agent.writeFile("large", content);
  const sum = createHash("sha256").update(content).digest("hex");
  expect((await agent.exec("sha256sum < large")).stdout).toBe(`${sum}  -\n`);
  expect(Buffer.from(await agent.readFile("large")).equals(content)).toBe(true);
});

test("an empty file is empty", async () => {
  const agent = await newVm();
  await agent.writeFile("empty", "");
  expect((await agent.readFile("empty")).byteLength).toBe(0);
});

test("writing replaces what a file holds and keeps its mode", async () => {
  const agent = await newVm();
  await agent.writeFile("script", "#!/bin/sh\necho a long first version\n");
  await agent.exec("chmod 755 script");
  await agent.writeFile("script", "#!/bin/sh\necho hi\n");
  expect((await agent.exec("./script")).stdout).toBe("hi\n");
});

test("files belong to user", async () => {
  const agent = await newVm();
  await agent.writeFile("mine", "");
  expect((await agent.exec("stat -c %U:%G mine")).stdout).toBe("user:user\n");
});

test.runIf(isRoot)("user: root writes and reads what user can't", async () => {
  const agent = await newVm();
  await agent.writeFile("/root/secret", "of root", { user: "root" });
  await agent.exec("chmod 600 /root/secret", { user: "root" });
  expect(decode(await agent.readFile("/root/secret", { user: "root" }))).toBe("of root");
  expect((await failureOf(() => agent.readFile("/root/secret"))).code).toBe("EACCES");
});

test.for([
  ["a file that is not there", "nothing", "ENOENT"],
  ["a directory", "/home/user", "EISDIR"],
  ["a path through a file", "file/x", "ENOTDIR"],
  ["a link to itself", "loop", "ELOOP"],
] as const)("reading %s is %s: %s", async ([, path, code]) => {
  const agent = await newVm();
  await agent.exec("touch file; ln -s loop loop");
  const error = await failureOf(() => agent.readFile(path));
  expect(error.code).toBe(code);
  expect(error.message).toContain(path);
});

test.for([
  ["into a directory that is not there", "nowhere/file", "ENOENT"],
  ["to a directory", "/home/user", "EISDIR"],
  // An ordinary user of the host can't own a writable layer: the base is read-only.
  ["where only root may", "/etc/passwd", isRoot ? "EACCES" : "EROFS"],
] as const)("writing %s, as %s, is %s", async ([, path, code]) => {
  const agent = await newVm();
  const error = await failureOf(() => agent.writeFile(path, "content"));
  expect(error.code).toBe(code);
  expect(error.message).toContain(path);
});

test("a file that is none, such as a pipe, is refused at once", async () => {
  const agent = await newVm();
  await agent.exec("mkfifo pipe");
  const error = await failureOf(() => agent.readFile("pipe"));
  expect(error.message).toContain("pipe");
});

test("a link of the VM leads to files of the VM, never of the host", async () => {
  const agent = await newVm();
  await agent.exec(`ln -s ${import.meta.filename} link`);
  expect((await failureOf(() => agent.readFile("link"))).code).toMatch(/^(ENOENT|EACCES)$/);
});

test("files outlive sleep and the client", async () => {
  const agent = await newVm();
  await agent.writeFile("kept", "still here");
  await agent.sleep();
  expect(decode(await agent.readFile("kept"))).toBe("still here");
});

test("the same key is the same VM, however it is written; other keys are other VMs", async () => {
  const client = await newClient();
  await client.vm.getOrCreate("a").writeFile("name", "a");
  expect(decode(await client.vm.getOrCreate(["a"]).readFile("name"))).toBe("a");
  for (const key of ["b", ["a", "b"], "A"]) {
    const error = await failureOf(() => client.vm.getOrCreate(key).readFile("name"));
    expect(error.code).toBe("ENOENT");
  }
});

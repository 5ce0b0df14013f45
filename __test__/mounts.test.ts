import { mkdir, readdir, readFile, stat, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { newClient, newDirectory, newVm } from "./fixtures.js";

test("an agent's user and the host's share a mounted project, over sleep", async () => {
  const project = await newDirectory();
  await writeFile(join(project, "package.json"), "{}");
  const agent = await newVm({ mounts: [{ path: "/home/user/project", hostPath: project }] });
  const { stdout } = await agent.exec("cat package.json; stat -c %U package.json; echo 1 > made", {
    cwd: "project",
  });
  expect(stdout).toBe("{}user\n");
  await agent.sleep();
  await writeFile(join(project, "later"), "later");
  expect((await agent.exec("cat project/made project/later")).stdout).toBe("1\nlater");
  const [made, own] = [await stat(join(project, "made")), await stat(project)];
  expect([made.uid, made.gid]).toEqual([own.uid, own.gid]);
});

test("a read-only mount can be read and nothing more", async () => {
  const given = await newDirectory();
  await writeFile(join(given, "file"), "kept");
  const agent = await newVm({ mounts: [{ path: "/data", hostPath: given, readOnly: true }] });
  expect(new TextDecoder().decode(await agent.readFile("/data/file"))).toBe("kept");
  await expect(agent.writeFile("/data/file", "lost")).rejects.toMatchObject({ code: "EROFS" });
  expect(await readFile(join(given, "file"), "utf8")).toBe("kept");
});

test("a VM's mounts replace its client's", async () => {
  const [clients, own] = [await newDirectory(), await newDirectory()];
  const client = await newClient({ mounts: [{ path: "/clients", hostPath: clients }] });
  const agent = client.vm.getOrCreate("own", { mounts: [{ path: "/own", hostPath: own }] });
  expect((await agent.exec("ls -d /clients /own 2>/dev/null")).stdout).toBe("/own\n");
  const other = client.vm.getOrCreate("other");
  expect((await other.exec("ls -d /clients /own 2>/dev/null")).stdout).toBe("/clients\n");
});

test("links do not lead out of a mount", async () => {
  const host = await newDirectory();
  await mkdir(join(host, "work"));
  await writeFile(join(host, "secret"), "secret");
  await symlink("../secret", join(host, "work/relative"));
  await symlink(join(host, "secret"), join(host, "work/absolute"));
  const agent = await newVm({ mounts: [{ path: "/work", hostPath: join(host, "work") }] });
  for (const name of ["relative", "absolute"]) {
    await expect(agent.readFile(`/work/${name}`)).rejects.toMatchObject({ code: "ENOENT" });
  }
});

test("what can't be mounted is named, and the VM goes on when it can", async () => {
  const host = await newDirectory();
  const client = await newClient();
  const mounts = [{ path: "/work", hostPath: join(host, "late") }];
  const agent = client.vm.getOrCreate("vm", { mounts });
  await expect(agent.exec("true")).rejects.toMatchObject({
    code: "ENOENT",
    message: expect.stringContaining("mounts[0].hostPath"),
  });
  await mkdir(join(host, "late"));
  expect((await agent.exec("ls -d /work")).stdout).toBe("/work\n");
});

test.each([
  [{ path: "work", hostPath: "." }, "mounts[0].path"],
  [{ path: "/usr/local", hostPath: "." }, "mounts[0].path"],
  [{ path: "/work", hostPath: "" }, "mounts[0].hostPath"],
  [{ path: "/work", hostPath: ".", readonly: true }, "mounts[0]"],
])("a wrong mount is refused: %j", async (mount, named) => {
  const client = await newClient();
  const error = (() => {
    try {
      return client.vm.getOrCreate("vm", { mounts: [mount] });
    } catch (error) {
      return error;
    }
  })();
  expect(error).toMatchObject({
    code: "INVALID_ARGUMENT",
    message: expect.stringContaining(named),
  });
});

test("the data directory can't be mounted, nor seen in a mount around it", async () => {
  const around = await newDirectory();
  const dataDir = join(around, "data");
  const client = await newClient({ dataDir });
  await client.vm.getOrCreate("first").writeFile("secret", "secret");
  const inside = client.vm.getOrCreate("inside", {
    mounts: [{ path: "/work", hostPath: join(dataDir, "vms") }],
  });
  await expect(inside.exec("true")).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
  const outside = client.vm.getOrCreate("outside", {
    mounts: [{ path: "/work", hostPath: around }],
  });
  expect((await outside.exec("ls -A /work /work/data")).stdout).toBe(
    "/work:\ndata\n\n/work/data:\n",
  );
});

test("file calls reach what is mounted, and make nothing setuid there", async () => {
  const host = await newDirectory();
  await writeFile(join(host, "tool"), "#!/bin/sh\n");
  const agent = await newVm({ mounts: [{ path: "/data", hostPath: host }] });
  expect((await agent.readdir("/data")).map(({ path }) => path)).toEqual(["/data/tool"]);
  await agent.chmod("/data/tool", 0o755);
  for (const mode of [0o4755, 0o2755]) {
    await expect(agent.chmod("/data/tool", mode)).rejects.toMatchObject({ code: "EPERM" });
    const made = agent.writeFile("/data/made", "", { mode });
    await expect(made).rejects.toMatchObject({ code: "EPERM" });
  }
  expect((await stat(join(host, "tool"))).mode & 0o7777).toBe(0o755);
});

test("a link that a VM has left decides nothing of what the host does later", async () => {
  const [work, secret] = [await newDirectory(), await newDirectory()];
  await writeFile(join(secret, "file"), "secret");
  const client = await newClient();
  const agent = client.vm.getOrCreate("vm", { mounts: [{ path: "/work", hostPath: work }] });
  await agent.exec(`ln -s ${secret} /work/out; echo agent > agent`);
  const link = join(work, "out");
  const elsewhere = { code: "ELOOP", message: expect.stringContaining(link) };
  await expect(agent.uploadFile(join(link, "file"), "file")).rejects.toMatchObject(elsewhere);
  await expect(agent.downloadFile("agent", join(link, "agent"))).rejects.toMatchObject(elsewhere);
  expect(await readdir(secret)).toEqual(["file"]);
  for (const [options, named] of [
    [{ mounts: [{ path: "/secret", hostPath: link }] }, "mounts[0].hostPath"],
    [{ image: { rootfs: link } }, "image.rootfs"],
    [{ image: { ociLayout: link } }, "image.ociLayout"],
  ] as const) {
    await expect(client.vm.getOrCreate(named, options).exec("true")).rejects.toMatchObject({
      code: "INVALID_ARGUMENT",
      message: expect.stringContaining(named),
    });
  }
});

import { mkdir, rm, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { ClientOptions, ImageProgress } from "agentvm";
import { expect, test } from "vitest";
import { pi } from "./agents/pi.js";
import { envOf, newClient, newDirectory, newModel } from "./fixtures.js";
import { makeLayout, makeRootfs } from "./image-files.js";

/** A root file system, an OCI layout of it tagged `v1`, and what clients on an image store need. */
async function newImage() {
  const directory = await newDirectory();
  const rootfs = join(directory, "rootfs");
  const ociLayout = join(directory, "layout");
  await makeRootfs(rootfs);
  await makeLayout(ociLayout, rootfs, "v1");
  const dataDir = join(directory, "data");
  const options: ClientOptions = { dataDir, imageStoreDir: join(directory, "images") };
  return { rootfs, ociLayout, options };
}

test("a VM has the files and the environment of an image in an OCI layout", async () => {
  const { ociLayout, options } = await newImage();
  const client = await newClient({ ...options, image: { ociLayout, tag: "v1" } });
  const agent = client.vm.getOrCreate("vm");
  const { stdout } = await agent.exec("cat /etc/os-release; echo $OF; id -un; ls /usr/share");
  expect(stdout).toBe("ID=of-the-image\nthe image\nuser\n");
});

test("a VM keeps its image, whatever becomes of the layout", async () => {
  const { ociLayout, options } = await newImage();
  const client = await newClient(options);
  const agent = client.vm.getOrCreate("vm", { image: { ociLayout } });
  await agent.exec("echo kept > ~/file");
  await agent.sleep();
  await rm(ociLayout, { recursive: true });
  expect((await agent.exec("cat ~/file /etc/os-release")).stdout).toBe("kept\nID=of-the-image\n");
  await client.close();

  const other = (await newClient(options)).vm.getOrCreate("vm");
  expect((await other.exec("cat ~/file /etc/os-release")).stdout).toBe("kept\nID=of-the-image\n");
});

test("a VM refuses another image until it is destroyed", async () => {
  const { ociLayout, rootfs, options } = await newImage();
  const client = await newClient({ ...options, image: { ociLayout } });
  await client.vm.getOrCreate("vm").exec("true");
  await client.vm.getOrCreate("vm").sleep();
  const agent = client.vm.getOrCreate("vm", { image: { rootfs } });
  await expect(agent.exec("true")).rejects.toMatchObject({
    code: "IMAGE_MISMATCH",
    message: expect.stringMatching(
      /made with the image in .* \(sha256:.* root file system .*destroy\(\)/,
    ),
  });
  await agent.destroy();
  expect((await agent.exec("echo none$OF")).stdout).toBe("none\n");
});

test("a VM of the host's programs refuses an image", async () => {
  const { ociLayout, options } = await newImage();
  const client = await newClient(options);
  await client.vm.getOrCreate("vm").exec("true");
  await client.vm.getOrCreate("vm").sleep();
  const agent = client.vm.getOrCreate("vm", { image: { ociLayout } });
  await expect(agent.exec("true")).rejects.toMatchObject({
    code: "IMAGE_MISMATCH",
    message: expect.stringContaining("the host's programs"),
  });
});

test("one VM may have the host's programs though the client has an image", async () => {
  const { ociLayout, options } = await newImage();
  const client = await newClient({ ...options, image: { ociLayout } });
  const agent = client.vm.getOrCreate("vm", { image: false });
  expect((await agent.exec("ls /usr/share")).exitCode).toBe(0);
});

test("a VM of an image refuses the host's programs", async () => {
  const { ociLayout, options } = await newImage();
  const client = await newClient(options);
  await client.vm.getOrCreate("vm", { image: { ociLayout, tag: "v1" } }).exec("true");
  await client.vm.getOrCreate("vm").sleep();
  await expect(client.vm.getOrCreate("vm", { image: false }).exec("true")).rejects.toMatchObject({
    code: "IMAGE_MISMATCH",
    message: expect.stringMatching(/tagged "v1" \(sha256:.* the host's programs/),
  });
});

test("a layout's image tells how far it is unpacked", async () => {
  const { ociLayout, options } = await newImage();
  const client = await newClient({ ...options, image: { ociLayout, tag: "v1" } });
  const agent = client.vm.getOrCreate("vm");
  const told: ImageProgress[] = [];
  agent.on("imageProgress", (progress) => void told.push(progress));
  await agent.exec("true");
  expect(told[0]).toMatchObject({ image: `oci:${ociLayout}:v1`, step: "unpacking" });
  expect(told[0]?.totalBytes).toBeGreaterThan(0);
  const second = client.vm.getOrCreate("second");
  second.on("imageProgress", (progress) => void told.push(progress));
  const before = told.length;
  await second.exec("true");
  expect(told.length).toBe(before);
});

test("a root file system that would show other VMs is refused", async () => {
  const { options, rootfs } = await newImage();
  const dataDir = options.dataDir as string;
  await mkdir(join(dataDir, "own"), { recursive: true });
  await symlink(dataDir, join(rootfs, "../link"));
  for (const [shown, relation] of [
    ["/", "is the root of this host"],
    [dataDir, "is agentvm's own"],
    [join(rootfs, "../link"), "is agentvm's own"],
    [join(dataDir, ".."), "holds agentvm's own"],
    [join(dataDir, "own"), "is in agentvm's own"],
  ] as const) {
    const client = await newClient(options);
    const agent = client.vm.getOrCreate("vm", { image: { rootfs: shown } });
    await expect(agent.exec("true")).rejects.toMatchObject({
      code: "INVALID_ARGUMENT",
      message: expect.stringMatching(new RegExp(`image.rootfs: .*${relation}`)),
    });
  }
});

test("an image that could not be booted does not stay with the VM", async () => {
  const { ociLayout, options } = await newImage();
  const bad = join(await newDirectory(), "bad");
  await mkdir(bad);
  await symlink("/nowhere", join(bad, "etc"));
  const client = await newClient(options);
  for (const [rootfs, problem] of [
    [bad, "its /etc is a symbolic link"],
    [join(bad, ".."), "it has no programs"],
  ] as const) {
    await expect(
      client.vm.getOrCreate("vm", { image: { rootfs } }).exec("true"),
    ).rejects.toMatchObject({
      code: "IMAGE_INVALID",
      message: expect.stringContaining(problem),
    });
  }
  const agent = client.vm.getOrCreate("vm", { image: { ociLayout } });
  expect((await agent.exec("echo $OF")).stdout).toBe("the image\n");
});

test("an image that is not there is an error that names it", async () => {
  const { ociLayout, options } = await newImage();
  const client = await newClient(options);
  for (const [image, named] of [
    [{ ociLayout, tag: "v2" }, /no tag "v2".*it has v1/],
    [{ ociLayout: "/nowhere" }, /\/nowhere is no OCI image layout/],
    [
      { rootfs: "/nowhere" },
      /^image\.rootfs: "\/nowhere" does not exist on this host.*debootstrap/,
    ],
    [{ rootfs: "nowhere" }, /"\/.*\/nowhere" does not exist/],
    [{ rootfs: "/etc/hostname" }, /"\/etc\/hostname" is no directory/],
  ] as const) {
    const agent = client.vm.getOrCreate("vm", { image });
    await expect(agent.exec("true")).rejects.toMatchObject({
      code: "IMAGE_NOT_FOUND",
      message: expect.stringMatching(named),
    });
  }
});

test("what is no image is refused at once", async () => {
  const client = await newClient();
  for (const [image, problem] of [
    ["", /^image: /],
    [{ rootfs: "/a", tag: "b" }, /^image: .*"ociLayout"/],
    [{ path: "/a" }, /^image: .*"path"/],
  ] as const) {
    expect(() => client.vm.getOrCreate("vm", { image: image as never })).toThrow(
      expect.objectContaining({
        code: "INVALID_ARGUMENT",
        message: expect.stringMatching(problem),
      }),
    );
  }
});

test("an agent runs on an image with what it is linked to", async () => {
  const directory = await newDirectory();
  const rootfs = join(directory, "rootfs");
  await makeRootfs(rootfs, process.execPath);
  const model = await newModel([{ text: "Hello from the image" }]);
  const client = await newClient({ image: { rootfs }, loopbackExemptPorts: [model.port] });
  const agent = client.vm.getOrCreate("vm");
  const session = await agent.createSession("pi", { env: envOf(model) });
  const { text } = await agent.sendPrompt(session.sessionId, "Hello");
  expect(text).toBe("Hello from the image");
});

test("an agent that can't run on an image says why", async () => {
  const directory = await newDirectory();
  const rootfs = join(directory, "rootfs");
  for (const place of ["etc", "bin"]) await mkdir(join(rootfs, place), { recursive: true });
  await writeFile(join(rootfs, "etc/os-release"), "ID=empty");
  const client = await newClient({ image: { rootfs } });
  const session = client.vm.getOrCreate("vm").createSession("pi", { env: pi.noRetries });
  await expect(session).rejects.toMatchObject({
    code: "AGENT_UNSUPPORTED",
    message: expect.stringMatching(/has no glibc/),
  });
  await expect(client.vm.getOrCreate("vm").exec("true")).rejects.toMatchObject({
    code: "ENOENT",
    message: expect.stringContaining("no /bin/sh"),
  });
});

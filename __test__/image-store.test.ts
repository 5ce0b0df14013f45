/** `client.images` and `agentvm images`. */

import { rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { createClient } from "agentvm";
import { expect, test } from "vitest";
import { newClient, newDirectory, runProgram } from "./fixtures.js";
import { makeLayout, makeRootfs } from "./image-files.js";

/** A layout with an image tagged `v1`, and what clients and commands on a store need. */
async function newImage() {
  const directory = await newDirectory();
  const rootfs = join(directory, "rootfs");
  const ociLayout = join(directory, "layout");
  await makeRootfs(rootfs);
  const digest = await makeLayout(ociLayout, rootfs, "v1");
  const image = { ociLayout, tag: "v1" };
  const dataDir = join(directory, "data");
  const options = { dataDir, imageStoreDir: join(directory, "images") };
  const env = { AGENTVM_CACHE_DIR: directory, AGENTVM_DATA_DIR: dataDir };
  const agentvm = (...words: string[]) => runProgram(["dist/cli.js", "images", ...words], env);
  const reference = `oci:${ociLayout}:v1`;
  return { directory, rootfs, ociLayout, image, digest, dataDir, options, agentvm, reference };
}

test("an image is pulled with progress, listed with what it takes, and removed by its name", async () => {
  const { image, digest, options, reference } = await newImage();
  const { images } = await newClient(options);
  expect(await images.list()).toEqual([]);
  const steps = new Set<string>();
  const pulled = await images.pull(image, { onProgress: ({ step }) => steps.add(step) });
  expect(steps).toContain("unpacking");
  expect(pulled).toMatchObject({ digest, references: [reference], vms: [], running: false });
  expect(pulled.bytes).toBeGreaterThan(1_000_000);
  expect(Math.abs(pulled.pulledAt - Date.now())).toBeLessThan(600_000);
  expect(await images.list()).toEqual([pulled]);
  expect(await images.pull(image)).toEqual(pulled);
  expect(await images.remove(reference)).toEqual({ removed: [pulled], untagged: [reference] });
  expect(await images.list()).toEqual([]);
  expect(await images.remove(digest)).toEqual({ removed: [], untagged: [] });
});

test("an image of a VM stays, awake or asleep, whoever prunes, until the VM is destroyed", async () => {
  const { ociLayout, digest, image, dataDir, options, directory } = await newImage();
  const client = await newClient({ ...options, image });
  const agent = client.vm.getOrCreate(["team", "vm"]);
  await agent.exec("true");
  // As another process: a data directory that has nothing to do with this one.
  const other = await newClient({ ...options, dataDir: join(directory, "other") });
  const [running] = await other.images.list();
  expect(running).toMatchObject({ vms: [{ key: ["team", "vm"], dataDir }], running: true });
  await agent.sleep();
  await rm(ociLayout, { recursive: true });

  const { removed, kept } = await other.images.prune();
  expect(removed).toEqual([]);
  expect(kept).toMatchObject([{ digest, vms: [{ key: ["team", "vm"] }], running: false }]);
  await expect(other.images.remove(digest)).rejects.toMatchObject({
    code: "IMAGE_IN_USE",
    message: expect.stringMatching(/VM \["team","vm"\] in .*data: destroy\(\)/),
  });
  expect((await agent.exec("cat /etc/os-release")).stdout).toBe("ID=of-the-image\n");

  await agent.destroy();
  expect((await other.images.prune({ dryRun: true })).removed).toMatchObject([{ digest }]);
  expect((await other.images.prune()).removed).toMatchObject([{ digest }]);
  expect(await client.images.list()).toEqual([]);
});

test("a VM of a process that has ended keeps its image", async () => {
  const { image, digest, options } = await newImage();
  const first = createClient({ ...options, image });
  await first.vm.getOrCreate("vm").exec("true");
  await first.close();
  const { images } = await newClient(options);
  await expect(images.remove(digest)).rejects.toMatchObject({ code: "IMAGE_IN_USE" });
});

test("what can't be pulled or removed is refused by name", async () => {
  const { options, rootfs } = await newImage();
  const { images } = await newClient(options);
  const refused = (problem: RegExp) => ({
    code: "INVALID_ARGUMENT",
    message: expect.stringMatching(problem),
  });
  await expect(images.pull({ rootfs } as never)).rejects.toMatchObject(refused(/nothing to pull/));
  await expect(images.pull(undefined as never)).rejects.toMatchObject(refused(/^image: /));
  await expect(images.pull("A b")).rejects.toMatchObject(refused(/^image: .*no name of an image/));
  await expect(images.remove("sha256:ab")).rejects.toMatchObject(refused(/12 to 64/));
  await expect(images.prune({ all: true } as never)).rejects.toMatchObject(refused(/^all: /));
});

test("agentvm images lists, removes and prunes", async () => {
  const { image, digest, options, agentvm, reference, rootfs, ociLayout } = await newImage();
  expect(await agentvm()).toMatchObject({ stdout: expect.stringContaining("There is no image") });
  const client = await newClient(options);
  await client.images.pull(image);
  const short = digest.slice(0, 19);
  const listed = await agentvm("list");
  expect(listed.stdout).toMatch(/^REFERENCE +DIGEST +SIZE +PULLED \(UTC\) +VMS\n/);
  expect(listed.stdout).toMatch(new RegExp(`\n${reference} +${short} +[\\d.]+ MB +20.* +0\n$`));
  const { images } = JSON.parse((await agentvm("--json")).stdout);
  expect(images).toEqual(await client.images.list());
  expect((await agentvm("rm", reference)).stdout).toMatch(
    new RegExp(`^untagged ${reference}\nremoved ${reference} ${short}, [\\d.]+ MB\n$`),
  );
  expect((await agentvm("rm", reference)).stdout).toBe(`${reference} is not there\n`);

  await client.vm.getOrCreate("vm", { image }).exec("true");
  await client.vm.getOrCreate("vm").sleep();
  expect(await agentvm("rm", digest)).toMatchObject({
    code: 1,
    stderr: expect.stringMatching(/^IMAGE_IN_USE: .*VM \["vm"\]/),
  });
  await writeFile(join(rootfs, "etc/os-release"), "ID=newer");
  await makeLayout(ociLayout, rootfs, "v1");
  await client.images.pull(image);
  const pruned = await agentvm("prune");
  expect(pruned.stdout).toMatch(/\nkept sha256:[0-9a-f]{12}: VM vm in /);
  expect(pruned.stdout).toMatch(/\nremoved 1 of 2 images, /);
});

test.for([
  [["delete"], "list, pull, rm or prune"],
  [["pull"], "takes names of images"],
  [["prune", "python"], "takes nothing of images"],
  [["rm", "--dry-run", "a"], "no option --dry-run"],
] as const)("agentvm images %s is an error of usage", async ([words, problem]) => {
  const { code, stderr } = await runProgram(["dist/cli.js", "images", ...words]);
  expect({ code, stderr }).toEqual({ code: 2, stderr: expect.stringContaining(problem) });
});

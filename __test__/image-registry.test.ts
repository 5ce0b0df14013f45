/** Images from a real registry, which is Debian's docker-registry on loopback. */

import { execFile, spawn, spawnSync } from "node:child_process";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { promisify } from "node:util";
import type { ImageProgress } from "agentvm";
import { expect, onTestFinished, test } from "vitest";
import { newClient, newDirectory } from "./fixtures.js";
import { makeLayout, makeRootfs } from "./image-files.js";

const PROGRAMS = ["docker-registry", "skopeo"];
const missing = PROGRAMS.filter((name) => spawnSync(name, ["--version"]).error);
if (missing.length > 0) {
  console.warn(
    `NOT RUN: tests with a registry. This machine lacks ${missing.join(" and ")}: ` +
      `apt-get install ${missing.join(" ")}`,
  );
}

/** Starts a registry, and resolves to its address. */
async function newRegistry(directory: string): Promise<string> {
  const config = join(directory, "registry.json");
  await writeFile(
    config,
    JSON.stringify({
      version: 0.1,
      log: { fields: { service: "registry" } },
      storage: { filesystem: { rootdirectory: join(directory, "registry") } },
      http: { addr: "127.0.0.1:0" },
    }),
  );
  const registry = spawn("docker-registry", ["serve", config], {
    stdio: ["ignore", "ignore", "pipe"],
  });
  onTestFinished(() => void registry.kill());
  for await (const line of createInterface(registry.stderr)) {
    const address = /listening on ([\d.]+:\d+)/.exec(line)?.[1];
    if (address !== undefined) {
      registry.stderr.resume();
      return address;
    }
  }
  throw new Error("docker-registry has not started");
}

async function push(layout: string, tag: string, name: string): Promise<void> {
  const from = `oci:${layout}:${tag}`;
  const options = ["--insecure-policy", "copy", "--dest-tls-verify=false"];
  await promisify(execFile)("skopeo", [...options, from, `docker://${name}`]);
}

test.skipIf(missing.length > 0)(
  "an image is pulled from a registry, told of, shared and kept though its tag moves",
  { timeout: 60_000 },
  async () => {
    const directory = await newDirectory();
    const rootfs = join(directory, "rootfs");
    const [first, second] = [join(directory, "first"), join(directory, "second")] as const;
    const image = `${await newRegistry(directory)}/team/image:v1`;
    await makeRootfs(rootfs);
    await makeLayout(first, rootfs, "v1");
    await push(first, "v1", image);

    const client = await newClient({ imageStoreDir: join(directory, "images"), image });
    const agent = client.vm.getOrCreate("one");
    const steps = new Set<string>();
    agent.on("imageProgress", (progress) => {
      expect(progress.image).toBe(image);
      steps.add(progress.step);
    });
    const release = (vm: string) => client.vm.getOrCreate(vm).exec("cat /etc/os-release");
    expect((await release("one")).stdout).toBe("ID=of-the-image\n");
    // One that another has replaced before the listener could be told is left out.
    expect(steps).toContain("unpacking");

    await writeFile(join(rootfs, "etc/os-release"), "ID=newer\n");
    await makeLayout(second, rootfs, "v1");
    await push(second, "v1", image);
    await agent.sleep();
    expect((await release("one")).stdout).toBe("ID=of-the-image\n");
    expect((await release("two")).stdout).toBe("ID=newer\n");

    const names = (await client.images.list()).map(({ references, vms }) => [
      references,
      vms[0]?.key,
    ]);
    expect(names).toEqual([
      [[image], ["two"]],
      [[], ["one"]],
    ]);
    await client.vm.getOrCreate("two").destroy();
    expect((await client.images.remove(image)).untagged).toEqual([image]);
    steps.clear();
    const onProgress = ({ step }: ImageProgress) => steps.add(step);
    const pulled = await client.images.pull(image, { onProgress });
    // Fast enough, a download is over before it is told of.
    expect(steps).toContain("unpacking");
    expect(await client.images.list()).toContainEqual(pulled);
    expect((await client.images.prune()).removed).toEqual([pulled]);

    const none = client.vm.getOrCreate("three", { image: image.replace("v1", "v2") });
    await expect(none.exec("true")).rejects.toMatchObject({
      code: "IMAGE_NOT_FOUND",
      message: expect.stringContaining("/team/image:v2"),
    });
  },
);

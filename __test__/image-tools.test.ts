/** Images as umoci and debootstrap make them. */

import { execFile, spawnSync } from "node:child_process";
import { copyFile, mkdir, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { expect, test } from "vitest";
import { envOf, newClient, newDirectory, newModel } from "./fixtures.js";
import { makeRootfs } from "./image-files.js";

const run = promisify(execFile);
const lacks = (program: string) => spawnSync(program, ["--version"]).error !== undefined;
const isRoot = process.getuid?.() === 0;

const lacksUmoci = lacks("umoci");
if (lacksUmoci) {
  console.warn("NOT RUN: tests with umoci. This machine lacks it: apt-get install umoci");
}

test.skipIf(lacksUmoci)(
  "an image that umoci made has all layers, what they delete, and its environment",
  { timeout: 60_000 },
  async () => {
    const directory = await newDirectory();
    const ociLayout = join(directory, "layout");
    const image = `${ociLayout}:v1`;
    const rootless = isRoot ? [] : ["--rootless"];
    const umoci = (...args: string[]) => run("umoci", args);
    await umoci("init", "--layout", ociLayout);
    await umoci("new", "--image", image);
    const [first, second] = [join(directory, "first"), join(directory, "second")] as const;
    await umoci("unpack", ...rootless, "--image", image, first);
    await makeRootfs(join(first, "rootfs"));
    await writeFile(join(first, "rootfs/deleted"), "");
    await umoci("repack", "--image", image, first);
    await umoci("unpack", ...rootless, "--image", image, second);
    await rm(join(second, "rootfs/deleted"));
    await writeFile(join(second, "rootfs/etc/os-release"), "ID=second-layer\n");
    await umoci("repack", "--image", image, second);
    await umoci("config", "--image", image, "--config.env", "OF=umoci");

    const client = await newClient({
      imageStoreDir: join(directory, "images"),
      image: { ociLayout, tag: "v1" },
    });
    const agent = client.vm.getOrCreate("vm");
    const { stdout } = await agent.exec("cat /etc/os-release; echo $OF; ls -d /deleted /etc");
    expect(stdout).toBe("ID=second-layer\numoci\n/etc\n");
  },
);

const lacksMusl = lacks("musl-gcc");
if (lacksMusl) {
  console.warn("NOT RUN: the test with musl. This machine lacks it: apt-get install musl-tools");
}

test.skipIf(lacksMusl)(
  "an image with musl runs its own programs, and no agent of glibc",
  async () => {
    const directory = await newDirectory();
    const rootfs = join(directory, "rootfs");
    const source = join(directory, "sh.c");
    // Says what `sh -c` was to run.
    await writeFile(
      source,
      "#include <stdio.h>\nint main(int n, char **of) { puts(of[n - 1]); }\n",
    );
    for (const path of ["bin", "lib", "etc"]) await mkdir(join(rootfs, path), { recursive: true });
    await run("musl-gcc", ["-o", join(rootfs, "bin/sh"), source]);
    const loader = (await run("sh", ["-c", "echo /lib/ld-musl-*"])).stdout.trim();
    await copyFile(loader, join(rootfs, loader));
    await writeFile(join(rootfs, "etc/os-release"), "ID=of-musl\n");

    const client = await newClient({ image: { rootfs } });
    const agent = client.vm.getOrCreate("vm");
    expect((await agent.exec("a musl program")).stdout).toBe("a musl program\n");
    await expect(agent.createSession("pi")).rejects.toMatchObject({
      code: "AGENT_UNSUPPORTED",
      message: expect.stringContaining("musl"),
    });
  },
);

/** Where this machine gets Debian from, and which one: `null` if it is no Debian, or not reachable. */
async function mirror(): Promise<{ site: string; codename: string } | null> {
  const format = ["--format", "$(ORIGIN) $(COMPONENT) $(SITE) $(CODENAME)"];
  const targets = spawnSync("apt-get", ["indextargets", ...format, "Created-By: Packages"]);
  const line = targets.stdout?.toString().match(/^Debian main (\S+) (\w+)$/m);
  const [, site = "", codename = ""] = line ?? [];
  const release = `${site}/dists/${codename}/InRelease`;
  const signal = AbortSignal.timeout(10_000);
  const answer = line ? await fetch(release, { signal }).catch(() => null) : null;
  await answer?.body?.cancel();
  return answer?.ok ? { site, codename } : null;
}

const lacksDebootstrap = lacks("debootstrap") || !isRoot;
const debian = lacksDebootstrap ? null : await mirror();
if (debian === null) {
  console.warn(
    "NOT RUN: the test with debootstrap. It needs root, apt-get install debootstrap, and a mirror of " +
      "Debian that apt knows and that answers",
  );
}

test.skipIf(debian === null)(
  "an agent runs in a root file system that debootstrap made, where root removes packages",
  { timeout: 600_000 },
  async () => {
    const { site, codename } = debian as NonNullable<typeof debian>;
    const directory = await newDirectory();
    const rootfs = join(directory, "debian");
    await run("debootstrap", ["--variant=minbase", codename, rootfs, site], { maxBuffer: 1 << 26 });

    const model = await newModel([{ text: "Hello from Debian" }]);
    const client = await newClient({ image: { rootfs }, loopbackExemptPorts: [model.port] });
    const agent = client.vm.getOrCreate("vm");
    const system = await agent.exec(". /etc/os-release; echo $ID $VERSION_CODENAME; id -un");
    expect(system.stdout).toBe(`debian ${codename}\nuser\n`);
    const session = await agent.createSession("pi", { env: envOf(model) });
    const { text } = await agent.sendPrompt(session.sessionId, "Hello");
    expect(text).toBe("Hello from Debian");

    // One that the image has: nothing is fetched.
    const purged = await agent.exec("dpkg --purge --force-all tzdata", { user: "root" });
    expect(purged).toMatchObject({ exitCode: 0 });
    expect(await agent.exec("dpkg --status tzdata")).toMatchObject({ exitCode: 1 });
  },
);

/** Images for tests, of programs that the host has anyway. */

import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { copyFile, mkdir, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";

const PROGRAMS = ["sh", "cat", "env", "id", "ls", "mkdir", "rm"].map((name) => `/bin/${name}`);

/** A root file system at `path` with a shell, and with what `more` programs are linked to. */
export async function makeRootfs(path: string, ...more: string[]): Promise<void> {
  const linked = execFileSync("ldd", [...PROGRAMS, ...more], { encoding: "utf8" });
  const libraries = linked.split(/\s+/).filter((word) => /^\/.*[^:]$/.test(word));
  for (const file of new Set([...PROGRAMS, ...libraries])) {
    const target = join(path, file);
    await mkdir(dirname(target), { recursive: true });
    await copyFile(file, target);
  }
  for (const directory of ["etc", "tmp"]) await mkdir(join(path, directory));
  await writeFile(join(path, "etc/os-release"), "ID=of-the-image\n");
}

export const ARCHITECTURE = process.arch === "x64" ? "amd64" : process.arch;

/** Makes a directory an OCI image layout with one image, whose only layer has the files of `rootfs`. */
export async function makeLayout(layout: string, rootfs: string, tag: string): Promise<string> {
  const blobs = join(layout, "blobs/sha256");
  await mkdir(blobs, { recursive: true });
  const blob = async (mediaType: string, content: Buffer) => {
    const hex = createHash("sha256").update(content).digest("hex");
    await writeFile(join(blobs, hex), content);
    return { mediaType, digest: `sha256:${hex}`, size: content.length };
  };
  const json = (mediaType: string, content: unknown) =>
    blob(mediaType, Buffer.from(JSON.stringify(content)));
  const archive = ["-C", rootfs, "--owner=0", "--group=0", "-c", "."];
  const tar = execFileSync("tar", archive, { maxBuffer: 1 << 30 });
  const layer = await blob("application/vnd.oci.image.layer.v1.tar", tar);
  const config = await json("application/vnd.oci.image.config.v1+json", {
    os: "linux",
    architecture: ARCHITECTURE,
    config: { Env: ["PATH=/bin", "OF=the image"] },
    rootfs: { type: "layers", diff_ids: [layer.digest] },
  });
  const manifest = await json("application/vnd.oci.image.manifest.v1+json", {
    schemaVersion: 2,
    mediaType: "application/vnd.oci.image.manifest.v1+json",
    config,
    layers: [layer],
  });
  const annotations = { "org.opencontainers.image.ref.name": tag };
  const index = { schemaVersion: 2, manifests: [{ ...manifest, annotations }] };
  await writeFile(join(layout, "oci-layout"), JSON.stringify({ imageLayoutVersion: "1.0.0" }));
  await writeFile(join(layout, "index.json"), JSON.stringify(index));
  return manifest.digest;
}

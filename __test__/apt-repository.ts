/** A Debian repository on loopback, with packages that a test describes. */

import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { dirname, join } from "node:path";
import { promisify } from "node:util";
import { onTestFinished } from "vitest";
import { newDirectory } from "./fixtures.js";

export interface DebianPackage {
  name: string;
  version: string;
  /** Further fields of its `control`. */
  fields?: Record<string, string>;
  /** Shell scripts: `postinst`, `prerm`, … */
  scripts?: Record<string, string>;
  /** By absolute path. What is in a `bin` is executable. */
  files: Record<string, string>;
}

export interface AptRepository {
  port: number;
  /** A line for `sources.list`. */
  source: string;
}

export async function newAptRepository(packages: DebianPackage[]): Promise<AptRepository> {
  const served = new Map<string, Buffer>();
  const index: string[] = [];
  for (const described of packages) {
    const { control, deb } = await build(described);
    const path = `/${described.name}.deb`;
    const digest = createHash("sha256").update(deb).digest("hex");
    index.push(`${control}Filename: .${path}\nSize: ${deb.length}\nSHA256: ${digest}\n`);
    served.set(path, deb);
  }
  served.set("/Packages", Buffer.from(index.join("\n")));
  const server = createServer((request, response) => {
    const body = served.get((request.url ?? "").replace(/^\/\./, ""));
    response.writeHead(body === undefined ? 404 : 200).end(body);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onTestFinished(() => void server.close().closeAllConnections());
  const { port } = server.address() as AddressInfo;
  return { port, source: `deb [trusted=yes] http://127.0.0.1:${port} ./` };
}

async function build({ name, version, fields = {}, scripts = {}, files }: DebianPackage) {
  const directory = await newDirectory();
  const tree = join(directory, "tree");
  const all = {
    Package: name,
    Version: version,
    Architecture: "all",
    Maintainer: "Nobody <nobody@example.com>",
    Description: "for a test",
    ...fields,
  };
  const control = Object.entries(all).map(([field, value]) => `${field}: ${value}\n`);
  const put = async (path: string, text: string, mode: number) => {
    await mkdir(dirname(path), { recursive: true, mode: 0o755 });
    await writeFile(path, text, { mode });
  };
  await put(join(tree, "DEBIAN/control"), control.join(""), 0o644);
  for (const [script, text] of Object.entries(scripts)) {
    await put(join(tree, "DEBIAN", script), `#!/bin/sh\nset -e\n${text}\n`, 0o755);
  }
  for (const [path, text] of Object.entries(files)) {
    await put(join(tree, path), text, path.includes("/bin/") ? 0o755 : 0o644);
  }
  const deb = join(directory, "package.deb");
  await promisify(execFile)("dpkg-deb", ["--root-owner-group", "--build", tree, deb]);
  return { control: control.join(""), deb: await readFile(deb) };
}

// An npm registry on loopback with packages that are made up.

import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

export interface Registry {
  url: string;
  port: number;
  /** Their names. */
  packages: string[];
  close(): void;
}

/** @param files of each package */
export async function startRegistry(count: number, files: number): Promise<Registry> {
  const names = Array.from({ length: count }, (_, index) => `bench-package-${index}`);
  const tarballs = new Map(names.map((name) => [name, pack(name, files)]));
  const server = createServer((request, response) => {
    const [, name = "", file] = (request.url ?? "").split("/");
    const tarball = tarballs.get(name);
    if (tarball === undefined) {
      response.writeHead(404).end("{}");
    } else if (file === undefined) {
      const dist = {
        tarball: `http://${request.headers.host}/${name}/package.tgz`,
        integrity: `sha512-${createHash("sha512").update(tarball).digest("base64")}`,
      };
      const versions = { "1.0.0": { name, version: "1.0.0", dist } };
      response.writeHead(200, { "content-type": "application/json" });
      response.end(JSON.stringify({ name, "dist-tags": { latest: "1.0.0" }, versions }));
    } else {
      response.writeHead(200, { "content-type": "application/octet-stream" }).end(tarball);
    }
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  const close = () => void server.close().closeAllConnections();
  return { url: `http://127.0.0.1:${port}/`, port, packages: names, close };
}

function pack(name: string, files: number): Buffer {
  const directory = mkdtempSync(join(tmpdir(), "agentvm-bench-package-"));
  try {
    const root = join(directory, "package");
    mkdirSync(root);
    writeFileSync(join(root, "package.json"), JSON.stringify({ name, version: "1.0.0" }));
    for (let index = 0; index < files; index += 1) {
      writeFileSync(join(root, `${index}.js`), `module.exports = "${name} ${index}";\n`.repeat(50));
    }
    return readFileSync(archive(directory));
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

function archive(directory: string): string {
  const file = join(directory, "package.tgz");
  execFileSync("tar", ["-czf", file, "-C", directory, "package"]);
  return file;
}

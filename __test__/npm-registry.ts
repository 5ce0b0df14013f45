/** An npm registry on loopback that has one package, whose command is one program without dependencies. */

import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdir, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { promisify } from "node:util";
import { onTestFinished } from "vitest";
import { newDirectory } from "./fixtures.js";

export interface Package {
  name: string;
  version: string;
  /** Source of an ES module. */
  program: string;
}

export interface Registry {
  /** For `npm_config_registry`. */
  url: string;
  port: number;
  /** Paths of all answers but 404. */
  served: string[];
}

export async function newRegistry({ name, version, program }: Package): Promise<Registry> {
  const manifest = { name, version, bin: { [name]: "program.mjs" } };
  const tarball = await pack({
    "package.json": JSON.stringify(manifest),
    "program.mjs": `#!/usr/bin/env node\n${program}`,
  });
  const file = `/${name}/-/${name}-${version}.tgz`;
  const served: string[] = [];
  const server = createServer((request, response) => {
    const path = request.url ?? "/";
    if (path === file) {
      response.writeHead(200, { "content-type": "application/octet-stream" }).end(tarball);
    } else if (path === `/${name}`) {
      const dist = {
        tarball: `http://${request.headers.host}${file}`,
        integrity: `sha512-${createHash("sha512").update(tarball).digest("base64")}`,
        shasum: createHash("sha1").update(tarball).digest("hex"),
      };
      const versions = { [version]: { ...manifest, dist } };
      response.writeHead(200, { "content-type": "application/json" });
      response.end(JSON.stringify({ name, "dist-tags": { latest: version }, versions }));
    } else {
      response.writeHead(404, { "content-type": "application/json" }).end("{}");
      return;
    }
    served.push(path);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onTestFinished(() => void server.close().closeAllConnections());
  const { port } = server.address() as AddressInfo;
  return { url: `http://127.0.0.1:${port}/`, port, served };
}

/** As `npm pack` does it, which an ordinary user of this machine may not have. */
async function pack(files: Record<string, string>): Promise<Buffer> {
  const directory = await newDirectory();
  await mkdir(join(directory, "package"));
  for (const [name, text] of Object.entries(files)) {
    await writeFile(join(directory, "package", name), text);
  }
  const tar = promisify(execFile)("tar", ["-cz", "-C", directory, "package"], {
    encoding: "buffer",
  });
  return (await tar).stdout;
}

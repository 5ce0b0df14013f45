/** A certificate for `localhost`, which this process trusts and no VM. */

import { execFile } from "node:child_process";
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { newDirectory } from "./fixtures.js";

const run = promisify(execFile);

export async function newCertificate(): Promise<{ key: string; cert: string }> {
  const directory = await newDirectory();
  const at = (name: string) => join(directory, name);
  const newKey = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
  const openssl = (...args: string[]) => run("openssl", args);
  await openssl(
    ...["req", "-x509", ...newKey, "-subj", "/CN=test authority", "-days", "2"],
    ...["-keyout", at("authority.key"), "-out", at("authority.pem")],
  );
  await openssl(
    ...["req", ...newKey, "-subj", "/CN=localhost"],
    ...["-keyout", at("key.pem"), "-out", at("request.pem")],
  );
  await writeFile(at("names"), "subjectAltName=DNS:localhost");
  await openssl(
    ...["x509", "-req", "-in", at("request.pem"), "-days", "2", "-extfile", at("names")],
    ...["-CA", at("authority.pem"), "-CAkey", at("authority.key"), "-CAcreateserial"],
    ...["-out", at("cert.pem")],
  );
  // The addon reads it when a VM first connects to a host of a secret.
  process.env["SSL_CERT_FILE"] = at("authority.pem");
  const [key, cert] = await Promise.all([
    readFile(at("key.pem"), "utf8"),
    readFile(at("cert.pem"), "utf8"),
  ]);
  return { key, cert };
}

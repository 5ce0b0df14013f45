/** `agentvm images …` */

import { join } from "node:path";
import type * as Api from "../index";
import { createClient, defaultAgentStoreDir, defaultDataDir } from "./client";
import { keyText } from "./shell-command";
import { print, progressLine, size, sum, table, tell, time } from "./terminal-output";
import { UsageError } from "./usage-error";

type Values = { json?: boolean; "dry-run"?: boolean; "data-dir"?: string };

export const IMAGE_OPTIONS = {
  json: { type: "boolean" },
  "dry-run": { type: "boolean" },
  "data-dir": { type: "string" },
} as const;

/** Which options each command takes, beside the one that all do. */
const COMMANDS = {
  list: { run: list, options: ["json"], takes: "nothing" },
  pull: { run: pull, options: [], takes: "names" },
  rm: { run: rm, options: [], takes: "names" },
  prune: { run: prune, options: ["dry-run"], takes: "nothing" },
} as const;

export async function images(words: readonly string[], values: Values): Promise<void> {
  const [name = "list", ...rest] = words;
  if (!Object.hasOwn(COMMANDS, name)) {
    throw new UsageError(`images: list, pull, rm or prune, not ${name}`);
  }
  const command = COMMANDS[name as keyof typeof COMMANDS];
  if (command.takes === "names" ? rest.length === 0 : rest.length > 0) {
    throw new UsageError(
      `images ${name} takes ${command.takes} of images, for example: python:3.12`,
    );
  }
  const foreign = Object.keys(values).find(
    (option) => option !== "data-dir" && !(command.options as readonly string[]).includes(option),
  );
  if (foreign !== undefined) {
    throw new UsageError(`images ${name} has no option --${foreign}`);
  }
  const dataDir = values["data-dir"] ?? defaultDataDir();
  await using client = createClient({ dataDir });
  await command.run(client, rest, values);
}

async function list(client: Api.Client, _: string[], { json }: Values): Promise<void> {
  const images = await client.images.list();
  if (json) {
    print(JSON.stringify({ store: storeDir(), images }, null, 2));
    return;
  }
  if (images.length === 0) {
    print(`There is no image in ${storeDir()}`);
    return;
  }
  const rows = images.map((image) => [
    image.references[0] ?? "-",
    short(image.digest),
    size(image.bytes),
    time(image.pulledAt),
    String(image.vms.length),
  ]);
  // Every name has a line, as it would have with Docker.
  const all = images.flatMap((image, index) => [
    rows[index] as string[],
    ...image.references.slice(1).map((name) => [name, short(image.digest), "", "", ""]),
  ]);
  table([["REFERENCE", "DIGEST", "SIZE", "PULLED (UTC)", "VMS"], ...all]);
}

async function pull(client: Api.Client, names: string[]): Promise<void> {
  const interrupted = new AbortController();
  process.once("SIGINT", () => interrupted.abort());
  for (const name of names) {
    const pulled = await client.images.pull(name, {
      onProgress: progressLine(),
      signal: interrupted.signal,
    });
    tell(`${process.stderr.isTTY ? "\n" : ""}${name} is in ${storeDir()}`);
    print(pulled.digest);
  }
}

async function rm(client: Api.Client, names: string[]): Promise<void> {
  for (const name of names) {
    const { untagged, removed } = await client.images.remove(name);
    if (untagged.length + removed.length === 0) {
      print(`${name} is not there`);
    }
    for (const reference of untagged) {
      print(`untagged ${reference}`);
    }
    tellRemoved("removed", removed);
  }
}

async function prune(client: Api.Client, _: string[], values: Values): Promise<void> {
  const dryRun = values["dry-run"] === true;
  const { removed, kept, layers, bases } = await client.images.prune({ dryRun });
  const verb = dryRun ? "would remove" : "removed";
  tellRemoved(verb, removed);
  for (const image of kept) {
    print(`kept ${title(image)}: ${whose(image)}`);
  }
  if (layers.count > 0) {
    print(`${verb} layers of pulls that ended early, ${size(layers.bytes)}`);
  }
  if (bases.count > 0) {
    print(`${verb} what VMs shared of ${bases.count} earlier states of the host`);
  }
  print(
    `${verb} ${removed.length} of ${removed.length + kept.length} images, ` +
      `${size(sum([...removed, layers, bases]))} in all`,
  );
}

function whose({ vms }: Api.ImageRecord): string {
  const [first, ...more] = vms;
  if (first === undefined) {
    return "it is just being used";
  }
  const name = first.key === null ? "a VM that can't be read" : `VM ${keyText(first.key)}`;
  const others = more.length > 0 ? ` and ${more.length} more` : "";
  return `${name} in ${first.dataDir}${others}`;
}

function tellRemoved(verb: string, removed: Api.ImageRecord[]): void {
  for (const image of removed) {
    print(`${verb} ${title(image)}, ${size(image.bytes)}`);
  }
}

const title = ({ references, digest }: Api.ImageRecord) =>
  [...references.slice(0, 1), short(digest)].join(" ");

/** Enough of it for `rm`. */
const short = (digest: string) => digest.slice(0, "sha256:".length + 12);

const storeDir = () => join(defaultAgentStoreDir(), "../images");

/** Operations on the files of a VM. */

import { constants, isUtf8 } from "node:buffer";
import { types } from "node:util";
import type * as Api from "../index";
import { abortable } from "./abort";
import {
  bytes,
  isPlainObject,
  json,
  requireFields,
  requireOptions,
  requireWellFormed,
  told,
} from "./arguments";
import { AgentVmError, aborted, call, callSync, invalidArgument, readable } from "./errors";
import { FileIterator } from "./file-iterator";
import type { native } from "./native";
import { FIELDS, OPTIONS } from "./options";

type NativeVm = InstanceType<typeof native.NativeVm>;

/** What `readdir` and `readdirRecursive` hold at most: `walk` holds one batch. */
const MAX_ENTRIES = 1_000_000;

/** UTF-16 code units of their paths, and bytes of those that are no text. */
const MAX_PATHS = 128 * 1024 * 1024;

export function requirePath(field: string, path: unknown): Api.VmPath {
  if (typeof path === "string") {
    requireWellFormed(field, path, ": a path that is not UTF-8 is given as bytes");
    return path;
  }
  if (types.isUint8Array(path)) {
    return path;
  }
  throw invalidArgument(field, `must be a string or a Uint8Array, not ${told(path)}`);
}

/** Bytes, or text, as `encoding` says. */
function requireEncoding<T extends { encoding?: "utf8" | "buffer" }>(
  options: T,
  known: readonly string[],
  byDefault: "utf8" | "buffer",
): { isText: boolean; rest: Omit<T, "encoding"> } {
  const { encoding = byDefault, ...rest } = requireOptions(options, known);
  if (encoding !== "utf8" && encoding !== "buffer") {
    throw invalidArgument("encoding", `must be "utf8" or "buffer", not ${told(encoding)}`);
  }
  return { isText: encoding === "utf8", rest };
}

export async function readFile(
  vm: NativeVm,
  path: Api.VmPath,
  options: Api.ReadFileOptions & { encoding?: "utf8" | "buffer" },
): Promise<string | Uint8Array> {
  const { isText, rest } = requireEncoding(options, OPTIONS.readFile, "buffer");
  const content = await call(vm.readFile(path, json("options", rest)));
  if (isText && content.length > constants.MAX_STRING_LENGTH) {
    throw new AgentVmError(
      "EFBIG",
      readable(
        `${quoted(path)} has ${content.length} bytes, more than a string can hold: read it as bytes, or a part of it`,
      ),
    );
  }
  return isText ? content.toString("utf8") : content;
}

/** For a message. */
const quoted = (path: Api.VmPath) => JSON.stringify(Buffer.from(path as string).toString("utf8"));

/** Aborting ends it where it is. */
export async function copy(
  vm: NativeVm,
  from: Api.VmPath,
  to: Api.VmPath,
  options: Api.CopyOptions,
): Promise<void> {
  const { signal, ...rest } = requireOptions(options, OPTIONS.copy);
  const text = json("options", rest);
  await abortable(signal, (abort) => vm.copy(from, to, text, abort));
}

export async function utimes(
  vm: NativeVm,
  path: Api.VmPath,
  times: Api.FileTimes,
  options: Api.StatOptions,
): Promise<void> {
  if (!isPlainObject(times)) {
    const wanted =
      "must be { atimeMs?, mtimeMs? }, in milliseconds since the epoch as of Date.now()";
    throw invalidArgument("times", `${wanted}, not ${told(times)}`);
  }
  requireFields("times", times, FIELDS.times, ...FIELDS.times);
  for (const [field, time] of Object.entries(times)) {
    if (time !== undefined && !Number.isFinite(time)) {
      throw invalidArgument(field, `must be milliseconds since the epoch, not ${told(time)}`);
    }
  }
  const rest = requireOptions(options, OPTIONS.stat);
  await call(vm.utimes(path, json("options", { ...rest, ...times })));
}

export async function readFiles(
  vm: NativeVm,
  paths: readonly Api.VmPath[],
  options: Api.FileOptions,
): Promise<Api.ReadFilesResult[]> {
  if (!Array.isArray(paths)) {
    throw invalidArgument("paths", "must be an array of paths");
  }
  const given = paths.map((path, index) => requirePath(`paths[${index}]`, path));
  const text = json("options", requireOptions(options, OPTIONS.file));
  const results: Api.ReadFilesResult[] = [];
  for (const path of given) {
    results.push(
      await entry<Api.ReadFilesResult>(
        async () => ({ path, content: await call(vm.readFile(path, text)) }),
        (error) => ({ path, error }),
      ),
    );
  }
  return results;
}

export async function writeFiles(
  vm: NativeVm,
  files: readonly Api.FileToWrite[],
  options: Api.FileOptions,
): Promise<Api.WriteFilesResult[]> {
  if (!Array.isArray(files)) {
    throw invalidArgument("files", "must be an array of { path, content }");
  }
  const { user } = requireOptions(options, OPTIONS.file);
  const given = files.map((file: Api.FileToWrite, index) => {
    const field = `files[${index}]`;
    const { path, content, ...rest } = requireFields(
      field,
      file,
      OPTIONS.fileToWrite,
      "path",
      "content",
    );
    return {
      path: requirePath(`${field}.path`, path),
      content: bytes(`${field}.content`, content),
      text: json(field, { ...rest, user }),
    };
  });
  const results: Api.WriteFilesResult[] = [];
  for (const { path, content, text } of given) {
    results.push(
      await entry<Api.WriteFilesResult>(
        async () => {
          await call(vm.writeFile(path, content, true, text));
          return { path };
        },
        (error) => ({ path, error }),
      ),
    );
  }
  return results;
}

/** What is wrong with one file is its result; what is wrong with the VM ends the call. */
async function entry<T>(run: () => Promise<T>, failed: (error: AgentVmError) => T): Promise<T> {
  try {
    return await run();
  } catch (error) {
    if (error instanceof AgentVmError && /^E[A-Z0-9]+$/.test(error.code)) {
      return failed(error);
    }
    throw error;
  }
}

/** A path that a call of the addon resolves to, as the caller wants it. */
export async function link(
  options: Api.LinkOptions,
  read: (options: string) => Promise<Buffer>,
): Promise<string | Uint8Array> {
  const { isText, rest } = requireEncoding(options, OPTIONS.link, "utf8");
  const path = await call(read(json("options", rest)));
  return isText ? path.toString("utf8") : path;
}

/** A path as the addon tells it, relative to the one that it was asked of; empty: itself. */
interface Told {
  path: string;
  /** If it is not UTF-8: a character for each byte. */
  rawPath?: string;
}

/** Paths that other calls take, from those that the addon tells. */
class Below {
  readonly #text: string;
  readonly #bytes: Uint8Array;
  readonly #isText: boolean;

  constructor(path: Api.VmPath) {
    this.#isText = typeof path === "string" || isUtf8(path);
    this.#bytes = typeof path === "string" ? Buffer.from(path) : Buffer.from(path);
    this.#text = typeof path === "string" ? path : Buffer.from(path).toString("utf8");
  }

  path({ path, rawPath }: Told): { path: string; rawPath?: Uint8Array } {
    const slash = path === "" || this.#text.endsWith("/") ? "" : "/";
    const joined = { path: `${this.#text}${slash}${path}` };
    if (this.#isText && rawPath === undefined) {
      return joined;
    }
    const rest = rawPath === undefined ? Buffer.from(path) : Buffer.from(rawPath, "latin1");
    return { ...joined, rawPath: Buffer.concat([this.#bytes, Buffer.from(slash), rest]) };
  }
}

function entries(below: Below, text: string): Api.DirectoryEntry[] {
  const told: (Told & { type: Api.FileType })[] = JSON.parse(text);
  return told.map(({ type, path, rawPath }) => ({
    name: path.slice(path.lastIndexOf("/") + 1),
    type,
    ...below.path(rawPath === undefined ? { path } : { path, rawPath }),
  }));
}

export async function readdir(
  vm: NativeVm,
  path: Api.VmPath,
  options: Api.ReaddirOptions,
  recursive: boolean,
): Promise<Api.DirectoryEntry[]> {
  if (isPlainObject(options) && (options as Api.WalkOptions).recursive !== undefined) {
    throw invalidArgument("recursive", "there is none: readdirRecursive lists what is below too");
  }
  requireOptions(options, recursive ? OPTIONS.readdirRecursive : OPTIONS.readdir);
  const listed: Api.DirectoryEntry[] = [];
  let length = 0;
  for await (const batch of batches(vm, path, options, recursive)) {
    for (const entry of batch) length += entry.path.length + (entry.rawPath?.length ?? 0);
    const many = listed.length + batch.length > MAX_ENTRIES;
    if (many || length > MAX_PATHS) {
      const what = many ? `${MAX_ENTRIES} entries` : `${MAX_PATHS} characters of paths`;
      throw new AgentVmError(
        "RESULT_TOO_LARGE",
        readable(
          `${quoted(path)} has more than ${what}: ` +
            "agent.walk(path, { recursive }) tells them one after the other",
        ),
      );
    }
    for (const entry of batch) listed.push(entry);
  }
  return listed;
}

async function* batches(
  vm: NativeVm,
  path: Api.VmPath,
  { signal, ...rest }: Api.ReaddirOptions,
  recursive: boolean,
): AsyncGenerator<Api.DirectoryEntry[], void> {
  const below = new Below(path);
  const text = json("options", { ...rest, recursive });
  const records = await abortable(signal, (abort) => vm.list(path, text, abort));
  const onAbort = () => records.close();
  signal?.addEventListener("abort", onAbort, { once: true });
  try {
    for (;;) {
      const batch = await call(records.next());
      if (signal?.aborted) throw aborted(signal);
      if (batch === null || batch === undefined) return;
      yield entries(below, batch);
    }
  } finally {
    signal?.removeEventListener("abort", onAbort);
    records.close();
  }
}

export function walk(
  vm: NativeVm,
  path: Api.VmPath,
  options: Api.WalkOptions,
): Api.FileIterator<Api.DirectoryEntry> {
  const { signal, recursive = true, ...rest } = requireOptions(options, OPTIONS.walk);
  const text = json("options", { ...rest, recursive, atLeisure: true });
  callSync(() => vm.checkList(path, text));
  const below = new Below(path);
  return new FileIterator(
    () => abortable(signal, (abort) => vm.list(path, text, abort)),
    (batch) => entries(below, batch),
    signal,
  );
}

export async function watch(
  vm: NativeVm,
  path: Api.VmPath,
  options: Api.WatchOptions,
): Promise<Api.FileIterator<Api.FileEvent>> {
  const { signal, ...rest } = requireOptions(options, OPTIONS.watch);
  const text = json("options", rest);
  const below = new Below(path);
  const records = await abortable(signal, (abort) => vm.watch(path, text, abort));
  // It is in force, and keeps the VM awake, whether or not anybody has asked it for something yet.
  return new FileIterator(records, (batch) => events(below, batch), signal);
}

interface ToldEvent extends Told {
  type: Api.FileEvent["type"];
  from?: string;
  rawFrom?: string;
  directory: boolean;
}

function events(below: Below, text: string): Api.FileEvent[] {
  const told: ToldEvent[] = JSON.parse(text);
  return told.map((event): Api.FileEvent => {
    if (event.type === "overflow") {
      return { type: "overflow" };
    }
    const { type, from, rawFrom, directory, ...at } = event;
    const place = { ...below.path(at), isDirectory: directory };
    if (type !== "moved") {
      return { type, ...place };
    }
    const old = below.path({
      path: from ?? "",
      ...(rawFrom !== undefined && { rawPath: rawFrom }),
    });
    return {
      type,
      ...place,
      from: old.path,
      ...(old.rawPath && { rawFrom: old.rawPath }),
    };
  });
}

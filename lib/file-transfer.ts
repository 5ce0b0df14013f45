/** Files of any length, into a VM and out of it, in constant memory. */

import { Readable, type Writable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { fileURLToPath } from "node:url";
import { types } from "node:util";
import type * as Api from "../index";
import { abortable, throwIfAborted } from "./abort";
import { bytes, json, requireOptions } from "./arguments";
import type { NativeDownload, NativeUpload } from "./binding";
import { aborted, call, callSync, invalidArgument, translate } from "./errors";
import type { native } from "./native";
import { OPTIONS } from "./options";

type NativeVm = InstanceType<typeof native.NativeVm>;

/** Most that crosses to the addon at once: it is copied there. */
const CHUNK = 1024 * 1024;

/** What the addon reads at once. */
const READ_AHEAD = 512 * 1024;

export async function uploadFile(
  vm: NativeVm,
  source: Api.UploadSource,
  path: Api.VmPath,
  options: Api.UploadOptions,
): Promise<void> {
  const { signal, ...rest } = requireOptions(options, OPTIONS.upload);
  const text = json("options", rest);
  const from = hostPath("source", source);
  if (from !== undefined) {
    await abortable(signal, (abort) => vm.uploadFrom(from, path, text, abort));
    return;
  }
  const chunks = iterate(source);
  if (signal) throwIfAborted(signal);
  const upload = await call(vm.openUpload(path, text));
  try {
    await send(upload, chunks, signal);
    await call(upload.finish());
  } catch (error) {
    await upload.abort();
    // Not waited for: it may be what never comes.
    Promise.resolve(chunks.return?.()).catch(() => {});
    throw signal?.aborted ? aborted(signal) : error;
  }
}

type Chunks = AsyncIterator<unknown> | Iterator<unknown>;

function iterate(source: unknown): Chunks {
  if (types.isUint8Array(source)) {
    return [source][Symbol.iterator]();
  }
  if (source instanceof Blob) {
    return source.stream()[Symbol.asyncIterator]();
  }
  if (typeof source === "object" && source !== null) {
    const { [Symbol.asyncIterator]: async, [Symbol.iterator]: sync } = source as Partial<
      AsyncIterable<unknown> & Iterable<unknown>
    >;
    const chunks = async?.call(source) ?? sync?.call(source);
    if (chunks) return chunks;
  }
  throw invalidArgument(
    "source",
    "must be a path of the host, or a Uint8Array, a Blob, a stream or an iterable of chunks",
  );
}

/** Waits for one chunk at a time, and for no chunk longer than somebody wants it. */
async function send(
  upload: NativeUpload,
  chunks: Chunks,
  signal: AbortSignal | undefined,
): Promise<void> {
  let stop: (error: unknown) => void = () => {};
  let stopped: { error: unknown } | undefined;
  let count = 1;
  const end = (error: unknown) => {
    stopped ??= { error };
    stop(error);
  };
  const onAbort = () => signal && end(aborted(signal));
  signal?.addEventListener("abort", onAbort, { once: true });
  // The VM may end while the source has nothing to give.
  call(upload.gone()).catch(end);
  try {
    for (;;) {
      const step = await new Promise<IteratorResult<unknown>>((resolve, reject) => {
        stop = reject;
        if (stopped) reject(stopped.error);
        else Promise.resolve(chunks.next()).then(resolve, reject);
      });
      if (step.done) return;
      const chunk = bytes(`source: chunk ${count++}`, step.value);
      for (let sent = 0; sent < chunk.length; sent += CHUNK) {
        await call(upload.write(chunk.subarray(sent, sent + CHUNK)));
        if (stopped) throw (stopped as { error: unknown }).error;
      }
    }
  } finally {
    signal?.removeEventListener("abort", onAbort);
  }
}

export async function downloadFile(
  vm: NativeVm,
  path: Api.VmPath,
  destination: string | URL | Writable | WritableStream<Uint8Array>,
  options: Api.DownloadOptions,
): Promise<void> {
  const { signal, ...rest } = requireOptions(options, OPTIONS.download);
  const to = hostPath("destination", destination);
  if (to !== undefined) {
    await abortable(signal, (abort) => vm.downloadTo(path, to, json("options", rest), abort));
    return;
  }
  const isStream = (value: unknown): value is Writable =>
    typeof value === "object" && value !== null && ("write" in value || "getWriter" in value);
  if (!isStream(destination)) {
    throw invalidArgument("destination", "must be a path of the host or a writable stream");
  }
  if (signal) throwIfAborted(signal);
  const source = createReadStream(vm, path, rest);
  try {
    await pipeline(source, destination, { ...(signal && { signal }) });
  } catch (error) {
    throw signal?.aborted ? aborted(signal) : error;
  }
}

function hostPath(field: string, value: unknown): string | undefined {
  if (typeof value === "string") return value;
  if (value instanceof URL) {
    if (value.protocol !== "file:") {
      throw invalidArgument(field, `must be a file: URL, not ${value.protocol}`);
    }
    return fileURLToPath(value);
  }
  return undefined;
}

export function createReadStream(
  vm: NativeVm,
  path: Api.VmPath,
  options: Api.ReadStreamOptions,
): Readable {
  const { signal, ...rest } = requireOptions(options, OPTIONS.readStream);
  const text = json("options", rest);
  callSync(() => vm.checkDownload(path, text));
  return new FileReadStream(() => call(vm.openDownload(path, text)), signal);
}

/** Reads no more than is asked for, and one chunk. */
class FileReadStream extends Readable {
  readonly #open: () => Promise<NativeDownload>;
  readonly #signal: AbortSignal | undefined;
  #download: NativeDownload | undefined;

  constructor(open: () => Promise<NativeDownload>, signal: AbortSignal | undefined) {
    super({ highWaterMark: READ_AHEAD });
    this.#open = open;
    this.#signal = signal;
    signal?.addEventListener("abort", this.#abort, { once: true });
    if (signal?.aborted) this.#abort();
  }

  override _read(): void {
    this.#next().then(
      (chunk) => this.push(chunk ?? null),
      (error: unknown) => this.destroy(translate(error) as Error),
    );
  }

  async #next(): Promise<Buffer | null | undefined> {
    this.#download ??= await this.#open();
    if (this.destroyed) {
      this.#download.close();
      return null;
    }
    return await this.#download.read();
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#signal?.removeEventListener("abort", this.#abort);
    this.#download?.close();
    done(error);
  }

  readonly #abort = (): void => {
    if (this.#signal) this.destroy(aborted(this.#signal));
  };
}

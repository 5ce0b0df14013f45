import { Duplex } from "node:stream";
import type * as Api from "../index";
import { abortable } from "./abort";
import { told } from "./arguments";
import { invalidArgument, translate } from "./errors";
import type { native } from "./native";

type NativeVm = InstanceType<typeof native.NativeVm>;
type NativeConnection = InstanceType<typeof native.NativeConnection>;

/** Most that crosses to the addon at once: it is copied there. */
const CHUNK = 256 * 1024;

/** A TCP connection to a server inside a VM. Reads only what is asked for. */
export class VmConnection extends Duplex implements Api.VmConnection {
  readonly #native: NativeConnection;
  /** Bytes that are read at once. */
  readAtMost = CHUNK;

  constructor(native: NativeConnection) {
    super({ allowHalfOpen: true });
    this.#native = native;
  }

  /** Bytes of what was written that the kernel has taken. */
  get taken(): number | null {
    return this.#native.taken();
  }

  override _read(): void {
    this.#native.read(this.readAtMost).then(
      (chunk) => this.push(chunk ?? null),
      (error: unknown) => this.destroy(translate(error) as Error),
    );
  }

  override _write(chunk: Buffer, _encoding: string, done: (error?: Error | null) => void): void {
    this.#send(chunk).then(
      () => done(),
      (error: unknown) => done(translate(error) as Error),
    );
  }

  async #send(chunk: Buffer): Promise<void> {
    for (let sent = 0; sent < chunk.length; sent += CHUNK) {
      await this.#native.write(chunk.subarray(sent, sent + CHUNK));
    }
  }

  override _final(done: (error?: Error | null) => void): void {
    this.#native.end().then(
      () => done(),
      (error: unknown) => done(translate(error) as Error),
    );
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#native.destroy(this.readableEnded && this.writableFinished);
    // As a socket does, which closes later: undici's fetch never ends a body whose connection fails before
    // it has handed out the response.
    setImmediate(done, error);
  }
}

export async function connect(
  vm: NativeVm,
  port: number,
  signal?: AbortSignal,
): Promise<VmConnection> {
  requirePort(port);
  return new VmConnection(await abortable(signal, (abort) => vm.connect(port, abort)));
}

export function requirePort(port: unknown): void {
  if (!Number.isInteger(port) || (port as number) < 1 || (port as number) > 65_535) {
    throw invalidArgument("port", `must be a whole number between 1 and 65535, not ${told(port)}`);
  }
}

/** `AbortSignal`s of callers and the addon's way to give a call up. */

import { aborted, call } from "./errors";
import { native } from "./native";

type NativeAbort = InstanceType<typeof native.NativeAbort>;

/** Runs a call that ends when the signal is aborted. */
export async function abortable<T>(
  signal: AbortSignal | undefined,
  run: (abort: NativeAbort) => Promise<T>,
): Promise<T> {
  const abort = new native.NativeAbort();
  if (!signal) {
    return await call(run(abort));
  }
  throwIfAborted(signal);
  const onAbort = () => abort.abort();
  signal.addEventListener("abort", onAbort, { once: true });
  try {
    return await call(run(abort));
  } catch (error) {
    throw signal.aborted ? aborted(signal) : error;
  } finally {
    signal.removeEventListener("abort", onAbort);
  }
}

export function throwIfAborted(signal: AbortSignal): void {
  if (signal.aborted) {
    throw aborted(signal);
  }
}

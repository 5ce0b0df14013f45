import type * as Api from "../index";
import { abortable } from "./abort";
import { requireOptions, requireString, requireValue } from "./arguments";
import { call, invalidArgument } from "./errors";
import type { native } from "./native";
import { OPTIONS } from "./options";

type NativeClient = InstanceType<typeof native.NativeClient>;

/** `client.images`. */
export class ImageStore implements Api.ImageStore {
  readonly #native: NativeClient;

  constructor(client: NativeClient) {
    this.#native = client;
  }

  async list(): Promise<Api.ImageRecord[]> {
    return JSON.parse(await call(this.#native.listImages()));
  }

  async pull(
    image: string | Api.OciLayoutImage,
    options: Api.PullOptions = {},
  ): Promise<Api.ImageRecord> {
    const { signal, onProgress } = requireOptions(options, OPTIONS.pull, "onProgress");
    if (onProgress !== undefined && typeof onProgress !== "function") {
      throw invalidArgument("onProgress", "must be a function");
    }
    if (image === undefined) {
      throw invalidArgument("image", "must be a name or { ociLayout, tag? }");
    }
    const source = requireValue("image", image);
    const tell = (progress: string) => onProgress?.(JSON.parse(progress));
    const pulled = await abortable(signal, (abort) => this.#native.pullImage(source, tell, abort));
    return JSON.parse(pulled);
  }

  async remove(image: string): Promise<Api.ImageRemoval> {
    requireString("image", image);
    return JSON.parse(await call(this.#native.removeImage(image)));
  }

  async prune(options: Api.PruneOptions = {}): Promise<Api.ImagePruneResult> {
    const { dryRun = false } = requireOptions(options, OPTIONS.prune);
    if (typeof dryRun !== "boolean") {
      throw invalidArgument("dryRun", "must be a boolean");
    }
    return JSON.parse(await call(this.#native.pruneImages(dryRun)));
  }
}

import type { Readable, Writable } from "node:stream";
import type { WebSocket } from "undici";
import type * as Api from "../index";
import { abortable, throwIfAborted } from "./abort";
import {
  bytes,
  isPlainObject,
  json,
  requireFields,
  requireJson,
  requireOptions,
  requireString,
  requireValue,
  told,
} from "./arguments";
import { connect, requirePort } from "./connection";
import { aborted, call, callSync, invalidArgument } from "./errors";
import { createReadStream, downloadFile, uploadFile } from "./file-transfer";
import {
  copy,
  link,
  readdir,
  readFile,
  readFiles,
  requirePath,
  utimes,
  walk,
  watch,
  writeFiles,
} from "./files";
import { Listeners } from "./listeners";
import { native } from "./native";
import { FIELDS, OPTIONS } from "./options";
import { elements } from "./parts";
import { processEnd, requirePid, shellEnd, treeOf } from "./processes";
import { SessionEvents } from "./session-events";
import { vmFetch, vmWebSocket } from "./vm-fetch";

type NativeVm = InstanceType<typeof native.NativeVm>;

export class Agent implements Api.Agent {
  readonly key: readonly string[];
  #vm: NativeVm;
  readonly #listeners: Listeners;

  constructor(vm: NativeVm, key: readonly string[]) {
    this.#vm = vm;
    this.key = Object.freeze(key);
    this.#listeners = new Listeners(vm);
  }

  get native(): NativeVm {
    return this.#vm;
  }

  /** The same VM with other options, for the calls from now on. */
  use(vm: NativeVm): void {
    this.#vm = vm;
  }

  // Sessions

  async createSession(
    agentType: string,
    options: Api.CreateSessionOptions = {},
  ): Promise<Api.Session> {
    requireString("agentType", agentType);
    const { signal, ...rest } = requireOptions(options, OPTIONS.createSession);
    // The VM is the boundary: nobody has to be asked, unless somebody listens for it.
    const permissionPolicy = this.#listeners.has("permissionRequest") ? "ask" : "allow";
    const all = json("options", {
      ...rest,
      permissionPolicy: rest.permissionPolicy ?? permissionPolicy,
    });
    return JSON.parse(
      await abortable(signal, (abort) => this.#vm.createSession(agentType, all, abort)),
    );
  }

  async sendPrompt(
    sessionId: string,
    text: string | readonly Api.ContentBlock[],
    options: Api.SendPromptOptions = {},
  ): Promise<Api.PromptResult> {
    requireString("sessionId", sessionId);
    const { signal } = requireOptions(options, OPTIONS.sendPrompt);
    if (signal) {
      throwIfAborted(signal);
    }
    if (typeof text !== "string" && !Array.isArray(text)) {
      throw invalidArgument("text", "must be a string or an array of content blocks");
    }
    const turn = call(this.#vm.sendPrompt(sessionId, requireJson("text", text)));
    if (!signal) {
      return JSON.parse(await turn);
    }
    // An abort ends the turn itself, not only the wait for it; then it does not wait for listeners.
    let cancelling: Promise<unknown> | undefined;
    let abort = () => {};
    const stopped = new Promise<never>((_resolve, reject) => {
      abort = () => {
        cancelling = this.cancelPrompt(sessionId).then(
          ({ cancelled }) => cancelled && reject(aborted(signal)),
          () => {}, // the turn reports what went wrong
        );
      };
    });
    signal.addEventListener("abort", abort, { once: true });
    try {
      const result = await Promise.race([turn, stopped]);
      if (signal.aborted) {
        throw aborted(signal);
      }
      return JSON.parse(result);
    } catch (error) {
      throw signal.aborted ? aborted(signal) : error;
    } finally {
      signal.removeEventListener("abort", abort);
      await cancelling; // so that it can't meet the next turn
    }
  }

  async cancelPrompt(sessionId: string): Promise<Api.CancelResult> {
    requireString("sessionId", sessionId);
    return { cancelled: await call(this.#vm.cancelPrompt(sessionId)) };
  }

  async resumeSession(
    sessionId: string,
    options: Api.ResumeSessionOptions = {},
  ): Promise<Api.SessionState> {
    requireString("sessionId", sessionId);
    const rest = requireOptions(options, OPTIONS.resumeSession);
    return JSON.parse(await call(this.#vm.resumeSession(sessionId, json("options", rest))));
  }

  async closeSession(sessionId: string): Promise<void> {
    requireString("sessionId", sessionId);
    await call(this.#vm.closeSession(sessionId));
  }

  async destroySession(sessionId: string): Promise<void> {
    requireString("sessionId", sessionId);
    await call(this.#vm.destroySession(sessionId));
  }

  async listSessions(): Promise<Api.SessionState[]> {
    return await elements(await call(this.#vm.listSessions()));
  }

  async getSession(sessionId: string): Promise<Api.SessionState> {
    requireString("sessionId", sessionId);
    return JSON.parse(await call(this.#vm.getSession(sessionId)));
  }

  async listPersistedSessions(): Promise<Api.PersistedSession[]> {
    return await elements(await call(this.#vm.listPersistedSessions()));
  }

  // Configuration

  async setModel(sessionId: string, model: string): Promise<Api.JsonObject> {
    requireString("sessionId", sessionId);
    requireString("model", model);
    return JSON.parse(await call(this.#vm.setModel(sessionId, model)));
  }

  async setMode(sessionId: string, modeId: string): Promise<Api.JsonObject> {
    requireString("sessionId", sessionId);
    requireString("modeId", modeId);
    return JSON.parse(await call(this.#vm.setMode(sessionId, modeId)));
  }

  async setThoughtLevel(sessionId: string, level: string): Promise<Api.JsonObject> {
    requireString("sessionId", sessionId);
    requireString("level", level);
    return JSON.parse(await call(this.#vm.setThoughtLevel(sessionId, level)));
  }

  async setConfigOption(
    sessionId: string,
    optionId: string,
    value: string | boolean,
  ): Promise<Api.JsonObject> {
    requireString("sessionId", sessionId);
    requireString("optionId", optionId);
    const text = requireJson("value", value);
    return JSON.parse(await call(this.#vm.setConfigOption(sessionId, optionId, text)));
  }

  async getModes(sessionId: string): Promise<Api.SessionModes | null> {
    requireString("sessionId", sessionId);
    return JSON.parse(await call(this.#vm.getModes(sessionId)));
  }

  async getConfigOptions(sessionId: string): Promise<Api.ConfigOption[]> {
    requireString("sessionId", sessionId);
    return JSON.parse(await call(this.#vm.getConfigOptions(sessionId)));
  }

  async rawSend(
    sessionId: string,
    method: string,
    params?: Readonly<Record<string, unknown>>,
  ): Promise<Api.JsonValue> {
    requireString("sessionId", sessionId);
    requireString("method", method);
    const text = params === undefined ? undefined : requireJson("params", params);
    return JSON.parse(await call(this.#vm.rawSend(sessionId, method, text)));
  }

  // Permissions

  async respondPermission(
    sessionId: string,
    permissionId: string,
    answer: Api.PermissionAnswer,
  ): Promise<Api.PermissionResponse> {
    requireString("sessionId", sessionId);
    requireString("permissionId", permissionId);
    requireString("answer", answer);
    return JSON.parse(await call(this.#vm.respondPermission(sessionId, permissionId, answer)));
  }

  // The event log

  async getEvents(
    sessionId: string,
    options: Api.EventQuery = {},
  ): Promise<Api.JsonRpcNotification[]> {
    requireString("sessionId", sessionId);
    const query = json("options", requireOptions(options, OPTIONS.events));
    return elements(await call(this.#vm.getEvents(sessionId, query)));
  }

  async getSequencedEvents(
    sessionId: string,
    options: Api.EventQuery = {},
  ): Promise<Api.SequencedEvent[]> {
    requireString("sessionId", sessionId);
    const query = json("options", requireOptions(options, OPTIONS.events));
    return elements(await call(this.#vm.getSequencedEvents(sessionId, query)));
  }

  async getSessionEvents(
    sessionId: string,
    options: Api.EventQuery = {},
  ): Promise<Api.PersistedEvent[]> {
    requireString("sessionId", sessionId);
    const query = json("options", requireOptions(options, OPTIONS.events));
    return elements(await call(this.#vm.getSessionEvents(sessionId, query)));
  }

  sessionEvents(
    sessionId: string,
    options: Api.SessionEventsOptions = {},
  ): Api.SessionEventIterator {
    requireString("sessionId", sessionId);
    const { signal, ...rest } = requireOptions(options, OPTIONS.sessionEvents);
    const query = json("options", rest);
    return new SessionEvents(
      callSync(() => this.#vm.sessionEvents(sessionId, query)),
      signal,
    );
  }

  // Processes

  async exec(command: string, options: Api.ExecOptions = {}): Promise<Api.ExecResult> {
    requireString("command", command);
    const { signal, stdin, ...rest } = requireOptions(options, OPTIONS.exec, "stdin");
    const input = stdin === undefined ? undefined : bytes("stdin", stdin);
    const result = await abortable(signal, (abort) =>
      this.#vm.exec(command, json("options", rest), input, abort),
    );
    return {
      stdout: result.stdout.toString("utf8"),
      stderr: result.stderr.toString("utf8"),
      exitCode: result.exitCode ?? null,
      signal: result.signal ?? null,
      truncated: result.truncated,
    };
  }

  async spawn(
    command: string,
    args: readonly string[] = [],
    options: Api.SpawnOptions = {},
  ): Promise<Api.SpawnedProcess> {
    requireString("command", command);
    const { signal, stdin, ...rest } = requireOptions(options, OPTIONS.spawn, "stdin");
    const input = stdin === undefined ? undefined : bytes("stdin", stdin);
    requireValue("args", args);
    const words = json("args", { args });
    const all = json("options", rest);
    const pid = await abortable(signal, (abort) =>
      this.#vm.spawn(command, words, all, input, abort),
    );
    const kill = () => void this.#vm.killProcess(pid).catch(() => {}); // it has ended
    signal?.addEventListener("abort", kill, { once: true });
    if (signal?.aborted) {
      kill();
    }
    // A promise keeps Node alive, as long as the process runs.
    this.#vm
      .waitProcess(pid, new native.NativeAbort())
      .catch(() => {}) // the client was closed
      .finally(() => signal?.removeEventListener("abort", kill));
    return { pid };
  }

  async writeProcessStdin(pid: number, data: string | Uint8Array): Promise<void> {
    requirePid(pid);
    await call(this.#vm.writeProcessStdin(pid, bytes("data", data)));
  }

  async closeProcessStdin(pid: number): Promise<void> {
    requirePid(pid);
    await call(this.#vm.closeProcessStdin(pid));
  }

  async waitProcess(pid: number, options: Api.WaitOptions = {}): Promise<Api.ProcessEnd> {
    requirePid(pid);
    const { signal } = requireOptions(options, OPTIONS.wait);
    this.#listeners.settleOutput();
    return processEnd(await abortable(signal, (abort) => this.#vm.waitProcess(pid, abort)));
  }

  async signalProcess(pid: number, signal: string | number): Promise<void> {
    requirePid(pid);
    if (typeof signal !== "string" && typeof signal !== "number") {
      throw invalidArgument("signal", `must be a name or a number, not ${told(signal)}`);
    }
    await call(this.#vm.signalProcess(pid, String(signal)));
  }

  async stopProcess(pid: number): Promise<void> {
    await this.signalProcess(pid, "SIGTERM");
  }

  async killProcess(pid: number): Promise<void> {
    requirePid(pid);
    await call(this.#vm.killProcess(pid));
  }

  async listProcesses(): Promise<Api.ProcessRecord[]> {
    return JSON.parse(await call(this.#vm.listProcesses()));
  }

  async getProcess(pid: number): Promise<Api.ProcessRecord> {
    requirePid(pid);
    return JSON.parse(await call(this.#vm.getProcess(pid)));
  }

  async allProcesses(): Promise<Api.VmProcess[]> {
    return JSON.parse(await call(this.#vm.allProcesses()));
  }

  async processTree(): Promise<Api.ProcessTree[]> {
    return treeOf(await this.allProcesses());
  }

  // Terminals

  async openShell(options: Api.ShellOptions = {}): Promise<Api.Shell> {
    const shellId = await call(
      this.#vm.openShell(json("options", requireOptions(options, OPTIONS.openShell))),
    );
    // A promise keeps Node alive, as long as the shell runs.
    this.#vm.waitShell(shellId, new native.NativeAbort()).catch(() => {}); // the client was closed
    return { shellId };
  }

  async writeShell(shellId: string, data: string | Uint8Array): Promise<void> {
    requireString("shellId", shellId);
    await call(this.#vm.writeShell(shellId, bytes("data", data)));
  }

  async resizeShell(shellId: string, size: Api.ShellSize): Promise<void> {
    requireString("shellId", shellId);
    await call(
      this.#vm.resizeShell(shellId, json("size", requireFields("size", size, FIELDS.size))),
    );
  }

  async closeShell(shellId: string): Promise<void> {
    requireString("shellId", shellId);
    this.#listeners.settleOutput();
    await call(this.#vm.closeShell(shellId));
  }

  async listShells(): Promise<Api.ShellRecord[]> {
    return JSON.parse(await call(this.#vm.listShells()));
  }

  async waitShell(shellId: string, options: Api.WaitOptions = {}): Promise<Api.ShellEnd> {
    requireString("shellId", shellId);
    const { signal } = requireOptions(options, OPTIONS.wait);
    this.#listeners.settleOutput();
    return shellEnd(await abortable(signal, (abort) => this.#vm.waitShell(shellId, abort)));
  }

  // Files

  readFile(path: Api.VmPath, options: Api.ReadFileOptions & { encoding: "utf8" }): Promise<string>;
  readFile(
    path: Api.VmPath,
    options?: Api.ReadFileOptions & { encoding?: "buffer" },
  ): Promise<Uint8Array>;
  async readFile(
    path: Api.VmPath,
    options: Api.ReadFileOptions & { encoding?: "utf8" | "buffer" } = {},
  ): Promise<string | Uint8Array> {
    return await readFile(this.#vm, requirePath("path", path), options);
  }

  async writeFile(
    path: Api.VmPath,
    content: string | Uint8Array,
    options: Api.WriteFileOptions = {},
  ): Promise<void> {
    const data = bytes("content", content);
    const text = json("options", requireOptions(options, OPTIONS.writeFile));
    await call(this.#vm.writeFile(requirePath("path", path), data, false, text));
  }

  async readFiles(
    paths: readonly Api.VmPath[],
    options: Api.FileOptions = {},
  ): Promise<Api.ReadFilesResult[]> {
    return await readFiles(this.#vm, paths, options);
  }

  async writeFiles(
    files: readonly Api.FileToWrite[],
    options: Api.FileOptions = {},
  ): Promise<Api.WriteFilesResult[]> {
    return await writeFiles(this.#vm, files, options);
  }

  async mkdir(path: Api.VmPath, options: Api.MkdirOptions = {}): Promise<void> {
    const text = json("options", requireOptions(options, OPTIONS.mkdir));
    await call(this.#vm.mkdir(requirePath("path", path), text));
  }

  async readdir(path: Api.VmPath, options: Api.ReaddirOptions = {}): Promise<Api.DirectoryEntry[]> {
    return await readdir(this.#vm, requirePath("path", path), options, false);
  }

  async readdirRecursive(
    path: Api.VmPath,
    options: Api.ReaddirRecursiveOptions = {},
  ): Promise<Api.DirectoryEntry[]> {
    return await readdir(this.#vm, requirePath("path", path), options, true);
  }

  walk(path: Api.VmPath, options: Api.WalkOptions = {}): Api.FileIterator<Api.DirectoryEntry> {
    return walk(this.#vm, requirePath("path", path), options);
  }

  async stat(path: Api.VmPath, options: Api.StatOptions = {}): Promise<Api.FileStat> {
    const text = json("options", requireOptions(options, OPTIONS.stat));
    return JSON.parse(await call(this.#vm.stat(requirePath("path", path), text)));
  }

  async exists(path: Api.VmPath, options: Api.FileOptions = {}): Promise<boolean> {
    const text = json("options", requireOptions(options, OPTIONS.file));
    return await call(this.#vm.exists(requirePath("path", path), text));
  }

  async move(from: Api.VmPath, to: Api.VmPath, options: Api.MoveOptions = {}): Promise<void> {
    const text = json("options", requireOptions(options, OPTIONS.move));
    await call(this.#vm.move(requirePath("from", from), requirePath("to", to), text));
  }

  async copy(from: Api.VmPath, to: Api.VmPath, options: Api.CopyOptions = {}): Promise<void> {
    await copy(this.#vm, requirePath("from", from), requirePath("to", to), options);
  }

  async delete(path: Api.VmPath, options: Api.DeleteOptions = {}): Promise<void> {
    requirePath("path", path);
    const { signal, ...rest } = requireOptions(options, OPTIONS.delete);
    const text = json("options", rest);
    await abortable(signal, (abort) => this.#vm.delete(path, text, abort));
  }

  async chmod(path: Api.VmPath, mode: number, options: Api.FileOptions = {}): Promise<void> {
    if (!Number.isInteger(mode) || mode < 0 || mode > 0o7777) {
      throw invalidArgument(
        "mode",
        `must be a whole number between 0 and 0o7777, not ${told(mode)}`,
      );
    }
    const text = json("options", requireOptions(options, OPTIONS.file));
    await call(this.#vm.chmod(requirePath("path", path), mode, text));
  }

  async chown(path: Api.VmPath, owner: Api.Owner, options: Api.StatOptions = {}): Promise<void> {
    const { uid, gid } = requireFields("owner", owner, FIELDS.owner);
    const text = json("options", { ...requireOptions(options, OPTIONS.stat), uid, gid });
    await call(this.#vm.chown(requirePath("path", path), text));
  }

  async utimes(
    path: Api.VmPath,
    times: Api.FileTimes,
    options: Api.StatOptions = {},
  ): Promise<void> {
    await utimes(this.#vm, requirePath("path", path), times, options);
  }

  async symlink(
    target: Api.VmPath,
    path: Api.VmPath,
    options: Api.FileOptions = {},
  ): Promise<void> {
    requirePath("target", target);
    const text = json("options", requireOptions(options, OPTIONS.file));
    await call(this.#vm.symlink(target, requirePath("path", path), text));
  }

  readlink(
    path: Api.VmPath,
    options: Api.LinkOptions & { encoding: "buffer" },
  ): Promise<Uint8Array>;
  readlink(path: Api.VmPath, options?: Api.LinkOptions & { encoding?: "utf8" }): Promise<string>;
  async readlink(path: Api.VmPath, options: Api.LinkOptions = {}): Promise<string | Uint8Array> {
    requirePath("path", path);
    return await link(options, (text) => this.#vm.readlink(path, text));
  }

  realpath(
    path: Api.VmPath,
    options: Api.LinkOptions & { encoding: "buffer" },
  ): Promise<Uint8Array>;
  realpath(path: Api.VmPath, options?: Api.LinkOptions & { encoding?: "utf8" }): Promise<string>;
  async realpath(path: Api.VmPath, options: Api.LinkOptions = {}): Promise<string | Uint8Array> {
    requirePath("path", path);
    return await link(options, (text) => this.#vm.realpath(path, text));
  }

  async uploadFile(
    source: Api.UploadSource,
    path: Api.VmPath,
    options: Api.UploadOptions = {},
  ): Promise<void> {
    await uploadFile(this.#vm, source, requirePath("path", path), options);
  }

  async downloadFile(
    path: Api.VmPath,
    destination: string | URL | Writable | WritableStream<Uint8Array>,
    options: Api.DownloadOptions = {},
  ): Promise<void> {
    await downloadFile(this.#vm, requirePath("path", path), destination, options);
  }

  createReadStream(path: Api.VmPath, options: Api.ReadStreamOptions = {}): Readable {
    return createReadStream(this.#vm, requirePath("path", path), options);
  }

  async watch(
    path: Api.VmPath,
    options: Api.WatchOptions = {},
  ): Promise<Api.FileIterator<Api.FileEvent>> {
    return await watch(this.#vm, requirePath("path", path), options);
  }

  // Servers inside

  async vmFetch(port: number, path: string, init: Api.VmFetchInit = {}): Promise<Response> {
    return await vmFetch(this.#vm, port, path, init);
  }

  vmWebSocket(port: number, path: string, protocols?: string | readonly string[]): WebSocket {
    return vmWebSocket(this.#vm, port, path, protocols);
  }

  async connect(port: number, options: Api.ConnectOptions = {}): Promise<Api.VmConnection> {
    const { signal } = requireOptions(options, OPTIONS.connect);
    return await connect(this.#vm, port, signal);
  }

  async waitForPort(port: number, options: Api.ConnectOptions = {}): Promise<void> {
    requirePort(port);
    const { signal } = requireOptions(options, OPTIONS.connect);
    await abortable(signal, (abort) => this.#vm.waitForPort(port, abort));
  }

  async listeningPorts(): Promise<Api.ListeningPort[]> {
    return JSON.parse(await call(this.#vm.listeningPorts()));
  }

  // Life

  async stats(): Promise<Api.VmStats> {
    return JSON.parse(await call(this.#vm.stats()));
  }

  async setSecrets(secrets: Readonly<Record<string, Api.SecretOptions>>): Promise<void> {
    // Their names are the caller's.
    const names = isPlainObject(secrets) ? Object.keys(secrets) : [];
    await call(this.#vm.setSecrets(json("secrets", requireFields("secrets", secrets, names))));
  }

  async setNetwork(network: Api.NetworkRules): Promise<void> {
    const rules = requireFields("network", network, FIELDS.network);
    await call(this.#vm.setNetwork(json("network", rules)));
  }

  async sleep(): Promise<void> {
    await call(this.#vm.sleep());
  }

  async wake(): Promise<void> {
    await call(this.#vm.wake());
  }

  async destroy(): Promise<void> {
    await call(this.#vm.destroy());
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.sleep();
  }

  // Events

  on<E extends keyof Api.AgentEvents>(event: E, listener: Api.Listener<E>): () => void {
    return this.#listeners.add(event, listener, false);
  }

  once<E extends keyof Api.AgentEvents>(event: E, listener: Api.Listener<E>): () => void {
    return this.#listeners.add(event, listener, true);
  }

  off<E extends keyof Api.AgentEvents>(event: E, listener: Api.Listener<E>): void {
    this.#listeners.remove(event, listener);
  }

  stopListening(): void {
    this.#listeners.removeAll();
  }
}

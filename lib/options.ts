/** The names of the options that each call takes. */

import type * as Api from "../index";

/** All of a type, which the compiler sees to: what they mean is in `index.d.ts`. */
const names = <T>(all: Record<keyof T, true>): readonly string[] => Object.keys(all);

const user = true;
const signal = true;
const encoding = true;

const FILE = { user } as const;
const READ = { ...FILE, offset: true, length: true } as const;
const RUN = { env: true, cwd: true, user } as const;
const START = { ...RUN, stdin: true, timeoutMs: true, maxOutputBytes: true, signal } as const;
const RANGE = { since: true, limit: true, method: true } as const;
const VM = {
  loopbackExemptPorts: true,
  sleepAfterMs: true,
  limits: true,
  mounts: true,
  image: true,
  network: true,
  secrets: true,
} as const;

export const OPTIONS = {
  createClient: names<Api.ClientOptions>({
    ...VM,
    dataDir: true,
    agentStoreDir: true,
    imageStoreDir: true,
    autoInstall: true,
    durability: true,
    maxMessageBytes: true,
    cancelGraceMs: true,
    agents: true,
    additionalInstructions: true,
  }),
  getOrCreate: names<Api.VmOptions>(VM),
  createSession: names<Api.CreateSessionOptions>({
    env: true,
    cwd: true,
    mcpServers: true,
    additionalInstructions: true,
    skipOsInstructions: true,
    permissionPolicy: true,
    model: true,
    mode: true,
    thoughtLevel: true,
    persistEnv: true,
    signal,
  }),
  resumeSession: names<Api.ResumeSessionOptions>({ env: true, mcpServers: true }),
  sendPrompt: names<Api.SendPromptOptions>({ signal }),
  events: names<Api.EventQuery>(RANGE),
  sessionEvents: names<Api.SessionEventsOptions>({ since: true, follow: true, signal }),
  exec: names<Api.ExecOptions>(START),
  spawn: names<Api.SpawnOptions>(START),
  wait: names<Api.WaitOptions>({ signal }),
  openShell: names<Api.ShellOptions>({ ...RUN, command: true, args: true, cols: true, rows: true }),
  file: names<Api.FileOptions>(FILE),
  readFile: names<Api.ReadFileOptions & { encoding: unknown }>({ ...READ, encoding }),
  writeFile: names<Api.WriteFileOptions>({ ...FILE, mode: true, append: true }),
  fileToWrite: names<Api.FileToWrite>({ path: true, content: true, mode: true, append: true }),
  mkdir: names<Api.MkdirOptions>({ ...FILE, recursive: true, mode: true }),
  readdir: names<Api.ReaddirOptions>({ ...FILE, signal }),
  readdirRecursive: names<Api.ReaddirRecursiveOptions>({ ...FILE, skipUnreadable: true, signal }),
  walk: names<Api.WalkOptions>({ ...FILE, recursive: true, skipUnreadable: true, signal }),
  stat: names<Api.StatOptions>({ ...FILE, followSymlinks: true }),
  move: names<Api.MoveOptions>({ ...FILE, overwrite: true }),
  copy: names<Api.CopyOptions>({ ...FILE, recursive: true, overwrite: true, signal }),
  delete: names<Api.DeleteOptions>({ ...FILE, recursive: true, force: true, signal }),
  link: names<Api.LinkOptions>({ ...FILE, encoding }),
  upload: names<Api.UploadOptions>({ ...FILE, mode: true, signal }),
  download: names<Api.DownloadOptions>({ ...FILE, signal }),
  readStream: names<Api.ReadStreamOptions>({ ...READ, signal }),
  watch: names<Api.WatchOptions>({ ...FILE, recursive: true, signal }),
  connect: names<Api.ConnectOptions>({ signal }),
  install: names<Api.InstallOptions>({ onProgress: true, signal }),
  pull: names<Api.PullOptions>({ onProgress: true, signal }),
  prune: names<Api.PruneOptions>({ dryRun: true }),
} as const;

/** The same of arguments that are objects, too. */
export const FIELDS = {
  times: names<Api.FileTimes>({ atimeMs: true, mtimeMs: true }),
  owner: names<Api.Owner>({ uid: true, gid: true }),
  size: names<Api.ShellSize>({ cols: true, rows: true }),
  network: names<Api.NetworkRules>({ default: true, allow: true, deny: true }),
} as const;

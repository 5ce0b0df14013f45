/** `npx agentvm shell`: a VM's shell on this terminal. */

import { constants } from "node:os";
import type * as Api from "../index";
import { AgentVmError } from "./errors";
import { tell } from "./terminal-output";

type Options = Pick<Api.ShellOptions, "user" | "cwd" | "env">;

/** Undoes what a program that was cut off may have left of a terminal: another screen, no cursor, … */
const RESET = "\x1b[?1049l\x1b[?25h\x1b[?2004l\x1b[?1000l\x1b[?1l\x1b>\x1b[0m";

/** Signals that end this program, and with it what it has started. */
const ENDING = ["SIGHUP", "SIGINT", "SIGTERM"] as const;

type EndingSignal = (typeof ENDING)[number];

/** How long a program whose output nobody reads any more may go on. */
const WITHOUT_READER_MS = 1000;

/** What execve(2) says of a file that is there, and can't be run. */
const NOT_EXECUTABLE = new Set([
  "E2BIG",
  "EACCES",
  "EISDIR",
  "ELOOP",
  "ENAMETOOLONG",
  "ENOEXEC",
  "ENOTDIR",
  "EPERM",
  "ETXTBSY",
]);

/** Runs a command, or a shell, to its end. Resolves to the exit code. */
export async function attach(
  agent: Api.Agent,
  command: readonly string[],
  options: Options,
): Promise<number> {
  const { stdin, stdout } = process;
  const signals = new Signals();
  agent.on("limitReached", ({ detail }) => tell(`VM_LIMIT: ${detail}`));
  // Its failures are not those of the command.
  await agent.wake();
  try {
    if (!stdin.isTTY || !stdout.isTTY) {
      return codeOf(await onPipes(agent, command, options, signals));
    }
    const end = await onTerminal(agent, command, options, signals);
    // What a signal has ended is this program, and by that its shell.
    return codeOf(signals.first === undefined ? end : { exitCode: null, signal: signals.first });
  } catch (error) {
    const code = codeOfFailure(error);
    if (code === undefined) throw error;
    tell(`${(error as AgentVmError).code}: ${(error as AgentVmError).message}`);
    return code;
  }
}

/** As shells have it, for a command that was not started. */
function codeOfFailure(error: unknown): number | undefined {
  if (!(error instanceof AgentVmError)) return undefined;
  if (error.code === "ENOENT") return 127;
  return NOT_EXECUTABLE.has(error.code) ? 126 : undefined;
}

/** The signals that this program gets. From the beginning: while the VM boots, too, it ends in order. */
class Signals {
  /** The one that came first. */
  first: EndingSignal | undefined;
  #tell: ((signal: EndingSignal) => void) | undefined;

  constructor() {
    for (const signal of ENDING) {
      process.on(signal, () => {
        this.first ??= signal;
        this.#tell?.(signal);
      });
    }
  }

  /** Tells those that come, and the one that has come. */
  each(tell: (signal: EndingSignal) => void): void {
    this.#tell = tell;
    if (this.first !== undefined) tell(this.first);
  }
}

async function onTerminal(
  agent: Api.Agent,
  command: readonly string[],
  options: Options,
  signals: Signals,
): Promise<Api.ShellEnd> {
  const { stdin, stdout } = process;
  const [program, ...args] = command;
  agent.on("shellData", ({ data }) => stdout.write(data));
  const { shellId } = await agent.openShell({
    ...options,
    ...(program !== undefined && { command: program, args }),
    ...size(),
  });
  // The window may have changed meanwhile, or changes later.
  const resize = () => void agent.resizeShell(shellId, size()).catch(() => {}); // it has ended
  const close = () => void agent.closeShell(shellId).catch(() => {}); // it has ended
  const restore = () => stdin.setRawMode(false);
  // Whatever ends this program: an error of ours, too.
  process.once("exit", restore);
  stdin.setRawMode(true);
  resize();
  stdout.on("resize", resize);
  stdin.on("data", (data: Buffer) => void agent.writeShell(shellId, data).catch(() => {}));
  stdin.once("end", close);
  signals.each(close);
  try {
    const end = await agent.waitShell(shellId);
    if (end.signal !== null) {
      stdout.write(RESET);
    }
    return end;
  } finally {
    restore();
    stdout.off("resize", resize);
    stdin.destroy();
  }
}

async function onPipes(
  agent: Api.Agent,
  command: readonly string[],
  options: Options,
  signals: Signals,
): Promise<Api.ProcessEnd> {
  const { stdin, stdout, stderr } = process;
  const [program, ...args] = command;
  const gone = new Set<NodeJS.WriteStream>();
  agent.on("processOutput", ({ stream, data }) => {
    const to = stream === "stdout" ? stdout : stderr;
    if (!gone.has(to)) to.write(data);
  });
  const { pid } = await agent.spawn(
    program ?? "sh",
    program === undefined ? ["-l"] : args,
    options,
  );
  // Who reads what comes is gone: so is who writes it, as in a pipe.
  const send = (signal: string) => void agent.signalProcess(pid, signal).catch(() => {}); // it has ended
  for (const stream of [stdout, stderr]) {
    // Each write that is on its way fails by itself.
    stream.on("error", () => {
      if (gone.has(stream)) return;
      gone.add(stream);
      send("SIGPIPE");
      // Who ignores that would be told by its next write.
      setTimeout(send, WITHOUT_READER_MS, "SIGTERM").unref();
    });
  }
  signals.each(send);
  stdin.on("data", async (data: Buffer) => {
    stdin.pause();
    try {
      await agent.writeProcessStdin(pid, data);
      stdin.resume();
    } catch {
      stdin.destroy(); // nobody reads it
    }
  });
  stdin.once("end", () => void agent.closeProcessStdin(pid).catch(() => {}));
  const end = await agent.waitProcess(pid);
  stdin.destroy();
  return end;
}

function size(): Api.ShellSize {
  // A terminal that does not know its size says 0.
  return { cols: process.stdout.columns || 80, rows: process.stdout.rows || 24 };
}

function codeOf({ exitCode, signal }: Pick<Api.ShellEnd, "exitCode" | "signal">): number {
  const number = constants.signals[signal as NodeJS.Signals] ?? 0;
  return exitCode ?? 128 + number;
}

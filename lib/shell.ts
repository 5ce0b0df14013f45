/** `npx agentvm shell`: a VM's shell on this terminal. */

import { constants } from "node:os";
import type * as Api from "../index";

type Options = Pick<Api.ShellOptions, "user" | "cwd">;

/** Undoes what a program that was cut off may have left of a terminal: another screen, no cursor, … */
const RESET = "\x1b[?1049l\x1b[?25h\x1b[?2004l\x1b[?1000l\x1b[?1l\x1b>\x1b[0m";

/** Signals that end this program, and with it what it has started. */
const ENDING = ["SIGHUP", "SIGINT", "SIGTERM"] as const;

/** Runs a command, or a shell, to its end. Resolves to the exit code. */
export async function attach(
  agent: Api.Agent,
  command: readonly string[],
  options: Options,
): Promise<number> {
  const { stdin, stdout } = process;
  const end =
    stdin.isTTY && stdout.isTTY
      ? await onTerminal(agent, command, options)
      : await onPipes(agent, command, options);
  return codeOf(end);
}

async function onTerminal(
  agent: Api.Agent,
  command: readonly string[],
  options: Options,
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
  for (const signal of ENDING) {
    process.once(signal, close);
  }
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
): Promise<Api.ProcessEnd> {
  const { stdin, stdout, stderr } = process;
  const [program, ...args] = command;
  agent.on("processOutput", ({ stream, data }) => {
    (stream === "stdout" ? stdout : stderr).write(data);
  });
  const { pid } = await agent.spawn(
    program ?? "sh",
    program === undefined ? ["-l"] : args,
    options,
  );
  // Who reads what comes is gone: so is who writes it, as in a pipe.
  const gone = () => void agent.signalProcess(pid, "SIGPIPE").catch(() => {}); // it has ended
  stdout.once("error", gone);
  stderr.once("error", gone);
  for (const signal of ENDING) {
    process.on(signal, () => void agent.signalProcess(pid, signal).catch(() => {}));
  }
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

function codeOf({ exitCode, signal }: Api.ShellEnd): number {
  const number = constants.signals[signal as NodeJS.Signals] ?? 0;
  return exitCode ?? 128 + number;
}

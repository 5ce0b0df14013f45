/** `npx agentvm shell`, on a real terminal: that of a VM's shell would not do, since no VM runs in a VM. */

import { type ChildProcess, spawn } from "node:child_process";
import { writeFile } from "node:fs/promises";
import { constants } from "node:os";
import { join } from "node:path";
import { expect, onTestFinished, test } from "vitest";
import { isRoot, newDirectory, ROOT, runProgram } from "./fixtures.js";

const CLI = join(ROOT, "dist/cli.js");

/** Runs a program on a terminal of its own; prints at its end how the terminal is set then. */
const ON_TERMINAL = `
import fcntl, os, pty, select, signal, struct, sys, termios
master, slave = pty.openpty()
pid = os.fork()
if pid == 0:
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 111, 0, 0))
    for descriptor in range(3):
        os.dup2(slave, descriptor)
    os.execvp(sys.argv[1], sys.argv[1:])
signal.signal(signal.SIGUSR1, lambda *_: fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 122, 0, 0)))
signal.signal(signal.SIGUSR2, lambda *_: os.kill(pid, signal.SIGTERM))
inputs = [master, 0]
child = os.pidfd_open(pid)
while True:
    ready, _, _ = select.select([child] + inputs, [], [])
    if master in ready:
        os.write(1, os.read(master, 65536))
    elif child in ready:
        break
    elif 0 in ready:
        data = os.read(0, 65536)
        if data: os.write(master, data)
        else: inputs.remove(0)
_, status = os.waitpid(pid, 0)
lflag = termios.tcgetattr(slave)[3]
canonical = bool(lflag & termios.ICANON) and bool(lflag & termios.ECHO)
print("END", os.waitstatus_to_exitcode(status), "canonical" if canonical else "raw", flush=True)
`;

interface Terminal {
  child: ChildProcess;
  type(text: string): void;
  until(pattern: RegExp): Promise<void>;
}

async function onTerminal(...args: string[]): Promise<Terminal> {
  const directory = await newDirectory();
  const driver = join(directory, "terminal.py");
  await writeFile(driver, ON_TERMINAL);
  const child = spawn("python3", [driver, process.execPath, CLI, ...args], { cwd: ROOT });
  onTestFinished(() => {
    child.kill("SIGKILL");
  });
  let seen = "";
  child.stdout.on("data", (data) => {
    seen += data;
  });
  child.stderr.on("data", (data) => {
    seen += data;
  });
  return {
    child,
    type: (text) => child.stdin.write(text),
    until: async (pattern) => {
      await expect.poll(() => seen, { timeout: 30_000, interval: 20 }).toMatch(pattern);
      seen = seen.slice((pattern.exec(seen)?.index ?? 0) + 1);
    },
  };
}

const shell = async (...rest: string[]) => [
  "shell",
  "--data-dir",
  await newDirectory(),
  "vm",
  ...rest,
];

test("a shell is on the caller's terminal, follows its size and leaves it as it was", async () => {
  const terminal = await onTerminal(...(await shell()));
  await terminal.until(/user@agentvm:~\$ /);
  terminal.type("stty size\r");
  await terminal.until(/33 111/);
  terminal.child.kill("SIGUSR1");
  terminal.type(
    "trap 'echo resi''zed' WINCH; until [ \"$(stty size)\" = '44 122' ]; do :; done; echo do''ne\r",
  );
  await terminal.until(/done/);
  // Ctrl-C is the shell's, not ours.
  terminal.type("sleep 1000\r");
  await terminal.until(/sleep 1000/);
  terminal.type("\u0003");
  terminal.type("exit 7\r");
  await terminal.until(/END 7 canonical/);
});

test("a command may take the place of the shell, and its signal is the exit code", async () => {
  const terminal = await onTerminal(...(await shell("--", "sh", "-c", "tty; kill -KILL $$")));
  await terminal.until(/\/dev\/pts\/0/);
  await terminal.until(new RegExp(`END ${128 + constants.signals.SIGKILL} canonical`));
});

test("a signal that ends the command leaves the terminal as it was", async () => {
  const terminal = await onTerminal(...(await shell()));
  await terminal.until(/user@agentvm:~\$ /);
  terminal.child.kill("SIGUSR2");
  await terminal.until(/END \d+ canonical/);
});

test("without a terminal the streams are as they are", async () => {
  const args = await shell("--", "sh", "-c", "cat; echo err >&2; exit 9");
  const child = spawn(process.execPath, [CLI, ...args], { cwd: ROOT });
  let [out, err] = ["", ""];
  child.stdout.on("data", (data) => {
    out += data;
  });
  child.stderr.on("data", (data) => {
    err += data;
  });
  const big = "0123456789\n".repeat(100_000);
  child.stdin.end(big);
  const code = await new Promise((resolve) => child.once("close", resolve));
  expect({ out: out === big, err, code }).toEqual({ out: true, err: "err\n", code: 9 });
});

test("a script on stdin is run", async () => {
  const child = spawn(process.execPath, [CLI, ...(await shell("--cwd", "/tmp"))], { cwd: ROOT });
  let out = "";
  child.stdout.on("data", (data) => {
    out += data;
  });
  child.stdin.end("pwd; exit 4\n");
  expect(await new Promise((resolve) => child.once("close", resolve))).toBe(4);
  expect(out).toBe("/tmp\n");
});

test.runIf(isRoot)("--user root is the VM's root", async () => {
  const args = await shell("--user", "root", "--", "id", "-un");
  expect(await runProgram([CLI, ...args])).toMatchObject({ code: 0, stdout: "root\n" });
});

test("what makes no sense is said, with exit code 2", async () => {
  for (const [args, text] of [
    [["shell"], "shell takes the key of a VM"],
    [["shell", "a", "b"], "Unexpected argument 'b'"],
    [["shell", "--user", "me", "a"], "--user is user or root"],
    [["shell", "--shell", "a"], "--shell"],
  ] as [string[], string][]) {
    const { code, stderr } = await runProgram([CLI, ...args]);
    expect({ code, stderr }).toEqual({ code: 2, stderr: expect.stringContaining(text) });
  }
  const missing = await runProgram([CLI, ...(await shell("--", "no-such"))]);
  expect(missing).toMatchObject({ code: 1, stderr: expect.stringMatching(/^ENOENT: .*no-such/) });
});

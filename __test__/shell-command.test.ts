/** `npx agentvm shell`, on a real terminal: that of a VM's shell would not do, since no VM runs in a VM. */

import { type ChildProcess, spawn } from "node:child_process";
import { writeFile } from "node:fs/promises";
import { constants } from "node:os";
import { join } from "node:path";
import { expect, onTestFinished, test } from "vitest";
import { isRoot, newDirectory, ROOT, runProgram } from "./fixtures.js";

const CLI = join(ROOT, "dist/cli.js");

/** Runs a program on a terminal of its own, set as few are; prints at its end whether it is so still. */
const ON_TERMINAL = `
import fcntl, os, pty, select, signal, struct, sys, termios
master, slave = pty.openpty()
before = termios.tcgetattr(slave)
before[0] |= termios.IXANY
before[1] &= ~(termios.OPOST | termios.ONLCR)
before[6][termios.VERASE] = b"\\x08"
termios.tcsetattr(slave, termios.TCSANOW, before)
before = termios.tcgetattr(slave)
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
after = termios.tcgetattr(slave)
print("END", os.waitstatus_to_exitcode(status), "as before" if after == before else f"{before} {after}", flush=True)
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
  "--create",
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
  await terminal.until(/END 7 as before/);
});

test("a command may take the place of the shell, and its signal is the exit code", async () => {
  const terminal = await onTerminal(...(await shell("--", "sh", "-c", "tty; kill -KILL $$")));
  await terminal.until(/\/dev\/pts\/0/);
  await terminal.until(new RegExp(`END ${128 + constants.signals.SIGKILL} as before`));
});

test("a signal that ends the command leaves the terminal as it was", async () => {
  const terminal = await onTerminal(...(await shell()));
  await terminal.until(/user@agentvm:~\$ /);
  terminal.child.kill("SIGUSR2");
  await terminal.until(new RegExp(`END ${128 + constants.signals.SIGTERM} as before`));
});

test("a key that no VM has makes none without --create, and ls lists those that there are", async () => {
  const [data, cli] = [await newDirectory(), (...args: string[]) => runProgram([CLI, ...args])];
  const at = ["--data-dir", data];
  const slip = await cli("shell", ...at, "my-vm", "--", "true");
  expect(slip).toMatchObject({ code: 2, stderr: expect.stringContaining("there is no VM my-vm") });
  expect((await cli("ls", ...at)).stdout).toContain("There is no VM in");
  expect((await cli("shell", ...at, "--create", "team", "my vm", "--", "true")).code).toBe(0);
  expect((await cli("shell", ...at, "team", "my vm", "--", "sh", "-c", "exit 3")).code).toBe(3);
  expect((await cli("ls", ...at)).stdout).toMatch(/^team 'my vm' +\d{4}-/m);
  expect(JSON.parse((await cli("ls", "--json", ...at)).stdout)).toMatchObject({
    dataDir: data,
    vms: [{ key: ["team", "my vm"] }],
  });
});

test("mounts, limits, the environment and ports are options", async () => {
  const host = await newDirectory();
  await writeFile(join(host, "file"), "of the host\n");
  const args = await shell("--", "sh", "-c", "cat /mnt/host/file; echo $A; touch /mnt/host/x");
  args.splice(1, 0, "--mount", `${host}:/mnt/host:ro`, "--env", "A=b=c", "--pids", "100");
  const ran = await runProgram([CLI, ...args]);
  expect(ran.stdout).toBe("of the host\nb=c\n");
  expect(ran.stderr).toContain("Read-only file system");
});

test("who does not read to the end ends the command, and says nothing", async () => {
  const args = await shell(
    "--",
    "sh",
    "-c",
    "trap '' PIPE; while echo line; do :; done; sleep 1000",
  );
  const child = spawn(process.execPath, [CLI, ...args], { cwd: ROOT });
  onTestFinished(() => {
    child.kill("SIGKILL");
  });
  let err = "";
  child.stderr.on("data", (data) => {
    err += data;
  });
  child.stdout.once("data", () => child.stdout.destroy());
  const code = await new Promise((resolve) => child.once("close", resolve));
  expect({ code, err }).toEqual({ code: 128 + constants.signals.SIGTERM, err: "" });
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
    [["shell", "--mount", "/a", "vm"], "--mount is <directory of the host>:<path in the VM>"],
    [["shell", "--memory", "lots", "vm"], "--memory is bytes, or as 512m"],
    [["shell", "--env", "A", "vm"], "--env is NAME=value"],
    [["shell", "--user", "me", "a"], "--user is user or root"],
    [["shell", "--shell", "a"], "--shell"],
  ] as [string[], string][]) {
    const { code, stderr } = await runProgram([CLI, ...args]);
    expect({ code, stderr }).toEqual({ code: 2, stderr: expect.stringContaining(text) });
  }
});

test("a command that is not found has the exit code 127, one that can't be run 126", async () => {
  const [data, cli] = [await newDirectory(), (...args: string[]) => runProgram([CLI, ...args])];
  const at = ["shell", "--data-dir", data, "--create", "vm"];
  expect(await cli(...at, "--", "no-such")).toMatchObject({
    code: 127,
    stderr: expect.stringMatching(/^ENOENT: .*no-such/),
  });
  expect(await cli(...at, "--", "/etc/hosts")).toMatchObject({
    code: 126,
    stderr: expect.stringMatching(/^EACCES: .*\/etc\/hosts/),
  });
  const noDirectory = await cli(...at, "--mount", "/no/such:/mnt/a", "--", "true");
  expect(noDirectory).toMatchObject({
    code: 1,
    stderr: expect.stringMatching(/^ENOENT: .*no\/such/),
  });
  const terminal = await onTerminal(...at, "--", "no-such");
  await terminal.until(/ENOENT: .*no-such/);
  await terminal.until(/END 127 as before/);
});

import type { Agent, AgentEvents } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, isRoot, newVm, told } from "./fixtures.js";

/** A shell, and what a person would have seen of it. */
async function open(agent: Agent, options: Parameters<Agent["openShell"]>[0] = {}) {
  const chunks: AgentEvents["shellData"][] = [];
  agent.on("shellData", (data) => chunks.push(data));
  const { shellId } = await agent.openShell(options);
  const seen = () =>
    Buffer.concat(
      chunks.filter((own) => own.shellId === shellId).map(({ data }) => data),
    ).toString();
  let from = 0;
  return {
    shellId,
    seen,
    type: (text: string) => agent.writeShell(shellId, text),
    /** Waits until the terminal shows this, after what was waited for before. */
    until: async (pattern: RegExp | string) => {
      const special = /[$()*+.?[\\\]^{|}]/g;
      const expression =
        pattern instanceof RegExp ? pattern : new RegExp(pattern.replace(special, "\\$&"));
      await expect
        .poll(() => seen().slice(from), { timeout: 20_000, interval: 10 })
        .toMatch(expression);
      const found = expression.exec(seen().slice(from));
      from += (found?.index ?? 0) + (found?.[0].length ?? 0);
      return found as RegExpExecArray;
    },
  };
}

/** One whose prompt is `> `, so that it can be waited for. */
async function openPlain(agent: Agent, options: Parameters<Agent["openShell"]>[0] = {}) {
  const shell = await open(agent, {
    command: "bash",
    args: ["--norc", "--noprofile"],
    env: { PS1: "> " },
    ...options,
  });
  await shell.until(/> $/);
  return shell;
}

test("a shell is a login shell of user on a terminal of its own", async () => {
  const agent = await newVm();
  await agent.writeFile(".profile", "echo profile was read\n");
  const shell = await open(agent);
  await shell.until("profile was read");
  await shell.until(/user@agentvm:~\$ /);
  await shell.type(
    "echo $TERM:$SHELL:$((6 * 7)); tty; pwd; shopt -q login_shell && echo 'log''in'\r",
  );
  await shell.until("xterm-256color:/bin/bash:42");
  await shell.until("/dev/pts/0");
  await shell.until("/home/user");
  await shell.until("login");
  await shell.type("exit 3\r");
  expect(await agent.waitShell(shell.shellId)).toEqual({
    exitCode: 3,
    signal: null,
    vmEnded: false,
  });
});

test("its terminal is the user's, with echo, size and description", async () => {
  const agent = await newVm();
  const shell = await openPlain(agent, { cols: 132, rows: 43 });
  await shell.type("stty size; stat -c '%U %G %a' $(tty); tput colors; stty -a | grep -o iutf8\r");
  await shell.until("43 132");
  await shell.until(isRoot ? "user tty 620" : "user user 620");
  await shell.until("256");
  await shell.until("iutf8");
});

test("a resize is seen at once, and told to programs", async () => {
  const agent = await newVm();
  const shell = await openPlain(agent);
  await shell.type("trap 'stty size' WINCH; echo rea''dy\r");
  await shell.until("ready");
  await agent.resizeShell(shell.shellId, { cols: 100, rows: 30 });
  await shell.type("\r");
  await shell.until("30 100");
});

test("Ctrl-C ends what is in the foreground, Ctrl-Z stops it, and jobs go on", async () => {
  const agent = await newVm();
  const shell = await openPlain(agent);
  await shell.type("sleep 1001\r");
  await expect.poll(async () => (await agent.exec("pgrep -x sleep")).exitCode).toBe(0);
  await shell.type("\u0003");
  await shell.until("> ");
  expect((await agent.exec("pgrep -x sleep")).exitCode).toBe(1);
  await shell.type("sleep 1002\r");
  await expect.poll(async () => (await agent.exec("pgrep -x sleep")).exitCode).toBe(0);
  await shell.type("\u001a");
  await shell.until("Stopped");
  await shell.type("jobs; bg\r");
  await shell.until(/sleep 1002 &/);
  await shell.type("kill %1; wait; ps -o tty= -p $$\r");
  await shell.until("pts/0");
  expect((await agent.exec("pgrep -x sleep")).exitCode).toBe(1);
});

test("shells are several, each on its own terminal", async () => {
  const agent = await newVm();
  const [one, two] = [await openPlain(agent), await openPlain(agent)];
  await Promise.all([one.type("echo o''ne; tty\r"), two.type("echo t''wo; tty\r")]);
  await one.until("one");
  await one.until("/dev/pts/0");
  await two.until("two");
  await two.until("/dev/pts/1");
  expect(one.seen()).not.toContain("two");
});

test("shells are listed while they run and after they have ended", async () => {
  const agent = await newVm();
  expect(await agent.listShells()).toEqual([]);
  const { shellId } = await agent.openShell({ command: "cat", args: ["-"], cwd: "/tmp" });
  const running = {
    shellId,
    command: "cat",
    args: ["-"],
    cwd: "/tmp",
    user: "user",
    startedAt: expect.any(Number),
    running: true,
    exitCode: null,
    signal: null,
    vmEnded: false,
  };
  expect(await agent.listShells()).toEqual([running]);
  await agent.writeShell(shellId, "\u0004");
  await agent.waitShell(shellId);
  expect(await agent.listShells()).toEqual([{ ...running, running: false, exitCode: 0 }]);
});

test("a program that has closed its terminal ends as it wants", async () => {
  const agent = await newVm();
  const script = "exec <&- >&- 2>&-; sleep 0.2; echo still > /dev/tty; exit 7";
  const { shellId, ...shell } = await open(agent, { command: "sh", args: ["-c", script] });
  await shell.until("still");
  expect(await agent.waitShell(shellId)).toMatchObject({ exitCode: 7, signal: null });
});

test("closeShell hangs up, and kills who does not mind", async () => {
  const agent = await newVm();
  const mind = "trap 'exit 5' HUP; echo ready; while :; do sleep 0.05; done";
  const polite = await open(agent, { command: "sh", args: ["-c", mind] });
  await polite.until("ready");
  const ended = told(agent, "shellExit");
  await agent.closeShell(polite.shellId);
  expect(await ended).toEqual({
    shellId: polite.shellId,
    exitCode: 5,
    signal: null,
    vmEnded: false,
  });
  const script = "trap '' HUP; echo ready; while :; do sleep 1; done";
  const stubborn = await open(agent, { command: "sh", args: ["-c", script] });
  await stubborn.until("ready");
  await agent.closeShell(stubborn.shellId);
  expect(await agent.waitShell(stubborn.shellId)).toMatchObject({ signal: "SIGKILL" });
  await agent.closeShell(stubborn.shellId);
  expect((await failureOf(() => agent.writeShell(stubborn.shellId, "x"))).code).toBe("EPIPE");
});

test("the end comes though something left running keeps the terminal", async () => {
  const agent = await newVm();
  const shell = await openPlain(agent);
  await shell.type("nohup setsid sleep 1000 &\r");
  await expect.poll(async () => (await agent.exec("pgrep -x sleep")).exitCode).toBe(0);
  await shell.type("exit\r");
  expect(await agent.waitShell(shell.shellId)).toMatchObject({ exitCode: 0 });
  expect((await agent.exec("pgrep -x sleep")).exitCode).toBe(0);
});

test("much of both directions comes whole", async () => {
  const agent = await newVm();
  const shell = await open(agent, {
    command: "sh",
    args: ["-c", "stty raw -echo; echo ready; head -c 1000000 | md5sum; seq 200000"],
  });
  await shell.until("ready");
  await shell.type("x".repeat(1_000_000));
  await agent.waitShell(shell.shellId);
  const { createHash } = await import("node:crypto");
  expect(shell.seen()).toContain(createHash("md5").update("x".repeat(1_000_000)).digest("hex"));
  expect(
    shell.seen().endsWith(Array.from({ length: 200_000 }, (_, i) => `${i + 1}\n`).join("")),
  ).toBe(true);
});

test("who listens late sees the end of what was shown", async () => {
  const agent = await newVm();
  const { shellId } = await agent.openShell({ command: "echo", args: ["hello"] });
  await agent.waitShell(shellId);
  const ended = told(agent, "shellExit");
  const data = told(agent, "shellData");
  expect(Buffer.from((await data).data).toString()).toBe("hello\r\n");
  expect(await ended).toMatchObject({ shellId, exitCode: 0 });
});

test("sleep hangs up, and says so", async () => {
  const agent = await newVm();
  const shell = await openPlain(agent);
  const ended = told(agent, "shellExit");
  await agent.sleep();
  expect(await ended).toMatchObject({ shellId: shell.shellId, vmEnded: true });
  expect((await failureOf(() => agent.writeShell(shell.shellId, "x"))).code).toBe("EPIPE");
});

test("a VM with an open shell does not fall asleep", async () => {
  const agent = await newVm({ sleepAfterMs: 50 });
  const asleep = told(agent, "vmShutdown").then(() => "asleep");
  const shell = await openPlain(agent);
  const later = new Promise((resolve) => setTimeout(() => resolve("awake"), 500));
  expect(await Promise.race([asleep, later])).toBe("awake");
  await agent.closeShell(shell.shellId);
  expect(await asleep).toBe("asleep");
});

test.runIf(isRoot)("a shell can be root's", async () => {
  const agent = await newVm();
  const shell = await openPlain(agent, { user: "root" });
  await shell.type("id -un; pwd\r");
  await shell.until("root");
});

test("what is wrong is said", async () => {
  const agent = await newVm();
  const wrong = async (run: () => unknown, code: string, text: string) =>
    expect(await failureOf(run)).toMatchObject({ code, message: expect.stringContaining(text) });
  await wrong(() => agent.openShell({ command: "no-such" }), "ENOENT", "no-such");
  await wrong(() => agent.openShell({ cwd: "/none" }), "ENOENT", "/none");
  await wrong(() => agent.openShell({ cols: 0 }), "INVALID_ARGUMENT", "cols");
  await wrong(() => agent.openShell({ args: ["x"] }), "INVALID_ARGUMENT", "args");
  await wrong(() => agent.openShell({ shell: "x" } as never), "INVALID_ARGUMENT", "shell");
  await wrong(() => agent.writeShell("shell-9", "x"), "SHELL_NOT_FOUND", "shell-9");
  await wrong(() => agent.resizeShell("x", { cols: 1, rows: 1 }), "SHELL_NOT_FOUND", "x");
  const { shellId } = await agent.openShell();
  await wrong(
    () => agent.resizeShell(shellId, { cols: 70_000, rows: 1 }),
    "INVALID_ARGUMENT",
    "cols",
  );
});

for (const [program, args, drive] of [
  [
    "vim",
    ["-u", "NONE", "file"],
    async (shell: Shell) => {
      await shell.until(/file/);
      await shell.type("ihello from vim\u001b:wq\r");
    },
  ],
  [
    "less",
    ["text"],
    async (shell: Shell) => {
      await shell.until(/line 1\b/);
      await shell.type("G");
      await shell.until("line 500");
      await shell.type("q");
    },
  ],
  [
    "top",
    [],
    async (shell: Shell) => {
      await shell.until("PID USER");
      await shell.type("q");
    },
  ],
  [
    "python3",
    ["-q"],
    async (shell: Shell) => {
      await shell.until(">>> ");
      await shell.type("6 * 7\r");
      await shell.until("42");
      await shell.type("\u0004");
    },
  ],
  [
    "tmux",
    ["-f", "/dev/null"],
    async (shell: Shell) => {
      await shell.until(/\[0\]/);
      await shell.type("echo in$((1 + 1))tmux > seen; exit\r");
      await shell.until(/\[exited\]/);
    },
  ],
] as [string, string[], (shell: Shell) => Promise<void>][]) {
  test(`${program} works on a terminal`, async () => {
    const agent = await newVm();
    const there = await agent.exec(`command -v ${program}`);
    expect(
      there.exitCode,
      `this test needs ${program}: apt-get install vim less procps python3 tmux`,
    ).toBe(0);
    await agent.exec("seq -f 'line %g' 500 > text");
    const shell = await open(agent, { command: program, args, cols: 100, rows: 30 });
    await drive(shell);
    expect(await agent.waitShell(shell.shellId)).toMatchObject({ exitCode: 0 });
    if (program === "vim") expect((await agent.exec("cat file")).stdout).toBe("hello from vim\n");
    if (program === "tmux") expect((await agent.exec("cat seen")).stdout).toBe("in2tmux\n");
  });
}

type Shell = Awaited<ReturnType<typeof open>>;

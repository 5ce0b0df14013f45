import { type Agent, type AgentEvents, AgentVmError } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, isRoot, newClient, newVm, runNode, told } from "./fixtures.js";

const OVER = { timedOut: false, vmEnded: false };

/** Everything that a VM tells of its processes from now on. */
function listen(agent: Agent) {
  const chunks: AgentEvents["processOutput"][] = [];
  const order: string[] = [];
  agent.on("processOutput", (output) => {
    chunks.push(output);
    order.push(`output ${output.pid}`);
  });
  agent.on("processExit", ({ pid }) => order.push(`exit ${pid}`));
  const bytesOf = (pid: number, stream = "stdout") =>
    Buffer.concat(
      chunks.filter((own) => own.pid === pid && own.stream === stream).map(({ data }) => data),
    );
  return {
    chunks,
    order,
    bytesOf,
    textOf: (pid: number, stream?: string) => bytesOf(pid, stream).toString(),
  };
}

test("a program runs with its arguments as they are, and its output and end are told", async () => {
  const agent = await newVm();
  const heard = listen(agent);
  const ended = told(agent, "processExit");
  const { pid } = await agent.spawn("sh", [
    "-c",
    'echo "$1"; echo oops >&2; exit 3',
    "-",
    "$HOME *",
  ]);
  expect(await agent.waitProcess(pid)).toEqual({ exitCode: 3, signal: null, ...OVER });
  expect(await ended).toEqual({ pid, exitCode: 3, signal: null, ...OVER });
  expect(heard.textOf(pid)).toBe("$HOME *\n");
  expect(heard.textOf(pid, "stderr")).toBe("oops\n");
  expect(heard.order.at(-1)).toBe(`exit ${pid}`);
});

test("output is bytes", async () => {
  const agent = await newVm();
  const heard = listen(agent);
  const { pid } = await agent.spawn("printf", ["\\377\\000\\303"]);
  await agent.waitProcess(pid);
  expect([...heard.bytesOf(pid)]).toEqual([0xff, 0, 0xc3]);
  expect(heard.chunks[0]?.data).toBeInstanceOf(Uint8Array);
});

test("who listens late is told what was kept, with the end, and what was not kept is counted", async () => {
  const agent = await newVm();
  const { pid } = await agent.spawn("sh", ["-c", "seq 200000; echo end >&2"]);
  await agent.waitProcess(pid);
  // The one for the end first: the order of what is told is not that of who came.
  const ended = told(agent, "processExit");
  const heard = listen(agent);
  expect(await ended).toMatchObject({ pid, exitCode: 0 });
  const all = Array.from({ length: 200_000 }, (_, index) => `${index + 1}\n`).join("");
  const kept = heard.textOf(pid);
  expect(kept).toHaveLength(256 * 1024);
  expect(all.endsWith(kept)).toBe(true);
  expect(heard.chunks[0]?.droppedBytes).toBe(all.length - kept.length);
  expect(heard.textOf(pid, "stderr")).toBe("end\n");
});

test("how much is kept is the caller's to say", async () => {
  const agent = await newVm();
  const { pid } = await agent.spawn("echo", ["abcdef"], { maxOutputBytes: 3 });
  await agent.waitProcess(pid);
  expect(await told(agent, "processOutput")).toMatchObject({
    pid,
    data: Buffer.from("ef\n"),
    droppedBytes: 4,
  });
});

test("what is written to stdin arrives in the order of the calls", async () => {
  const agent = await newVm();
  const heard = listen(agent);
  const { pid } = await agent.spawn("cat");
  const parts = Array.from({ length: 200 }, (_, index) => `${index} `.repeat(1000));
  const written = parts.map((part) => agent.writeProcessStdin(pid, part));
  const closed = agent.closeProcessStdin(pid);
  await Promise.all([...written, closed]);
  expect(await agent.waitProcess(pid)).toMatchObject({ exitCode: 0 });
  expect(heard.textOf(pid)).toBe(parts.join(""));
  expect((await failureOf(() => agent.writeProcessStdin(pid, "x"))).code).toBe("EPIPE");
  await agent.closeProcessStdin(pid);
});

test("a write waits for the process to read, and ends with it", async () => {
  const agent = await newVm();
  const { pid } = await agent.spawn("sleep", ["1000"]);
  const written = failureOf(() => agent.writeProcessStdin(pid, new Uint8Array(1 << 20)));
  await agent.killProcess(pid);
  expect((await written).code).toBe("EPIPE");
});

test("a given stdin is written and closed", async () => {
  const agent = await newVm();
  const heard = listen(agent);
  const { pid } = await agent.spawn("wc", ["-c"], { stdin: new Uint8Array(1 << 20) });
  await agent.waitProcess(pid);
  expect(heard.textOf(pid)).toBe(`${1 << 20}\n`);
});

test("a process that closes its output early goes on", async () => {
  const agent = await newVm();
  const heard = listen(agent);
  const script = "exec >&- 2>&-; read line; exit 7";
  const { pid } = await agent.spawn("sh", ["-c", script]);
  await agent.writeProcessStdin(pid, "go\n");
  expect(await agent.waitProcess(pid)).toMatchObject({ exitCode: 7 });
  expect(heard.textOf(pid)).toBe("");
});

test("the end of a process is told though something that it started keeps its output", async () => {
  const agent = await newVm();
  const heard = listen(agent);
  const { pid } = await agent.spawn("sh", ["-c", "sleep 1000 & echo started"]);
  expect(await agent.waitProcess(pid)).toMatchObject({ exitCode: 0 });
  expect(heard.order).toEqual([`output ${pid}`, `exit ${pid}`]);
});

test("stopProcess ends the whole group, and a process may refuse until it is killed", async () => {
  const agent = await newVm();
  const heard = listen(agent);
  const group = await agent.spawn("sh", ["-c", "sleep 1001 | sleep 1001"]);
  await agent.stopProcess(group.pid);
  expect(await agent.waitProcess(group.pid)).toMatchObject({ exitCode: null, signal: "SIGTERM" });
  const script = "trap 'echo no' TERM; echo ready; while :; do read x; done";
  const stubborn = await agent.spawn("sh", ["-c", script]);
  await expect.poll(() => heard.textOf(stubborn.pid)).toBe("ready\n");
  await agent.stopProcess(stubborn.pid);
  await expect.poll(() => heard.textOf(stubborn.pid)).toBe("ready\nno\n");
  await agent.killProcess(stubborn.pid);
  expect(await agent.waitProcess(stubborn.pid)).toMatchObject({
    signal: "SIGKILL",
    exitCode: null,
  });
  // Once more: no error.
  await agent.killProcess(stubborn.pid);
  await agent.stopProcess(stubborn.pid);
});

test("killProcess reaches the jobs of a shell with job control, and not what was detached", async () => {
  const agent = await newVm();
  const script = "set -m; sleep 2001 & setsid sleep 2002 & echo ready; wait";
  const heard = listen(agent);
  const { pid } = await agent.spawn("bash", ["-c", script]);
  await expect.poll(() => heard.textOf(pid)).toBe("ready\n");
  await expect
    .poll(async () => (await agent.exec("pgrep -f '^sleep 200'")).stdout.split("\n").length)
    .toBe(3);
  await agent.killProcess(pid);
  await agent.waitProcess(pid);
  await expect.poll(async () => (await agent.exec("pgrep -f '^sleep 2001'")).exitCode).toBe(1);
  expect((await agent.exec("pgrep -f '^sleep 2002'")).exitCode).toBe(0);
});

test("signals go by name or number", async () => {
  const agent = await newVm();
  const { pid } = await agent.spawn("sleep", ["1000"]);
  await agent.signalProcess(pid, "SIGUSR1");
  expect(await agent.waitProcess(pid)).toMatchObject({ signal: "SIGUSR1" });
  const other = await agent.spawn("sleep", ["1000"]);
  await agent.signalProcess(other.pid, 2);
  expect(await agent.waitProcess(other.pid)).toMatchObject({ signal: "SIGINT" });
  const wrong = await failureOf(() => agent.signalProcess(other.pid, "SIGNONE"));
  expect(wrong).toMatchObject({
    code: "INVALID_ARGUMENT",
    message: expect.stringContaining("SIGNONE"),
  });
});

test("a time limit kills, and the end says so", async () => {
  const agent = await newVm();
  const { pid } = await agent.spawn("sh", ["-c", "sleep 1000; true"], { timeoutMs: 50 });
  expect(await agent.waitProcess(pid)).toEqual({
    exitCode: null,
    signal: "SIGKILL",
    timedOut: true,
    vmEnded: false,
  });
});

test("aborting kills the process; aborting a wait does not", async () => {
  const agent = await newVm();
  const [life, wait] = [new AbortController(), new AbortController()];
  const { pid } = await agent.spawn("sleep", ["1000"], { signal: life.signal });
  const waiting = failureOf(() => agent.waitProcess(pid, { signal: wait.signal }));
  wait.abort();
  expect((await waiting).code).toBe("ABORTED");
  expect(await agent.getProcess(pid)).toMatchObject({ running: true });
  life.abort();
  expect(await agent.waitProcess(pid)).toMatchObject({ signal: "SIGKILL" });
  const early = failureOf(() => agent.spawn("true", [], { signal: AbortSignal.abort() }));
  expect((await early).code).toBe("ABORTED");
});

test("processes are listed while they run and after they have ended", async () => {
  const agent = await newVm();
  expect(await agent.listProcesses()).toEqual([]);
  const { pid } = await agent.spawn("sh", ["-c", "read line; exit 4"], { cwd: "/tmp" });
  const running = {
    pid,
    command: "sh",
    args: ["-c", "read line; exit 4"],
    cwd: "/tmp",
    user: "user",
    startedAt: expect.any(Number),
    running: true,
    exitCode: null,
    signal: null,
    ...OVER,
  };
  expect(await agent.listProcesses()).toEqual([running]);
  await agent.closeProcessStdin(pid);
  await agent.waitProcess(pid);
  const ended = { ...running, running: false, exitCode: 4 };
  expect(await agent.getProcess(pid)).toEqual(ended);
  const unknown = await failureOf(() => agent.getProcess(99_999));
  expect(unknown).toMatchObject({
    code: "PROCESS_NOT_FOUND",
    message: expect.stringContaining("99999"),
  });
});

test("a record tells that its process had no more time; a VM that is destroyed has none", async () => {
  const agent = await newVm();
  const { pid } = await agent.spawn("sleep", ["1000"], { timeoutMs: 1 });
  await agent.waitProcess(pid);
  expect(await agent.getProcess(pid)).toMatchObject({ timedOut: true, signal: "SIGKILL" });
  const { pid: other } = await agent.spawn("sleep", ["1000"]);
  await agent.sleep();
  expect(await agent.getProcess(other)).toMatchObject({ vmEnded: true, signal: "SIGTERM" });
  const { shellId } = await agent.openShell();
  const waited = agent.waitShell(shellId);
  await agent.destroy();
  expect(await waited).toMatchObject({ vmEnded: true });
  expect(await agent.listProcesses()).toEqual([]);
  expect(await agent.listShells()).toEqual([]);
});

test("everything in the VM is listed, and is a tree of PID 1", async () => {
  const agent = await newVm();
  const before = Date.now();
  // A name that looks like the end of its line.
  const script = "printf ') R 1 (' > /proc/$$/comm; sleep 1000 & wait";
  const { pid } = await agent.spawn("sh", ["-c", script, "-", "a b", "世界"]);
  await expect.poll(async () => (await agent.allProcesses()).length).toBe(3);
  const own = (await agent.allProcesses()).find((process) => process.pid === pid);
  expect(own).toMatchObject({
    ppid: 1,
    pgid: pid,
    sid: pid,
    user: "user",
    threads: 1,
    command: ["sh", "-c", script, "-", "a b", "世界"],
  });
  expect(own?.memoryBytes).toBeGreaterThan(100_000);
  expect(own?.startedAt).toBeGreaterThan(before - 1000);
  expect(own?.startedAt).toBeLessThan(Date.now() + 1000);
  await expect
    .poll(async () => (await agent.processTree())[0])
    .toMatchObject({
      pid: 1,
      children: [
        { pid, children: [{ command: ["sleep", "1000"], state: "sleeping", children: [] }] },
      ],
    });
});

test.runIf(isRoot)("a process can be root's", async () => {
  const agent = await newVm();
  const heard = listen(agent);
  const { pid } = await agent.spawn("id", ["-un"], { user: "root" });
  await agent.waitProcess(pid);
  expect(heard.textOf(pid)).toBe("root\n");
  expect(await agent.getProcess(pid)).toMatchObject({ user: "root" });
});

test("a program or directory that is not there is an error", async () => {
  const agent = await newVm();
  const missing = await failureOf(() => agent.spawn("no-such-program"));
  expect(missing).toMatchObject({
    code: "ENOENT",
    message: expect.stringContaining("no-such-program"),
  });
  await agent.writeFile("script", "#!/no/such/interpreter\n", { mode: 0o755 });
  expect(await failureOf(() => agent.spawn("./script"))).toMatchObject({
    code: "ENOENT",
    message: expect.stringContaining("interpreter"),
  });
  expect(await failureOf(() => agent.spawn("true", ["x".repeat(200_000)]))).toMatchObject({
    code: "E2BIG",
    message: expect.stringContaining("128 KiB"),
  });
  expect((await failureOf(() => agent.spawn("true", [], { cwd: "/none" }))).code).toBe("ENOENT");
  expect((await failureOf(() => agent.spawn("/etc/passwd"))).code).toBe("EACCES");
  expect(await agent.listProcesses()).toEqual([]);
});

test("a wrong argument is named", async () => {
  const agent = await newVm();
  const wrong = async (run: () => unknown, field: string) => {
    const error = await failureOf(run);
    expect(error).toMatchObject({ code: "INVALID_ARGUMENT" });
    expect(error.message).toMatch(new RegExp(`^${field}`));
  };
  await wrong(() => agent.spawn(""), "command");
  await wrong(() => agent.spawn("a\0b"), "command");
  await wrong(() => agent.spawn("a", ["b\0"]), "args\\[0\\]");
  await wrong(() => agent.spawn("a", [1] as never), "args\\[0\\]");
  await wrong(() => agent.spawn("a", [], { timeoutMs: 0 }), "timeoutMs");
  await wrong(() => agent.spawn("a", [], { cwd: 1 } as never), "cwd");
  await wrong(() => agent.spawn("a", [], { shell: true } as never), "shell");
  await wrong(() => agent.waitProcess(-1), "pid");
  await wrong(() => agent.killProcess(1.5), "pid");
});

test("1,000 short processes, and nothing of them is mixed up", { timeout: 120_000 }, async () => {
  const agent = await newVm();
  const heard = listen(agent);
  const pids = new Map<number, number>();
  const worker = async (from: number) => {
    for (let number = from; number < 1000; number += 20) {
      const { pid } = await agent.spawn("echo", [`${number}`]);
      pids.set(pid, number);
      expect(await agent.waitProcess(pid)).toMatchObject({ exitCode: 0 });
      expect(heard.textOf(pid)).toBe(`${number}\n`);
    }
  };
  await Promise.all(Array.from({ length: 20 }, (_, from) => worker(from)));
  expect(pids.size).toBe(1000);
  expect(await agent.listProcesses()).toHaveLength(128);
});

test("a flood reaches its listener whole, and in little memory", { timeout: 120_000 }, async () => {
  const agent = await newVm();
  const size = 300 << 20;
  let [received, most] = [0, 0];
  const before = process.memoryUsage().rss;
  agent.on("processOutput", ({ data, droppedBytes }) => {
    expect(droppedBytes).toBe(0);
    received += data.length;
    most = Math.max(most, process.memoryUsage().rss);
  });
  const { pid } = await agent.spawn("head", ["-c", `${size}`, "/dev/zero"]);
  await agent.waitProcess(pid);
  expect(received).toBe(size);
  expect(most - before).toBeLessThan(150 << 20);
});

test("sleep ends processes, and they may end in their own way", async () => {
  const agent = await newVm();
  const heard = listen(agent);
  const script = "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.01; done";
  const { pid } = await agent.spawn("sh", ["-c", script]);
  await expect.poll(() => heard.textOf(pid)).toBe("ready\n");
  const waited = agent.waitProcess(pid);
  await agent.sleep();
  expect(await waited).toEqual({ exitCode: 5, signal: null, timedOut: false, vmEnded: true });
  expect(heard.textOf(pid)).toBe("ready\nbye\n");
  expect(heard.order.at(-1)).toBe(`exit ${pid}`);
});

test("close ends a process that does not want to, and tells of it", async () => {
  const client = await newClient();
  const agent = client.vm.getOrCreate("vm");
  const heard = listen(agent);
  const { pid } = await agent.spawn("sh", [
    "-c",
    "trap '' TERM; echo ready; while :; do sleep 1; done",
  ]);
  await expect.poll(() => heard.textOf(pid)).toBe("ready\n");
  const ended = told(agent, "processExit");
  await client.close();
  expect(await ended).toEqual({
    pid,
    exitCode: null,
    signal: "SIGKILL",
    timedOut: false,
    vmEnded: true,
  });
});

test("a VM with a running process does not fall asleep", async () => {
  const agent = await newVm({ sleepAfterMs: 100 });
  const asleep = told(agent, "vmShutdown");
  const { pid } = await agent.spawn("sleep", ["0.5"]);
  let isAsleep = false;
  void asleep.then(() => {
    isAsleep = true;
  });
  expect(await agent.waitProcess(pid)).toMatchObject({ exitCode: 0, vmEnded: false });
  expect(isAsleep).toBe(false);
  expect(await asleep).toEqual({ reason: "sleep" });
});

test("a running process keeps Node alive, a listener does not", async () => {
  const source = (body: string) => `
    import { createClient } from "agentvm";
    import { mkdtempSync, rmSync } from "node:fs";
    const dataDir = mkdtempSync("/tmp/agentvm-test-");
    process.on("exit", () => rmSync(dataDir, { recursive: true, force: true }));
    const client = createClient({ dataDir });
    const agent = client.vm.getOrCreate("vm");
    agent.on("processOutput", ({ data }) => process.stdout.write(data));
    agent.on("processExit", ({ exitCode }) => {
      console.log("exit", exitCode);
      void client.close();
    });
    ${body}
  `;
  const process = "await agent.spawn('sh', ['-c', 'sleep 0.5; echo done']);";
  expect(await runNode(source(process))).toMatchObject({ code: 0, stdout: "done\nexit 0\n" });
  expect(await runNode(source("await agent.exec('true'); await agent.sleep();"))).toMatchObject({
    code: 0,
    stdout: "",
  });
});

test("an error of a listener keeps nobody waiting", async () => {
  const agent = await newVm();
  const thrown = new Promise((resolve) => process.once("uncaughtException", resolve));
  const others = process.listeners("uncaughtException").slice(0, -1);
  for (const other of others) process.off("uncaughtException", other);
  agent.on("processOutput", () => {
    throw new Error("of a listener");
  });
  const { pid } = await agent.spawn("echo", ["hello"]);
  expect(await agent.waitProcess(pid)).toMatchObject({ exitCode: 0 });
  expect(await thrown).toMatchObject({ message: "of a listener" });
  for (const other of others) process.on("uncaughtException", other);
});

test("a closed client says so", async () => {
  const client = await newClient();
  const agent = client.vm.getOrCreate("vm");
  await client.close();
  for (const run of [
    () => agent.spawn("true"),
    () => agent.listProcesses(),
    () => agent.allProcesses(),
    () => agent.waitProcess(1),
  ]) {
    const error = await failureOf(run);
    expect(error).toBeInstanceOf(AgentVmError);
    expect(error.code).toBe("CLIENT_CLOSED");
  }
});

test("who listens after the end is told of the output before waitProcess resolves", async () => {
  const agent = await newVm();
  for (let turn = 0; turn < 20; turn += 1) {
    const { pid } = await agent.spawn("echo", ["hello"]);
    await agent.exec("true");
    let said = "";
    const off = agent.on("processOutput", (output) => {
      if (output.pid === pid) said += Buffer.from(output.data);
    });
    await agent.waitProcess(pid);
    off();
    expect(said).toBe("hello\n");
  }
});

test("who stops every process that has not begun yet keeps nobody waiting", async () => {
  const agent = await newVm();
  const options = process.getuid?.() === 0 ? { user: "root" as const } : {};
  const stopping = `import os, signal
while True:
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) not in (1, os.getpid()):
            try: os.kill(int(pid), signal.SIGSTOP)
            except OSError: pass`;
  await agent.spawn("python3", ["-c", stopping], options);
  for (let turn = 0; turn < 20; turn += 1) {
    const ran = agent.exec("echo", { timeoutMs: 500, ...options });
    const end = await ran.then(
      () => "ran",
      (error) => error.code,
    );
    // It ran before it could be stopped, was stopped as a program, or was killed before it was one.
    expect(["ran", "TIMEOUT", "EINTR"]).toContain(end);
  }
  await agent.sleep();
});

import { expect, test } from "vitest";
import { failureOf, isRoot, newVm } from "./fixtures.js";

test("exec runs a shell command as user in /home/user", async () => {
  const agent = await newVm();
  expect(await agent.exec("id -un; pwd; echo oops >&2; exit 3")).toEqual({
    stdout: "user\n/home/user\n",
    stderr: "oops\n",
    exitCode: 3,
    signal: null,
    truncated: false,
  });
});

test("a command that a signal ended has the signal's name and no exit code", async () => {
  const agent = await newVm();
  expect(await agent.exec("kill -KILL $$")).toMatchObject({ exitCode: null, signal: "SIGKILL" });
});

test("env adds to the VM's own environment, in which nothing of the host's is", async () => {
  const agent = await newVm();
  process.env["AGENTVM_TEST_SECRET"] = "of the host";
  const env = { GREETING: "hello, 世界", PATH: "/usr/bin:/bin:/home/user/bin", EMPTY: "" };
  const { stdout } = await agent.exec("env", { env });
  delete process.env["AGENTVM_TEST_SECRET"];

  const lines = stdout.trimEnd().split("\n");
  expect(lines).toEqual(
    expect.arrayContaining([
      "GREETING=hello, 世界",
      "PATH=/usr/bin:/bin:/home/user/bin",
      "EMPTY=",
      "HOME=/home/user",
      "USER=user",
    ]),
  );
  expect(stdout).not.toContain("AGENTVM_TEST_SECRET");
});

test("cwd is where the command runs", async () => {
  const agent = await newVm();
  expect((await agent.exec("pwd", { cwd: "/usr/share" })).stdout).toBe("/usr/share\n");
  await agent.exec("mkdir -p a/b");
  expect((await agent.exec("pwd", { cwd: "a/b" })).stdout).toBe("/home/user/a/b\n");
});

test("a cwd that is not there, or no directory, is an error with its errno", async () => {
  const agent = await newVm();
  await agent.writeFile("file", "");
  const missing = await failureOf(() => agent.exec("pwd", { cwd: "/nowhere" }));
  expect(missing.code).toBe("ENOENT");
  expect(missing.message).toContain("/nowhere");
  expect((await failureOf(() => agent.exec("pwd", { cwd: "file" }))).code).toBe("ENOTDIR");
});

test("stdin is given to the command byte by byte, and closed then", async () => {
  const agent = await newVm();
  const every = Uint8Array.from({ length: 256 * 1024 }, (_, index) => index % 256);
  await agent.exec("cat > copy", { stdin: every });
  expect(Buffer.from(await agent.readFile("copy")).equals(every)).toBe(true);
  expect((await agent.exec("cat", { stdin: "grüße" })).stdout).toBe("grüße");
  expect((await agent.exec("cat")).stdout).toBe("");
});

test("a command need not read its stdin", async () => {
  const agent = await newVm();
  const stdin = new Uint8Array(4 << 20);
  expect((await agent.exec("exit 0", { stdin })).exitCode).toBe(0);
});

test("output of many megabytes comes whole", async () => {
  const agent = await newVm();
  const { stdout, truncated } = await agent.exec("yes 0123456789abcde | head -c 8388608");
  expect(stdout.length).toBe(8 << 20);
  expect(stdout).toBe("0123456789abcde\n".repeat(512 << 10));
  expect(truncated).toBe(false);
});

test("beyond maxOutputBytes output is dropped, of stdout and stderr each", async () => {
  const agent = await newVm();
  const both = "yes | head -c 100000; yes no | head -c 100000 >&2; echo end > done";
  const result = await agent.exec(both, { maxOutputBytes: 10 });
  expect(result).toMatchObject({
    stdout: "y\ny\ny\ny\ny\n",
    stderr: "no\nno\nno\nn",
    exitCode: 0,
    truncated: true,
  });
  // It was not stopped: it ran to its end.
  expect(new TextDecoder().decode(await agent.readFile("done"))).toBe("end\n");
});

test("output that is no UTF-8 has replacement characters", async () => {
  const agent = await newVm();
  expect((await agent.exec(String.raw`printf 'a\377b'`)).stdout).toBe("a\uFFFDb");
});

test("timeoutMs kills the command with everything it started, and rejects with what it wrote", async () => {
  const agent = await newVm();
  const command = "echo out; echo err >&2; sleep 600 & sleep 600";
  const error = await failureOf(() => agent.exec(command, { timeoutMs: 200 }));
  expect(error.code).toBe("TIMEOUT");
  expect(error.message).toContain("timeoutMs");
  expect(error.data).toEqual({ stdout: "out\n", stderr: "err\n" });
  await agent.exec("while pgrep -x sleep; do :; done");
});

test("aborting kills the command and rejects with an AbortError", async () => {
  const agent = await newVm();
  const controller = new AbortController();
  const running = agent.exec("touch started; sleep 600", { signal: controller.signal });
  await agent.exec("until pgrep -x sleep; do sleep 0.02; done");
  controller.abort();

  const error = await failureOf(() => running);
  expect(error).toMatchObject({ name: "AbortError", code: "ABORTED" });
  expect(error.cause).toBe(controller.signal.reason);
  await agent.exec("while pgrep -x sleep; do :; done");
});

test("with a signal that is aborted already nothing runs", async () => {
  const agent = await newVm();
  const signal = AbortSignal.abort("no");
  const error = await failureOf(() => agent.exec("touch ran", { signal }));
  expect(error).toMatchObject({ name: "AbortError", code: "ABORTED", cause: "no" });
  expect((await agent.exec("ls -A")).stdout).toBe("");
});

test("exec resolves when the shell exits, whatever still holds its output", async () => {
  const agent = await newVm();
  const { stdout } = await agent.exec(
    "sleep 600 & until pgrep -x sleep >/dev/null; do :; done; echo started",
  );
  expect(stdout).toBe("started\n");
  expect((await agent.exec("pgrep -x sleep")).exitCode).toBe(0);
});

test("commands run at the same time", async () => {
  const agent = await newVm();
  const waiting = agent.exec("until [ -e go ]; do sleep 0.02; done; echo went");
  const twenty = Array.from({ length: 20 }, (_, n) => agent.exec(`echo ${n}`));
  const outputs = (await Promise.all(twenty)).map(({ stdout }) => stdout);
  expect(outputs).toEqual(outputs.map((_, n) => `${n}\n`));
  await agent.writeFile("go", "");
  expect((await waiting).stdout).toBe("went\n");
});

test.runIf(isRoot)("user: root is the VM's root, and never the host's", async () => {
  const agent = await newVm();
  const { stdout } = await agent.exec("id -u; touch /root/mine && echo wrote", { user: "root" });
  expect(stdout).toBe("0\nwrote\n");
  const map = (await agent.exec("cat /proc/self/uid_map", { user: "root" })).stdout;
  const [inside, outside] = map.trim().split(/\s+/).map(Number);
  expect(inside).toBe(0);
  expect(outside).toBeGreaterThan(65_535);
});

test.runIf(!isRoot)("without a root on the host there is none in the VM either", async () => {
  const agent = await newVm();
  const error = await failureOf(() => agent.exec("id", { user: "root" }));
  expect(error.code).toBe("VM_UNSUPPORTED");
  expect(error.message).toContain("root");
});

test("a VM that ends while a command runs ends the command", async () => {
  const agent = await newVm();
  const failed = failureOf(() => agent.exec("sleep 600"));
  await agent.exec("until pgrep -x sleep; do sleep 0.02; done");
  await agent.sleep();
  expect(await failed).toMatchObject({ code: "ABORTED", name: "AbortError" });
});

// What people do on a Linux machine works in a VM: with the programs of the base, natively.

import { execFile, execFileSync, type StdioOptions } from "node:child_process";
import { createReadStream } from "node:fs";
import { mkdir, stat, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join, normalize } from "node:path";
import { promisify } from "node:util";
import type { Agent } from "agentvm";
import { describe, expect, onTestFinished, test } from "vitest";
import { newDirectory, newVm } from "./fixtures.js";

const run = promisify(execFile);

/** What a script that has to succeed prints. */
async function script(agent: Agent, text: string): Promise<string> {
  const { stdout, stderr, exitCode, signal } = await agent.exec(`set -e\n${text}`);
  expect({ exitCode, signal, stderr: exitCode === 0 ? "" : stderr }).toEqual({
    exitCode: 0,
    signal: null,
    stderr: "",
  });
  return stdout.trimEnd();
}

function python(source: string): string {
  return `python3 - <<'END'\n${source}\nEND`;
}

describe.runIf(isInBase("git"))("git", () => {
  test("clones over HTTP, commits, and clones again", async () => {
    const origin = await newDirectory();
    const work = join(origin, "work");
    await mkdir(work);
    const git = (...args: string[]) => run("git", ["-C", work, ...IDENTITY, ...args]);
    await git("init", "--quiet", "--initial-branch=main");
    await writeFile(join(work, "greeting"), "hello\n");
    await git("add", ".");
    await git("commit", "--quiet", "--message=first");
    await run("git", ["clone", "--quiet", "--bare", work, join(origin, "it.git")]);
    await run("git", ["-C", join(origin, "it.git"), "update-server-info"]);
    const port = await serveFiles(origin);

    const agent = await newVm({ loopbackExemptPorts: [port] });
    await script(agent, `git clone --quiet http://127.0.0.1:${port}/it.git cloned`);
    await script(
      agent,
      `cd cloned; echo more >> greeting; git ${IDENTITY.join(" ")} commit --quiet --all -m second
      git clone --quiet . ../again; git -C ../again gc --quiet; git -C ../again fsck`,
    );
    expect(await script(agent, "cat again/greeting; git -C again log --format=%s")).toBe(
      "hello\nmore\nsecond\nfirst",
    );
  });

  test("asks who commits, of whom nothing is known", async () => {
    const agent = await newVm();
    const commit = await agent.exec("git init -q it && cd it && git commit --allow-empty -m x");
    expect(commit.exitCode).toBe(128);
    expect(commit.stderr).toContain("git config --global user.email");
  });

  test("knows the state of a big tree", async () => {
    const agent = await newVm();
    await script(
      agent,
      `git init -q tree; cd tree
      for d in $(seq 100); do mkdir $d; for f in $(seq 50); do echo $f > $d/$f; done; done
      git add .; git ${IDENTITY.join(" ")} commit -qm all; echo changed > 7/7; touch new`,
    );
    expect(await script(agent, "git -C tree status --porcelain")).toBe(" M 7/7\n?? new");
  });
});

describe("compilers and runtimes", () => {
  test.runIf(isInBase("gcc"))("C", async () => {
    const agent = await newVm();
    await agent.writeFile("a.c", '#include <stdio.h>\nint main(void) { puts("hello"); }\n');
    expect(await script(agent, "gcc -O2 -Wall a.c -o a; ./a")).toBe("hello");
  });

  const toolchain = rustToolchain();
  test.runIf(toolchain)("Rust, and a package of cargo's", async () => {
    const mounts = [{ path: "/opt/rust", hostPath: toolchain ?? "", readOnly: true }];
    const agent = await newVm({ mounts });
    const env = { PATH: "/home/user/.cargo/bin:/opt/rust/bin:/usr/bin:/bin" };
    const built = await agent.exec(
      `cargo new --quiet --vcs none hello-vm && cd hello-vm &&
      cargo run --quiet --offline && cargo install --quiet --offline --path . && hello-vm`,
      { env },
    );
    expect(built).toMatchObject({ exitCode: 0, stdout: "Hello, world!\nHello, world!\n" });
  });

  test.runIf(isInBase("java") && isInBase("javac"))("Java", async () => {
    const agent = await newVm();
    const source = 'class A { public static void main(String[] a) { System.out.print("hello"); } }';
    await agent.writeFile("A.java", source);
    expect(await script(agent, "javac A.java; java A")).toBe("hello");
  });

  test.runIf(isInBase("node"))("node --test, worker threads, child processes", async () => {
    const agent = await newVm();
    await agent.writeFile(
      "a.test.mjs",
      `import { execFileSync } from "node:child_process";
      import { once } from "node:events";
      import { test } from "node:test";
      import { Worker } from "node:worker_threads";
      test("a worker", async () => {
        await once(new Worker("process.exitCode = 0", { eval: true }), "exit");
      });
      test("a child", () => void execFileSync("true"));`,
    );
    expect(await script(agent, "node --test a.test.mjs")).toMatch(/^# pass 2$/m);
  });

  // The headers of Node are those of the base: node-gyp would get them from the internet.
  test.runIf(isInBase("g++") && isInBase("make") && isNodeGypInBase())(
    "npm install of a package with native parts",
    async () => {
      const agent = await newVm();
      const manifest = { name: "native", version: "1.0.0", gypfile: true };
      await agent.exec("mkdir -p native app");
      await agent.writeFile("native/package.json", JSON.stringify(manifest));
      await agent.writeFile(
        "native/binding.gyp",
        '{ "targets": [{ "target_name": "native", "sources": ["native.c"] }] }',
      );
      await agent.writeFile(
        "native/native.c",
        `#include <node_api.h>
        NAPI_MODULE_INIT() { napi_value v; napi_create_int32(env, 42, &v); return v; }`,
      );
      await agent.writeFile(
        "native/index.js",
        "module.exports = require('./build/Release/native.node')",
      );
      await script(
        agent,
        `cd app; npm init -y > /dev/null
        npm install --offline --install-links --nodedir=/usr --foreground-scripts ../native`,
      );
      expect(await script(agent, "cd app; node -p 'require(\"native\")'")).toBe("42");
    },
  );

  test.runIf(isInBase("python3"))("Python: processes, threads, shared memory, SQLite", async () => {
    const agent = await newVm();
    const told = await script(
      agent,
      python(`
import multiprocessing, sqlite3, threading
from multiprocessing import shared_memory
def double(n): return 2 * n
with multiprocessing.Pool(2) as pool: print(pool.map(double, [1, 2, 3]))
memory = shared_memory.SharedMemory(create=True, size=1 << 20)
same = shared_memory.SharedMemory(memory.name)
memory.buf[0] = 7; print(same.buf[0]); same.close(); memory.close(); memory.unlink()
def write(n):
  with sqlite3.connect("db", timeout=30) as db: db.execute("insert into t values (?)", (n,))
with sqlite3.connect("db") as db: db.execute("pragma journal_mode=wal"); db.execute("create table t(n)")
threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print(sqlite3.connect("db").execute("select sum(n) from t").fetchone()[0])`),
    );
    expect(told).toBe("[2, 4, 6]\n7\n28");
  });
});

describe("files", () => {
  test.runIf(isInBase("python3"))(
    "inotify, mmap, fsync, locks, sparse files, Unix sockets",
    async () => {
      const agent = await newVm();
      const told = await script(
        agent,
        python(`
import ctypes, fcntl, mmap, os, socket
libc = ctypes.CDLL(None, use_errno=True)
watch = libc.inotify_init1(0)
assert libc.inotify_add_watch(watch, b"/home/user", 0x100) == 1
file = open("new", "w+b")
print(os.read(watch, 4096)[16:19].decode())

file.truncate(1 << 32)
memory = mmap.mmap(file.fileno(), 1 << 20); memory[:3] = b"abc"; memory.flush(); os.fsync(file.fileno())
print(file.read(3).decode(), os.stat("new").st_size, os.stat("new").st_blocks < 100)

fcntl.lockf(file, fcntl.LOCK_EX)
if os.fork() == 0:
  try: fcntl.lockf(open("new", "r+b"), fcntl.LOCK_EX | fcntl.LOCK_NB); os._exit(0)
  except BlockingIOError: os._exit(7)
print(os.waitstatus_to_exitcode(os.wait()[1]))

for name in ("/tmp/socket", "socket", "\\0abstract"):
  server = socket.socket(socket.AF_UNIX); server.bind(name); server.listen()
  client = socket.socket(socket.AF_UNIX); client.connect(name); client.send(b"x")
  print(server.accept()[0].recv(1).decode())`),
      );
      expect(told).toBe("new\nabc 4294967296 True\n7\nx\nx\nx");
    },
  );

  test("hard links, modes, umask, FIFOs, times", async () => {
    const agent = await newVm();
    const told = await script(
      agent,
      `echo a > a; ln a b; stat -c %h b
      chmod 4751 a; stat -c %a b
      (umask 027; touch c; mkdir d); stat -c %a c d
      mkfifo pipe; echo through > pipe & cat pipe
      touch -d 2001-02-03T04:05:06.789Z a; stat -c %Y a; ln -s nowhere l; readlink l`,
    );
    expect(told).toBe("2\n4751\n640\n750\nthrough\n981173106\nnowhere");
  });

  test("long names and deep paths", async () => {
    const agent = await newVm();
    const told = await script(
      agent,
      `name=$(printf 'n%.0s' $(seq 255))
      for i in $(seq 15); do mkdir $name; cd $name; done; pwd | wc -c; echo deep > file
      cd; find . -name file -exec cat {} +
      touch $name-too-long 2>&1 | grep -o 'File name too long'; rm -r $name; ls`,
    );
    expect(told).toBe("3851\ndeep\nFile name too long");
  });

  test.runIf(isInBase("python3"))(
    "100,000 files in a directory",
    { timeout: 180_000 },
    async () => {
      const agent = await newVm();
      const source =
        "import os\nos.mkdir('many')\nfor i in range(100000): open(f'many/{i}', 'x').close()";
      await script(agent, python(source));
      expect(await script(agent, "ls many | wc -l; find many -name '*77777' | wc -l")).toBe(
        "100000\n1",
      );
      await script(agent, "rm -r many");
    },
  );
});

describe("processes", () => {
  test("timeout, flock and xargs -P", async () => {
    const agent = await newVm();
    const told = await script(
      agent,
      `timeout 0.1 sleep 60 || echo $?
      seq 50 | xargs -P 8 -I{} flock lock sh -c 'n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) > n'
      cat n`,
    );
    expect(told).toBe("124\n50");
  });

  test.runIf(isInBase("bash"))("job control and signals", async () => {
    const agent = await newVm();
    await agent.writeFile(
      "jobs.sh",
      `set -m
      trap 'echo got it' USR1; kill -USR1 $$
      sleep 60 & kill -STOP %1; until grep -q '^State:.T' /proc/$!/status; do :; done
      kill -CONT %1; kill %1; wait %1; echo $?
      sh -c 'kill -SEGV $$'; echo $?
      (sleep 60 | cat) & kill -- -$!; wait $!; echo $?`,
    );
    const { stdout } = await agent.exec("bash jobs.sh 2>/dev/null");
    expect(stdout).toBe("got it\n143\n139\n143\n");
  });
});

describe("what programs ask a machine for", () => {
  test("who and where they are", async () => {
    const agent = await newVm();
    const told = "id; hostname; getent hosts $(hostname) | tail -n1; getent passwd user; umask";
    expect(await script(agent, told)).toBe(
      "uid=1000(user) gid=1000(user) groups=1000(user)\nagentvm\n" +
        "127.0.0.1       localhost agentvm\nuser:x:1000:1000:user:/home/user:/bin/bash\n0022",
    );
  });

  test("language, time zone, terminals, certificates, well-known names", async () => {
    const agent = await newVm();
    const told = await script(
      agent,
      `locale charmap; TZ=Europe/Berlin date -d @0 +%H%Z; getent services https | tr -s ' '
      getent protocols tcp | tr -s ' '; infocmp xterm-256color > /dev/null
      openssl verify /etc/ssl/certs/ca-certificates.crt; . /etc/os-release; test "$ID"`,
    );
    expect(told).toBe(
      "UTF-8\n01CET\nhttps 443/tcp\ntcp 6 TCP\n/etc/ssl/certs/ca-certificates.crt: OK",
    );
  });

  test("processors, memory, mounts, processes", async () => {
    const agent = await newVm();
    const told = await script(
      agent,
      `nproc; lscpu --parse=CPU | grep -vc '#'; free > /dev/null; uptime > /dev/null
      df -P / /home/user /tmp /dev/shm | wc -l; mount | grep -c ' on /home/user '; ps -o comm= -p 1`,
    );
    const onHost = execFileSync("sh", ["-c", "nproc; lscpu --parse=CPU | grep -vc '#'"]);
    expect(told).toBe(`${onHost}5\n1\nagentvm-guest`);
  });
});

const IDENTITY = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.com"];

/** A server that has what is in a directory, as git's dumb protocol needs it. */
async function serveFiles(directory: string): Promise<number> {
  const server = createServer(async (request, response) => {
    const { pathname } = new URL(request.url ?? "/", "http://localhost");
    const path = join(directory, normalize(pathname));
    const isFile = await stat(path).then(
      (data) => data.isFile(),
      () => false,
    );
    response.writeHead(isFile ? 200 : 404);
    if (isFile) createReadStream(path).pipe(response);
    else response.end();
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onTestFinished(() => void server.close().closeAllConnections());
  return (server.address() as AddressInfo).port;
}

/** Whether VMs have a program of this host. */
function isInBase(program: string): boolean {
  try {
    const env = { PATH: "/usr/local/bin:/usr/bin:/bin" };
    execFileSync("/bin/sh", ["-c", `command -v ${program}`], { env });
    return true;
  } catch {
    return false;
  }
}

/** Where this host has Rust, which need not be in the base. */
function rustToolchain(): string | undefined {
  try {
    const stdio: StdioOptions = ["ignore", "pipe", "ignore"];
    return execFileSync("rustc", ["--print", "sysroot"], { encoding: "utf8", stdio }).trim();
  } catch {
    return undefined;
  }
}

function isNodeGypInBase(): boolean {
  try {
    execFileSync("/bin/sh", ["-c", "test -e /usr/include/node/node_api.h && command -v npm"], {
      env: { PATH: "/usr/bin:/bin" },
    });
    return true;
  } catch {
    return false;
  }
}

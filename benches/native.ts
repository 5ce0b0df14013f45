// Work in a VM that runs, against the same work beside Node and in bwrap: what it takes once it has been
// started. Each has the same programs, the same environment, and a directory of its own on one disk.

import { execFile, execFileSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Comparison, compare, timed } from "./measure";
import { type Registry, startRegistry } from "./registry";
import { isInstalled, withClient } from "./setting";

interface Job {
  title: string;
  /** What it needs of the base. */
  programs: readonly string[];
  command: string;
}

const ENV = {
  PATH: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
  LANG: "C.UTF-8",
};

/** 50,000 files of a line each in 500 directories, committed. Their objects are in one pack. */
const TREE = `git init --quiet --initial-branch=main tree && cd tree &&
  awk 'BEGIN {
    print "commit refs/heads/main\\ncommitter Bench <bench@example.com> 0 +0000\\ndata 0"
    for (d = 1; d <= 500; d++) for (f = 1; f <= 100; f++) {
      line = "line " d " " f
      print "M 100644 inline " d "/" f "\\ndata " length(line) + 1 "\\n" line
    }
  }' | git fast-import --quiet && git checkout --quiet --force main`;

function jobs({ url, packages }: Registry): Job[] {
  return [
    {
      title: "CPU: SHA-256 of 256 MB",
      programs: ["sha256sum"],
      command: "head -c 256M /dev/zero | sha256sum",
    },
    {
      title: "2,000 files in a shell loop: write, cat, remove",
      programs: ["cat"],
      command: `mkdir loop; i=0
        while [ $i -lt 2000 ]; do echo $i > loop/$i; cat loop/$i > /dev/null; i=$((i + 1)); done
        rm -r loop`,
    },
    {
      title: "grep -r in 50,000 files",
      programs: ["grep", "git"],
      command: "grep -r --exclude-dir=.git 'line 250 50' tree",
    },
    {
      title: "git status of 50,000 files",
      programs: ["git"],
      command: "git -C tree status --porcelain",
    },
    {
      title: `npm install of ${packages.length} packages from a registry on loopback`,
      programs: ["npm"],
      command: `rm -rf app; mkdir app; cd app; echo '{}' > package.json
        npm install --silent --no-audit --no-fund --cache ./cache --registry ${url} ${packages.join(" ")}`,
    },
  ];
}

export async function native(turns: number): Promise<Comparison[]> {
  const registry = await startRegistry(50, 20);
  const directory = mkdtempSync(join(tmpdir(), "agentvm-bench-native-"));
  try {
    return await withClient({ loopbackExemptPorts: [registry.port] }, async (client) => {
      const agent = client.vm.getOrCreate("native");
      const places = [
        {
          name: "agent.exec",
          async run(command: string) {
            const { exitCode, stderr } = await agent.exec(command, { env: ENV });
            if (exitCode !== 0) throw new Error(`in the VM: ${command}: ${stderr}`);
          },
        },
        { name: "beside Node", run: inDirectory(join(directory, "native"), "/bin/sh", []) },
      ];
      if (isInstalled("bwrap")) {
        const own = join(directory, "bwrap");
        places.push({ name: "bwrap", run: inDirectory(own, "bwrap", bwrap(own)) });
      }
      if (isInBase("git")) for (const place of places) await place.run(TREE);

      const comparisons: Comparison[] = [];
      for (const { title, programs, command } of jobs(registry)) {
        if (!programs.every(isInBase)) continue;
        const competitors = places.map(({ name, run }) => ({
          name,
          run: () => timed(() => run(command)),
        }));
        const about = { title, goal: "parity", baseline: "beside Node", paired: true };
        comparisons.push(await compare(about, competitors, turns));
      }
      return comparisons;
    });
  } finally {
    registry.close();
    rmSync(directory, { recursive: true, force: true });
  }
}

/** The namespaces of `--unshare-all` but for the network, which the registry is reached by. */
function bwrap(directory: string): string[] {
  return [
    ...["--unshare-all", "--share-net", "--die-with-parent"],
    ...["/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc"]
      .filter((path) => existsSync(path))
      .flatMap((path) => ["--ro-bind", path, path]),
    ...["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"],
    ...["--bind", directory, "/home/user", "--chdir", "/home/user"],
    ...["--setenv", "HOME", "/home/user", "/bin/sh"],
  ];
}

function inDirectory(directory: string, program: string, args: readonly string[]) {
  mkdirSync(directory);
  const options = { cwd: directory, env: { ...ENV, HOME: directory } };
  return (command: string) =>
    new Promise<void>((resolve, reject) => {
      execFile(program, [...args, "-c", command], options, (error) =>
        error === null ? resolve() : reject(error),
      );
    });
}

function isInBase(program: string): boolean {
  try {
    execFileSync("/bin/sh", ["-c", `command -v ${program}`], { env: ENV, stdio: "ignore" });
    return true;
  } catch {
    return false;
  }
}

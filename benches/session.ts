// createSession("pi") against a bare Node that imports Pi's SDK and makes a session.
//
// Both run the store's Node and packages, offline. Node's compile cache is the largest single
// influence, so its two states of the bare Node are compared apart: 'first' finds an empty one and
// fills it, 'later' finds it full. Our own side finds the one of the agent store in both.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import type { Agent } from "agentvm";
import { type Comparison, type Competitor, compare, timed } from "./measure";
import { agentStore, withClient } from "./setting";

const PACKAGE = "@earendil-works/pi-coding-agent";
const ENV = { ANTHROPIC_API_KEY: "unused" };

export function session(turns: number): Promise<Comparison[]> {
  return withClient({}, async (client) => {
    const running = client.vm.getOrCreate("running");
    const sleeping = client.vm.getOrCreate("sleeping");
    // Installs what is missing, and fills the compile caches.
    await createAndClose(running);
    await createAndClose(sleeping);
    await sleeping.sleep();
    const store = installed(agentStore());
    const warm = mkdtempSync(join(tmpdir(), "agentvm-bench-cache-"));
    try {
      const goal = "at most 1.3 × the bare Node";
      const first = await compare(
        {
          title: 'First createSession("pi") of a VM; the bare Node without a compile cache',
          goal,
          baseline: "bare Node, SDK's main",
        },
        [
          {
            name: "fresh VM: boot + createSession",
            async run(turn) {
              const agent = client.vm.getOrCreate(["fresh", String(turn)]);
              const time = await timed(() => agent.createSession("pi", { env: ENV }));
              await agent.destroy();
              return time;
            },
          },
          {
            name: "running VM: createSession",
            async run(turn) {
              const agent = client.vm.getOrCreate(["first", String(turn)]);
              await agent.wake();
              const time = await timed(() => agent.createSession("pi", { env: ENV }));
              await agent.destroy();
              return time;
            },
          },
          bare(store, "main", undefined),
          bare(store, "bundle", undefined),
        ],
        turns,
      );
      const later = await compare(
        {
          title: 'Later createSession("pi"): full compile cache',
          goal,
          baseline: "bare Node, SDK's main",
        },
        [
          {
            name: "sleeping VM: boot + createSession",
            async run() {
              const time = await createAndClose(sleeping);
              await sleeping.sleep();
              return time;
            },
          },
          { name: "running VM: createSession", run: () => createAndClose(running) },
          bare(store, "main", warm),
          bare(store, "bundle", warm),
        ],
        turns,
      );
      return [first, later];
    } finally {
      rmSync(warm, { recursive: true, force: true });
    }
  });
}

/** Only making it is timed. Closing it lets the agent exit, which is when Node writes its cache. */
async function createAndClose(agent: Agent): Promise<number> {
  const start = performance.now();
  const { sessionId } = await agent.createSession("pi", { env: ENV });
  const time = performance.now() - start;
  await agent.closeSession(sessionId);
  return time;
}

interface Store {
  node: string;
  entry: string;
}

function installed(root: string): Store {
  const found = (prefix: string) => {
    const name = readdirSync(root).find((entry) => entry.startsWith(prefix));
    if (name === undefined) throw new Error(`no ${prefix}* in ${root}`);
    return join(root, name);
  };
  return { node: join(found("node-"), "bin/node"), entry: found("pi-") };
}

/**
 * A script of three lines. The package carries its SDK as some 900 modules, which is what its name
 * imports, and bundled into a few files, which is what our adapter imports: both are shown.
 *
 * @param cache folder of the compile cache; without one, each turn has an empty one of its own
 */
function bare(store: Store, form: "main" | "bundle", cache: string | undefined): Competitor {
  const bundle = join(store.entry, "node_modules", PACKAGE, "dist/bundle/index.js");
  if (form === "bundle" && !existsSync(bundle)) throw new Error(`no ${bundle}`);
  const script = `
    const { createAgentSession } = await import(${JSON.stringify(form === "main" ? PACKAGE : bundle)});
    const { session } = await createAgentSession({ cwd: process.env.HOME });
    console.log(session.sessionId);
    process.exit(0);
  `;
  return {
    name: `bare Node, SDK's ${form}`,
    async run() {
      const home = mkdtempSync(join(tmpdir(), "agentvm-bench-home-"));
      const env = {
        ...ENV,
        HOME: home,
        PATH: "/usr/bin:/bin",
        PI_OFFLINE: "1",
        PI_SKIP_VERSION_CHECK: "1",
        PI_TELEMETRY: "0",
        NODE_COMPILE_CACHE: cache ?? join(home, "compile-cache"),
      };
      const start = performance.now();
      const child = spawn(store.node, ["--input-type=module", "--eval", script], {
        cwd: store.entry,
        env,
        stdio: ["ignore", "pipe", "inherit"],
      });
      const closed = once(child, "close");
      let time = Number.NaN;
      for await (const _id of createInterface({ input: child.stdout })) {
        time = performance.now() - start;
        break;
      }
      await closed;
      rmSync(home, { recursive: true, force: true });
      if (Number.isNaN(time)) throw new Error("the bare Node made no session");
      return time;
    },
  };
}

/** An agent as a process: ACP on standard input and output, signals, exit. */

import { killChildren } from "./children.js";
import { Connection, type Handlers } from "./protocol.js";
import { takeStdout } from "./stdout.js";

/** How long open turns and unwritten output may delay the exit. */
const EXIT_GRACE_MS = 2000;

export interface ServedAgent {
  handlers(): Handlers;
  /** Ends all turns and the processes that they run. */
  close(): Promise<void>;
}

/** Serves until standard input ends or a signal comes, then exits. */
export async function serve(create: (connection: Connection) => ServedAgent): Promise<never> {
  const output = takeStdout();
  process.on("uncaughtException", die);
  process.on("unhandledRejection", die);
  const connection = new Connection(output);
  const agent = create(connection);

  let exiting = false;
  async function exit(code: number): Promise<never> {
    if (!exiting) {
      exiting = true;
      const grace = new Promise((resolve) => setTimeout(resolve, EXIT_GRACE_MS));
      const closed = agent.close().then(() => connection.flush());
      await Promise.race([closed, grace]);
      killChildren();
      process.exit(code);
    }
    return await new Promise<never>(() => {});
  }

  // The client is gone when it closes either end.
  output.on("error", () => void exit(0));
  process.on("SIGTERM", () => void exit(143));
  process.on("SIGINT", () => void exit(130));
  process.on("SIGHUP", () => void exit(129));

  try {
    await connection.serve(process.stdin, agent.handlers());
  } catch (error) {
    process.stderr.write(`standard input: ${String(error)}\n`);
  }
  return await exit(0);
}

function die(error: unknown): never {
  process.stderr.write(`${error instanceof Error ? error.stack : String(error)}\n`);
  killChildren();
  process.exit(1);
}

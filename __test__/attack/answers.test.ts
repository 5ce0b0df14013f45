/**
 * Answers of hostile servers in a VM to `vmFetch` and `vmWebSocket`: thousands, made from those below by
 * changing some bytes. Each ends, as an answer or as an error with a code.
 */

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { brotliCompressSync, deflateSync, gzipSync } from "node:zlib";
import type { Agent } from "agentvm";
import { expect, test } from "vitest";
import { newVm, ROOT } from "../fixtures.js";

const AT_ONCE = 8;
const CHANGED = 2000;

/** Of one call: whoever reaches it was left waiting. */
const PATIENCE_MS = 30_000;

const compressed = (encoding: string, compress: (text: Buffer) => Buffer) =>
  Buffer.concat([
    Buffer.from(`HTTP/1.1 200 OK\r\ncontent-encoding: ${encoding}\r\n\r\n`),
    compress(Buffer.alloc(3000, "ab")),
  ]);

const ANSWERS = [
  ...[
    "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-t: 1\r\n\r\n",
    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\n\r\nx",
    "HTTP/1.0 301 Moved\r\nlocation: /x\r\n\r\n",
    "HTTP/1.1 302 Found\r\nlocation: http://[::1]:3000/\r\nset-cookie: a=b\r\n\r\n",
    "HTTP/1.1 200 OK\r\ncontent-type: text/html; charset=\xff\r\nset-cookie: a\r\nx: \xe4\r\n\r\n",
    "HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\nhello",
    "HTTP/1.1 999 What\r\n\r\n",
    "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nraw",
    "HTTP/1.1 401 Who\r\nwww-authenticate: Basic\r\n\r\n",
    "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\nx",
    "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "HTTP/1.1 200 OK\r\n__proto__: x\r\nconstructor: y\r\n\r\n",
  ].map((answer) => Buffer.from(answer, "latin1")),
  compressed("gzip", gzipSync),
  compressed("deflate", deflateSync),
  compressed("br", brotliCompressSync),
];

const FRAMES = [
  [0x81, 2, 104, 105],
  [0xc1, 4, 0xca, 0x48, 0xcd, 0],
  [0x82, 126, 0, 2, 1, 2],
  [0x89, 1, 1, 0x8a, 0, 0x88, 2, 3, 232],
  [0x81, 127, 255, 255, 255, 255, 255, 255, 255, 255, 1],
  [0x01, 1, 97, 0x80, 1, 98],
  [0x81, 0x82, 1, 2, 3, 4, 5, 6],
  [0x81, 1, 0xff],
  [0x88, 1, 3],
].map((frames) => Buffer.from(frames));

/** The same numbers each time, below `end`. */
function numbers(seed: number): (end: number) => number {
  let state = seed;
  return (end) => {
    state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0;
    return Math.floor((state / 2 ** 32) * end);
  };
}

const LIKELY = Buffer.from("\0\n\r :0f\xff", "latin1");

function changed(kinds: Buffer[], number: (end: number) => number): Buffer {
  const any = () => kinds[number(kinds.length)] as Buffer;
  let answer = any();
  for (let changes = 1 + number(4); changes > 0; changes--) {
    const at = number(answer.length + 1);
    const [before, after] = [answer.subarray(0, at), answer.subarray(at)];
    const into = [
      () => [before, Buffer.from([number(256)]), after.subarray(1)],
      () => [before],
      () => [before, LIKELY.subarray(number(LIKELY.length)).subarray(0, 1), after],
      () => [before, after.subarray(0, number(20)), after],
      () => [before, any().subarray(number(10))],
      () => [before, after.subarray(number(8))],
    ][number(6)] as () => Buffer[];
    answer = Buffer.concat(into());
  }
  return answer.subarray(0, 8000);
}

const pathOf = (answer: Buffer) => `/${answer.toString("base64url")}`;

async function newServer(): Promise<Agent> {
  const agent = await newVm();
  const script = await readFile(join(ROOT, "__test__/attack/answering.mjs"));
  await agent.writeFile("server.mjs", script);
  await agent.exec("setsid node server.mjs > server.log 2>&1 &");
  await agent.waitForPort(3000);
  return agent;
}

/** Calls `ask` for each, some at a time. */
async function askAll(kinds: Buffer[], ask: (answer: Buffer) => Promise<void>): Promise<void> {
  const number = numbers(1);
  const rest = [...kinds, ...Array.from({ length: CHANGED }, () => changed(kinds, number))];
  const some = async () => {
    for (let answer = rest.pop(); answer; answer = rest.pop()) await ask(answer);
  };
  await Promise.all(Array.from({ length: AT_ONCE }, some));
}

const shown = (answer: Buffer) => JSON.stringify(answer.toString("latin1"));

test("whatever a server answers is an answer, or an error with a code", async () => {
  const agent = await newServer();
  const bodies = { whole: 0, broken: 0 };
  await askAll(ANSWERS, async (answer) => {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    let response: Response;
    try {
      response = await agent.vmFetch(3000, pathOf(answer), { signal });
    } catch (error) {
      const { code } = error as { code?: unknown };
      const codes = ["ECONNREFUSED", "ECONNRESET", "EPROTO", "NETWORK_DENIED"];
      expect(codes, shown(answer)).toContain(code);
      return;
    }
    try {
      await response.arrayBuffer();
      bodies.whole++;
    } catch (error) {
      expect(error, shown(answer)).toBeInstanceOf(TypeError);
      bodies.broken++;
    }
  });
  expect(bodies.whole).toBeGreaterThan(100);
  expect(bodies.broken).toBeGreaterThan(20);
}, 120_000);

test("a body that ends in nonsense is an error of the body", async () => {
  const agent = await newServer();
  const head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
  const response = await agent.vmFetch(3000, pathOf(Buffer.from(`${head}5\r\nhello\nno size\r\n`)));
  expect(response.status).toBe(200);
  await expect(response.text()).rejects.toThrow("terminated");
});

test("a header that is none is the server's doing", async () => {
  const agent = await newServer();
  const asked = agent.vmFetch(3000, pathOf(Buffer.from("HTTP/1.1 200 OK\r\na b: c\r\n\r\n")));
  await expect(asked).rejects.toMatchObject({ code: "EPROTO" });
});

test("whatever frames a server sends, a WebSocket is closed in the end", async () => {
  const agent = await newServer();
  const closed = { clean: 0, otherwise: 0 };
  await askAll(FRAMES, async (frames) => {
    const socket = agent.vmWebSocket(3000, pathOf(frames));
    await new Promise<void>((resolve, reject) => {
      const left = setTimeout(
        () => reject(new Error(`left open by ${shown(frames)}`)),
        PATIENCE_MS,
      );
      socket.onclose = ({ wasClean }) => {
        clearTimeout(left);
        closed[wasClean ? "clean" : "otherwise"]++;
        resolve();
      };
    });
  });
  expect(closed.clean).toBeGreaterThan(10);
  expect(closed.otherwise).toBeGreaterThan(500);
}, 120_000);

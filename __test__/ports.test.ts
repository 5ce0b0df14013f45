import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { type Agent, type ClientOptions, createClient, type VmFetchInit } from "agentvm";
import { expect, test } from "vitest";
import { failureOf, newClient, newDirectory, newVm, ROOT } from "./fixtures.js";

/** A VM in which the servers of `port-server.mjs` run. */
async function newServers(options: ClientOptions = {}): Promise<Agent> {
  const agent = await newVm(options);
  await serve(agent);
  return agent;
}

async function serve(agent: Agent): Promise<void> {
  await agent.writeFile("server.mjs", await readFile(join(ROOT, "__test__/port-server.mjs")));
  await agent.exec("setsid node server.mjs > server.log 2>&1 &");
  await agent.waitForPort(3005);
}

test("vmFetch gives a Response of the platform", async () => {
  const agent = await newServers();
  const response = await agent.vmFetch(3000, "/hello?x=1#y");
  expect(response).toBeInstanceOf(Response);
  expect(response.status).toBe(201);
  expect(response.statusText).toBe("Made");
  expect(response.headers.get("x-from")).toBe("the VM");
  expect(response.url).toBe("http://localhost:3000/hello?x=1");
  expect(await response.text()).toBe("hello");
});

test("method, headers and bodies of every kind arrive", async () => {
  const agent = await newServers();
  const echo = async (
    body: NonNullable<VmFetchInit["body"]>,
    headers: Record<string, string> = {},
  ) => (await agent.vmFetch(3000, "/echo", { method: "POST", body, headers })).text();
  const stream = new ReadableStream({
    start(controller) {
      controller.enqueue(new TextEncoder().encode("in "));
      controller.enqueue(new TextEncoder().encode("parts"));
      controller.close();
    },
  });
  expect(await echo("text")).toBe("text");
  expect(await echo(new Uint8Array([104, 105]))).toBe("hi");
  expect(await echo(new URLSearchParams({ a: "1" }))).toBe("a=1");
  expect(await echo(stream)).toBe("in parts");
  const form = new FormData();
  form.set("field", "value");
  expect(await echo(form, { "x-more": "1" })).toContain('name="field"\r\n\r\nvalue\r\n');
});

test("a stream that fails as a body fails the call with its own error", async () => {
  const agent = await newServers();
  const failure = new Error("no more");
  const body = new ReadableStream({
    pull(controller) {
      controller.error(failure);
    },
  });
  await expect(agent.vmFetch(3000, "/count", { method: "POST", body })).rejects.toBe(failure);
  const wrong = new ReadableStream({
    start: (controller) => controller.enqueue(1),
  });
  const refused = failureOf(() => agent.vmFetch(3000, "/count", { method: "POST", body: wrong }));
  expect(await refused).toMatchObject({ code: "INVALID_ARGUMENT" });
});

test("HEAD, 204 and 304 have no body", async () => {
  const agent = await newServers();
  const head = await agent.vmFetch(3000, "/method", { method: "HEAD" });
  expect(head.headers.get("x-method")).toBe("HEAD");
  expect(await head.text()).toBe("");
  for (const [path, status] of [
    ["/empty", 204],
    ["/fresh", 304],
  ] as const) {
    const response = await agent.vmFetch(3000, path);
    expect(response.status).toBe(status);
    expect(response.body).toBeNull();
  }
});

test("a compressed body is decompressed", async () => {
  const agent = await newServers();
  expect(await (await agent.vmFetch(3000, "/gzip")).text()).toBe("compressed");
});

test("a redirect is followed as `redirect` says, and never out of the VM", async () => {
  const agent = await newServers();
  const followed = await agent.vmFetch(3000, "/redirect");
  expect(followed.status).toBe(201);
  expect(followed.redirected).toBe(true);
  expect(followed.url).toBe("http://localhost:3000/hello");
  const manual = await agent.vmFetch(3000, "/redirect", { redirect: "manual" });
  expect(manual.status).toBe(302);
  expect(manual.headers.get("location")).toBe("/hello");
  const refused = await failureOf(() => agent.vmFetch(3000, "/redirect", { redirect: "error" }));
  expect(refused).toMatchObject({
    code: "REDIRECTED",
    message: expect.stringContaining('`redirect: "error"`'),
  });
  const out = await failureOf(() => agent.vmFetch(3000, "/to-host"));
  expect(out.code).toBe("NETWORK_DENIED");
  expect(out.message).toContain("192.0.2.7");
});

test("a server on ::1 alone is found", async () => {
  const agent = await newServers();
  expect(await (await agent.vmFetch(3001, "/hello")).text()).toBe("hello");
});

test("a port where nothing listens is ECONNREFUSED", async () => {
  const agent = await newVm();
  const refused = await failureOf(() => agent.vmFetch(8123, "/"));
  expect(refused.code).toBe("ECONNREFUSED");
  expect(refused.message).toContain("port 8123");
  expect(refused.message).toContain("nothing listens");
});

test("a server that closes early, or speaks something else, is an error with a code", async () => {
  const agent = await newServers();
  const early = await failureOf(() => agent.vmFetch(3002, "/"));
  expect(early).toMatchObject({ code: "ECONNRESET", message: expect.stringContaining("3002") });
  expect(await failureOf(() => agent.vmFetch(3003, "/"))).toMatchObject({ code: "EPROTO" });
  expect(await failureOf(() => agent.vmFetch(3004, "/"))).toMatchObject({
    code: "EPROTO",
    message: expect.stringContaining("Headers Overflow"),
  });
});

test("a connection that ends within the body is an error of the body", async () => {
  const agent = await newServers();
  const response = await agent.vmFetch(3000, "/cut");
  expect(response.status).toBe(200);
  await expect(response.text()).rejects.toThrow("terminated");
});

test("events of a server arrive while it goes on", async () => {
  const agent = await newServers();
  const response = await agent.vmFetch(3000, "/events");
  const reader = response.body?.getReader();
  for (let round = 0; round < 3; round++) {
    await agent.vmFetch(3000, "/next");
    const { value } = (await reader?.read()) ?? {};
    expect(Buffer.from(value ?? []).toString()).toBe("data: now\n\n");
  }
  await reader?.cancel();
});

test("a server that never answers is waited for until the signal", async () => {
  const agent = await newServers();
  const reason = new Error("enough");
  const controller = new AbortController();
  const fetching = failureOf(() => agent.vmFetch(3000, "/never", { signal: controller.signal }));
  await agent.vmFetch(3000, "/hello");
  controller.abort(reason);
  expect(await fetching).toMatchObject({ code: "ABORTED", name: "AbortError", cause: reason });
  const signal = AbortSignal.abort();
  expect(await failureOf(() => agent.vmFetch(3000, "/hello", { signal }))).toMatchObject({
    code: "ABORTED",
  });
});

test("a gigabyte goes in and out in constant memory", { timeout: 120_000 }, async () => {
  const agent = await newServers();
  const SIZE = 2 ** 30;
  const before = process.memoryUsage().rss;
  let most = before;
  const watch = () => {
    most = Math.max(most, process.memoryUsage().rss);
  };
  const headers = { "x-bytes": String(SIZE) };
  const response = await agent.vmFetch(3000, "/zeros", { headers });
  let received = 0;
  for await (const chunk of response.body ?? []) {
    received += chunk.length;
    watch();
  }
  expect(received).toBe(SIZE);

  const chunk = new Uint8Array(2 ** 20);
  let left = SIZE;
  const body = new ReadableStream({
    pull(controller) {
      watch();
      left -= chunk.length;
      controller.enqueue(chunk.slice());
      if (left === 0) controller.close();
    },
  });
  const counted = await agent.vmFetch(3000, "/count", { method: "POST", body });
  expect(await counted.text()).toBe(String(SIZE));
  expect(most - before).toBeLessThan(300 * 2 ** 20);
});

test("a hundred requests at a time", async () => {
  const agent = await newServers();
  const all = Array.from({ length: 100 }, async (_, index) => {
    const init = { method: "POST", body: `number ${index}` };
    return await (await agent.vmFetch(3000, "/echo", init)).text();
  });
  expect(await Promise.all(all)).toEqual(all.map((_, index) => `number ${index}`));
});

test("a WebSocket talks to a server in the VM", async () => {
  const agent = await newServers();
  const socket = agent.vmWebSocket(3000, "/socket");
  const answer = await new Promise((resolve, reject) => {
    socket.addEventListener("open", () => socket.send("hello"));
    socket.addEventListener("message", (event) => resolve(event.data));
    socket.addEventListener("error", reject);
  });
  expect(answer).toBe("hello");
  const events = eventsOf(socket);
  socket.close(3000, "enough");
  expect(await events).toEqual(["close 3000 enough clean"]);
});

test("a WebSocket that can't be made fails with error and close", async () => {
  const agent = await newServers();
  for (const [port, path] of [
    [8123, "/"], // nothing listens
    [3001, "/hello"], // no WebSocket
    [3002, "/"], // closes the connection
    [6000, "/"], // a port that fetch refuses
  ] as const) {
    const socket = agent.vmWebSocket(port, path);
    let state: number | undefined;
    socket.onerror = () => {
      state = socket.readyState;
    };
    expect(await eventsOf(socket)).toEqual(["error", "close 1006"]);
    expect(state).toBe(socket.CLOSED);
    socket.close();
    socket.send("nobody hears it");
  }
});

test("a WebSocket that is closed while it connects is closed", async () => {
  const agent = await newServers();
  const socket = agent.vmWebSocket(3000, "/socket");
  const events = eventsOf(socket);
  socket.close();
  expect(await events).toEqual(["error", "close 1006"]);
  // What the connection ends with later is not told again.
  const later = eventsOf(socket);
  await agent.vmFetch(3000, "/hello");
  expect(await Promise.race([later, "nothing"])).toBe("nothing");
});

test.each(["end", "destroy", "sleep"])(
  "a WebSocket whose connection breaks is closed: %s",
  async (how) => {
    const agent = await newServers();
    const socket = agent.vmWebSocket(3000, "/socket");
    await new Promise((resolve) => socket.addEventListener("open", resolve));
    const events = eventsOf(socket);
    if (how === "sleep") await agent.sleep();
    else socket.send(how);
    expect(await events).toEqual(["close 1006"]);
    expect(socket.readyState).toBe(socket.CLOSED);
  },
);

test.each(["deaf", "close"])(
  "a WebSocket whose server does not end the connection is closed: %s",
  async (how) => {
    const agent = await newServers();
    const socket = agent.vmWebSocket(3000, "/socket");
    await new Promise((resolve) => socket.addEventListener("open", resolve));
    const events = eventsOf(socket);
    socket.send(how);
    if (how === "deaf") socket.close();
    expect(await events).toEqual([how === "deaf" ? "close 1006" : "close 1005 clean"]);
  },
);

/** What a WebSocket tells until it is closed. */
function eventsOf(socket: ReturnType<Agent["vmWebSocket"]>): Promise<string[]> {
  const events: string[] = [];
  socket.addEventListener("error", () => events.push("error"));
  return new Promise((resolve) =>
    socket.addEventListener("close", ({ code, reason, wasClean }) => {
      events.push(["close", code, reason, wasClean && "clean"].filter(Boolean).join(" "));
      resolve(events);
    }),
  );
}

test("connect is a stream with two directions that end apart", async () => {
  const agent = await newServers();
  const connection = await agent.connect(3005);
  connection.end("what is said");
  expect(await text(connection)).toBe("what is saidbye");
});

test("large amounts are written and read at the same time", async () => {
  const agent = await newServers();
  const connection = await agent.connect(3005);
  const sent = Buffer.alloc(32 * 2 ** 20, "0123456789abcdef");
  connection.end(sent);
  let received = 0;
  for await (const chunk of connection) {
    received += chunk.length;
  }
  expect(received).toBe(sent.length + "bye".length);
});

test("a destroyed connection is gone for the server too", async () => {
  const agent = await newServers();
  const connection = await agent.connect(3005);
  const of = "ss -Htn state established '( sport = :3005 )' | wc -l";
  connection.destroy();
  await new Promise((resolve) => connection.on("close", resolve));
  expect((await agent.exec(of)).stdout).toBe("0\n");
});

test("sleep ends connections, and says so", async () => {
  const agent = await newServers();
  const connection = await agent.connect(3005);
  const body = (await agent.vmFetch(3000, "/events")).text();
  const failed = new Promise((resolve) => connection.on("error", resolve));
  connection.resume();
  const ended = expect(body).rejects.toMatchObject({ cause: { code: "ABORTED" } });
  await agent.sleep();
  expect(await failed).toMatchObject({ code: "ABORTED" });
  await ended;
});

test("an open connection keeps the VM awake, a finished request does not", async () => {
  const agent = await newServers({ sleepAfterMs: 300 });
  const events: string[] = [];
  const asleep = new Promise<void>((resolve) => {
    agent.on("vmShutdown", ({ reason }) => {
      events.push(reason);
      resolve();
    });
  });
  const connection = await agent.connect(3005);
  await new Promise((resolve) => setTimeout(resolve, 900));
  expect(events).toEqual([]);
  connection.destroy();
  await (await agent.vmFetch(3000, "/hello")).text();
  await asleep;
  expect(events).toEqual(["sleep"]);
});

test("a client that is closed ends its connections, those of others stay", async () => {
  const dataDir = await newDirectory();
  const [mine, other] = [createClient({ dataDir }), await newClient({ dataDir })];
  const agent = mine.vm.getOrCreate("vm");
  await serve(agent);
  const connection = await agent.connect(3005);
  const others = await other.vm.getOrCreate("vm").connect(3005);
  const failed = new Promise((resolve) => connection.on("error", resolve));
  connection.resume();
  await mine.close();
  expect(await failed).toMatchObject({ code: "CLIENT_CLOSED" });
  others.end("still there");
  expect(await text(others)).toBe("still therebye");
});

test("waitForPort waits for a server, and its signal ends that", async () => {
  const agent = await newVm();
  let listens = false;
  const waiting = agent.waitForPort(3005).then(() => {
    listens = true;
  });
  expect(await agent.listeningPorts()).toEqual([]);
  expect(listens).toBe(false);
  await serve(agent);
  await waiting;
  expect(await agent.listeningPorts()).toContainEqual({ port: 3001, address: "::1" });
  const controller = new AbortController();
  const never = failureOf(() => agent.waitForPort(3999, { signal: controller.signal }));
  controller.abort();
  expect((await never).code).toBe("ABORTED");
});

test("a port that is the host's in the VM is refused", async () => {
  const agent = await newVm({ loopbackExemptPorts: [3000] });
  const refused = await failureOf(() => agent.vmFetch(3000, "/"));
  expect(refused).toMatchObject({
    code: "INVALID_ARGUMENT",
    message: expect.stringContaining("loopbackExemptPorts"),
  });
});

test("a server in a VM listens on no port of the host", async () => {
  const table = async () => {
    const rows = (await readFile("/proc/net/tcp", "utf8")).split("\n");
    return rows.filter((row) => /^\s*\d+: [0-9A-F]+:0BBD /.test(row)); // 3005
  };
  const agent = await newServers();
  const connection = await agent.connect(3005);
  expect(await table()).toEqual([]);
  connection.destroy();
});

test("arguments that make no sense are named", async () => {
  const agent = await newVm();
  for (const port of [0, 65_536, 1.5, "80" as unknown as number]) {
    expect(await failureOf(() => agent.vmFetch(port, "/"))).toMatchObject({
      code: "INVALID_ARGUMENT",
      message: expect.stringContaining("port"),
    });
  }
  const path = await failureOf(() => agent.vmFetch(80, "no-slash"));
  expect(path).toMatchObject({
    code: "INVALID_ARGUMENT",
    message: expect.stringContaining("path"),
  });
  const init = await failureOf(() => agent.vmFetch(80, "/", { body: "of a GET" }));
  expect(init).toMatchObject({
    code: "INVALID_ARGUMENT",
    message: expect.stringContaining("init"),
  });
  const bad = await failureOf(() => agent.vmFetch(6000, "/"));
  expect(bad).toMatchObject({
    code: "INVALID_ARGUMENT",
    message: expect.stringContaining("connect"),
  });
});

/** HTTP and WebSocket to servers inside a VM: fetch as the platform knows it, over connections of ours. */

import { Readable } from "node:stream";
import type * as Undici from "undici";
import type * as Api from "../index";
import { bytes, requireSignal, requireString } from "./arguments";
import { connect, requirePort, type VmConnection } from "./connection";
import { AgentVmError, aborted, invalidArgument } from "./errors";
import type { native } from "./native";

type NativeVm = InstanceType<typeof native.NativeVm>;

/** Names of the VM's loopback, as a URL has them. Every other host is outside of the VM. */
const LOOPBACK = new Set(["localhost", "127.0.0.1", "::1"]);

/** Responses that have no body, and that the constructor of `Response` takes none for. */
const WITHOUT_BODY = new Set([204, 205, 304]);

/** Keeps the response that undici made as long as the caller has ours: with it, undici drops its body. */
const originals = new WeakMap<Response, Undici.Response>();

/** Loaded when it is needed for the first time: most programs that use this package never do. */
const undici = (): typeof Undici => require("undici");

export async function vmFetch(
  vm: NativeVm,
  port: number,
  path: string,
  init: Api.VmFetchInit,
): Promise<Response> {
  const url = address("http", port, path);
  const { signal, ...rest } = requireInit(init);
  if (signal?.aborted) {
    throw aborted(signal);
  }
  const { body, headers } = standardBody(rest);
  const streamed = isStream(body) ? new StreamedBody(body) : undefined;
  let asked = false;
  const dispatcher = loopback(vm, { onConnect: () => (asked = true) });
  // Undici leaves a connection open that is established after its request was given up.
  const abort = () => void dispatcher.destroy().catch(() => {});
  signal?.addEventListener("abort", abort, { once: true });
  try {
    const response = await undici().fetch(url, {
      ...rest,
      ...(headers ? { headers } : {}),
      ...(streamed ? { body: emptyStream(), duplex: "half" } : { body }),
      ...(signal ? { signal } : {}),
      dispatcher: streamed ? streamed.through(dispatcher) : dispatcher,
    } as Undici.RequestInit);
    return standard(response, port);
  } catch (error) {
    if (signal?.aborted) {
      throw aborted(signal);
    }
    throw streamed?.failure ?? failure(error, port, asked);
  } finally {
    // From here on the signal ends the body, which undici sees to.
    signal?.removeEventListener("abort", abort);
  }
}

export function vmWebSocket(
  vm: NativeVm,
  port: number,
  path: string,
  protocols?: string | readonly string[],
): Undici.WebSocket {
  const url = address("ws", port, path);
  let connection: VmConnection | undefined;
  // As TCP sockets are: one whose server has ended is closed.
  const dispatcher = loopback(vm, {
    allowHalfOpen: false,
    onConnect: (own) => {
      connection = own;
      own.readAtMost = TURN;
    },
  });
  const init = protocols === undefined ? {} : { protocols: protocols as string | string[] };
  return new (webSocketClass())(url, { ...init, dispatcher }, () => connection);
}

/**
 * A server has this long to end a connection after a close, in milliseconds, and twice as long at most, from when
 * the kernel has taken all that it is to be sent, or takes no more.
 */
const CLOSING_MS = 5000;

/** Bytes of a WebSocket that are read at once: each two of them may be a message, which are all told in one go. */
const TURN = 16 * 1024;

type WebSocketClass = new (
  url: string,
  init: Undici.WebSocketInit,
  connection: () => VmConnection | undefined,
) => Undici.WebSocket;

let webSocket: WebSocketClass | undefined;

/**
 * Undici's, which has an end in any case: that of undici alone says `error` and goes on connecting where it can't
 * connect, and waits for ever for a server that does not end the connection after a close.
 */
function webSocketClass(): WebSocketClass {
  const { CloseEvent, WebSocket } = undici();
  webSocket ??= class extends WebSocket {
    #failed = false;

    constructor(
      url: string,
      init: Undici.WebSocketInit,
      connection: () => VmConnection | undefined,
    ) {
      super(url, init);
      this.addEventListener("open", () => this.#watch(connection()), { once: true });
      this.addEventListener("error", (event) => {
        if (this.#failed) {
          event.stopImmediatePropagation();
        } else if (super.readyState === WebSocket.CONNECTING) {
          this.#failed = true;
          queueMicrotask(() => this.dispatchEvent(new CloseEvent("close", { code: 1006 })));
        }
      });
    }

    override get readyState() {
      return this.#failed ? WebSocket.CLOSED : super.readyState;
    }

    override close(code?: number, reason?: string): void {
      if (!this.#failed) super.close(code, reason);
    }

    /** Nothing tells of a close that came from the server. */
    #watch(connection: VmConnection | undefined): void {
      /** What the server had been sent when it was last seen closing. */
      let taken: number | null | undefined;
      const timer = setInterval(() => {
        if (super.readyState !== WebSocket.CLOSING) return;
        if (connection?.taken === taken) connection?.destroy();
        taken = connection?.taken;
      }, CLOSING_MS);
      timer.unref();
      this.addEventListener("close", () => clearInterval(timer), { once: true });
    }

    override send(data: Parameters<Undici.WebSocket["send"]>[0]): void {
      if (!this.#failed) super.send(data);
    }
  };
  return webSocket;
}

/** Connects to servers in the VM and to nothing else, whatever a redirect says. Waits as long as it takes. */
function loopback(
  vm: NativeVm,
  {
    allowHalfOpen = true,
    onConnect = () => {},
  }: { allowHalfOpen?: boolean; onConnect?: (connection: VmConnection) => void },
): Undici.Dispatcher {
  return new (undici().Agent)({
    connect: ({ protocol, hostname, port }, callback) => {
      if (protocol !== "http:" || !LOOPBACK.has(hostname)) {
        callback(leadsOut(`${protocol}//${hostname}`), null);
        return;
      }
      connect(vm, Number(port || 80)).then(
        (connection) => {
          onConnect(connection);
          connection.allowHalfOpen = allowHalfOpen;
          // A Duplex is all of a socket that undici uses.
          callback(null, connection as unknown as import("node:net").Socket);
        },
        (error: Error) => callback(error, null),
      );
    },
    // A connection for each request: one that is idle would keep the VM awake.
    pipelining: 0,
    headersTimeout: 0,
    bodyTimeout: 0,
  });
}

function leadsOut(where: string): AgentVmError {
  return new AgentVmError(
    "NETWORK_DENIED",
    `a redirect to ${where} leads out of the VM, or to HTTPS: it is not followed. With ` +
      '`redirect: "manual"` the response is yours',
  );
}

function address(scheme: string, port: number, path: string): string {
  requirePort(port);
  requireString("path", path);
  if (!path.startsWith("/")) {
    throw invalidArgument(
      "path",
      `must begin with "/", as "/index.html", not ${JSON.stringify(path)}`,
    );
  }
  return `${scheme}://localhost:${port}${path}`;
}

/** Only its kind: what is in it is fetch's to judge. */
function requireInit(init: Api.VmFetchInit): Api.VmFetchInit {
  if (typeof init !== "object" || init === null) {
    throw invalidArgument("init", "must be an object");
  }
  requireSignal(init.signal ?? undefined);
  return init;
}

/** Undici takes a `FormData` of its own only; that of the platform is encoded by the platform. */
function standardBody({ body, headers }: Api.VmFetchInit): {
  body: unknown;
  headers?: HeadersInit;
} {
  if (!(body instanceof FormData)) {
    return { body };
  }
  const encoded = new Response(body);
  const all = new Headers(headers as HeadersInit);
  all.set("content-type", encoded.headers.get("content-type") ?? "");
  return { body: encoded.body, headers: [...all] };
}

type HeadersInit = ConstructorParameters<typeof Headers>[0];

type Chunks = AsyncIterable<unknown>;

/** A `ReadableStream`, a stream of Node, or anything else that gives bytes in time. */
function isStream(body: unknown): body is Chunks {
  return typeof body === "object" && body !== null && Symbol.asyncIterator in body;
}

const emptyStream = () =>
  new ReadableStream({
    start: (controller) => controller.close(),
  });

/**
 * A body that is read as fast as the server takes it. Fetch would keep all of it: it makes a copy of each
 * request (`tee()`), whose body nobody reads. So fetch is given an empty stream, which it treats as a
 * stream in all that follows (a redirect can't repeat it), and what is sent is put in its place.
 */
class StreamedBody {
  /** What the stream itself failed with. */
  failure: unknown;
  readonly #chunks: Chunks;

  constructor(chunks: Chunks) {
    this.#chunks = chunks;
  }

  through(dispatcher: Undici.Dispatcher): Undici.Dispatcher {
    return dispatcher.compose((dispatch) => (options, handler) => {
      // None: a redirect has made it a GET.
      const body = options.body ? Readable.from(this.#read(), { objectMode: false }) : null;
      return dispatch({ ...options, body }, handler);
    });
  }

  async *#read(): AsyncGenerator<string | Uint8Array> {
    try {
      for await (const chunk of this.#chunks) {
        yield bytes("init.body", chunk);
      }
    } catch (error) {
      this.failure = error;
      throw error;
    }
  }
}

/** The same as a `Response` of the platform: programs ask what it is an instance of. */
function standard(original: Undici.Response, port: number): Response {
  const { status, statusText, url, redirected } = original;
  if (status < 200 || status > 599) {
    void original.body?.cancel().catch(() => {});
    throw new AgentVmError(
      "EPROTO",
      `the server on port ${port} in the VM answered with a status that HTTP does not have: ${status}`,
    );
  }
  const body = WITHOUT_BODY.has(status) ? null : original.body;
  const response = new Response(body as ReadableStream | null, {
    status,
    statusText,
    headers: [...original.headers],
  });
  Object.defineProperties(response, { url: { value: url }, redirected: { value: redirected } });
  originals.set(response, original);
  return response;
}

type ReadableStream = NonNullable<ConstructorParameters<typeof Response>[0]>;

/** What fetch hides behind "fetch failed". */
function failure(error: unknown, port: number, asked: boolean): unknown {
  const { message, cause } = error as Error & { cause?: Error & { code?: string } };
  if (!asked && cause === undefined) {
    return invalidArgument("init", message); // fetch refused what it was given
  }
  if (cause instanceof AgentVmError) {
    return cause;
  }
  if (cause?.message === "bad port") {
    return invalidArgument("port", `fetch refuses port ${port}: use agent.connect(${port})`);
  }
  const server = `the server on port ${port} in the VM`;
  if (cause?.message === "unexpected redirect") {
    const problem = `${server} answered with a redirect, which \`redirect: "error"\` refuses`;
    return new AgentVmError("REDIRECTED", problem, { cause });
  }
  if (cause?.code === "UND_ERR_SOCKET") {
    const problem = `${server} closed the connection before it had answered`;
    return new AgentVmError("ECONNRESET", problem, { cause });
  }
  const problem = `${server} did not answer as HTTP asks: ${cause?.message ?? message}`;
  return new AgentVmError("EPROTO", problem, { cause: cause ?? error });
}

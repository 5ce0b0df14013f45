/// <reference lib="esnext.disposable" />

import type { Duplex, Readable, Writable } from "node:stream";
import type { WebSocket } from "undici";

/**
 * agentvm: coding agents in isolated Linux VMs, inside the Node process that asks for them.
 *
 * ```ts
 * import { createClient } from "agentvm";
 *
 * const client = createClient();
 * const agent = client.vm.getOrCreate(["my-agent"]);
 * const session = await agent.createSession("pi", {
 *   env: { ANTHROPIC_API_KEY: process.env.ANTHROPIC_API_KEY! },
 * });
 * agent.on("sessionEvent", ({ event }) => console.log(event.method, event.params));
 * const { text } = await agent.sendPrompt(session.sessionId, "Write a hello world to hello.js");
 * ```
 *
 * Every promise of this package rejects with an {@link AgentVmError}, and a call that returns none throws it
 * at once where an argument is wrong. What is not the package's own failure comes as it was thrown: an error
 * of a stream or iterable that you hand to `uploadFile`, `downloadFile` or `vmFetch`, and the standard's
 * `SyntaxError` for `protocols` of `vmWebSocket`. What a listener throws is an `uncaughtException`.
 */

/**
 * Opens a data directory. Does no I/O: a directory that can't be used is reported by the first call
 * that needs it. Clients of one process on the same directory share its VMs.
 *
 * @throws {AgentVmError} `INVALID_ARGUMENT`, naming the option
 */
export declare function createClient(options?: ClientOptions): Client;

/** What a VM is booted with: for all VMs of a client, or for one over those. */
export interface VmOptions {
  /**
   * TCP ports that programs in a VM reach on its 127.0.0.1 and ::1, but on the *host's* loopback: a
   * model server, a database. Default: none; everything of the host is refused.
   */
  loopbackExemptPorts?: readonly number[];
  /**
   * What programs in a VM may reach. Default: the public internet. Given for one VM, it replaces the
   * client's as a whole. `setNetwork` changes it while the VM runs.
   */
  network?: NetworkRules;
  /**
   * Milliseconds (≥ 1) without a turn, and without a call that needs the VM, after which a VM goes to
   * sleep. Idle sessions, open event iterators and what agents left running do not keep it awake.
   * `false`: never. Default: 900,000 (15 minutes).
   */
  sleepAfterMs?: number | false;
  /** What a VM may take of the host. A limit that is left out is the client's, or has its default. */
  limits?: VmLimits;
  /**
   * A root file system for the VM, instead of the host's programs. It is chosen with the VM's first boot and
   * kept: later the option may be left out, the same one boots what the VM was made with whatever has
   * become of its tag, and another is refused with `IMAGE_MISMATCH` until `destroy()`. `false`: the host's
   * programs, though the client has an image; a VM that was made with one refuses that too. An image whose
   * first boot fails does not stay with the VM. Default: what the VM was made with; for a new one the
   * host's programs.
   *
   * A string names an image in a registry as Docker does: `"python:3.12"`, `"ghcr.io/owner/name:tag"`,
   * `"registry/name@sha256:…"`. It is pulled when the VM first boots (`imageProgress`) and shared by all VMs
   * that have it. Registries of the host's loopback are spoken to in plain HTTP, others in HTTPS.
   * Credentials are those that `docker login` has put into `$DOCKER_CONFIG/config.json`, or
   * `~/.docker/config.json`; its credential helpers are not asked.
   *
   * What the VM writes over the image is its own, and kept. `/home/user`, `/tmp`, `/run`, `/dev` and
   * `/proc`, the resolver's files and `/opt/agentvm` are the VM's, the rest is the image's, `/var`, `/root`
   * and `/etc` too. Programs get the image's `Env` below the `env` of the call. They run as `user` with id
   * 1000 (which is added to its accounts, or has the name that the image gives it), never as the image's
   * `User`; its `Entrypoint` and `WorkingDir` are not used. `exec` needs a `/bin/sh` in it; the agents that
   * agentvm brings need glibc 2.28 or later and libstdc++, else they reject with `AGENT_UNSUPPORTED`.
   *
   * What is fetched and unpacked has 64 GiB and 2,000,000 entries at most (`IMAGE_TOO_LARGE`), and leaves
   * `minFreeDiskBytes` of `limits` free (`STORE_FULL`), of which a file counts as 16 KiB where files run out
   * first. `/etc`, `/var`, `/home` and the like are directories in it, not links (`IMAGE_INVALID`). Aborting
   * the call that waits for an image ends that.
   */
  image?: string | OciLayoutImage | RootfsImage | false;
  /**
   * Directories and files of the host in the VM, 32 at most. Given for a VM, they replace the client's.
   * They hold from the VM's next boot. Default: none.
   *
   * ```ts
   * client.vm.getOrCreate("vm", { mounts: [{ path: "/home/user/project", hostPath: "." }] });
   * ```
   */
  mounts?: readonly Mount[];
  /**
   * Values that programs in a VM use without having them, by the name of the environment variable that
   * holds a placeholder instead (none that programs need for something else, as `PATH`, `HOME` or `LD_…`);
   * 64 at most. Given for a VM, they replace the client's. They hold from the VM's next boot; `agent.setSecrets` exchanges those of a running one. They are never written to disk.
   * Default: none.
   *
   * ```ts
   * createClient({
   *   secrets: { ANTHROPIC_API_KEY: { value: key, hosts: ["api.anthropic.com"] } },
   * });
   * ```
   *
   * On its way out to those hosts, in TLS that the host process ends and begins anew, the placeholder in a
   * named header or query parameter becomes the value. Anywhere else it stays, and where that is seen
   * there is `secretMisdirected`. A VM with secrets trusts an authority that is made for each of its boots:
   * `NODE_EXTRA_CA_CERTS`, `SSL_CERT_FILE`, `GIT_SSL_CAINFO`, `REQUESTS_CA_BUNDLE`, `CARGO_HTTP_CAINFO` and
   * `DENO_CERT` name files with it, and `npm_config_cafile` where the host's npmrc names a `cafile`, unless
   * the call sets them. The real servers are verified by the
   * authorities that this host trusts (or those in `SSL_CERT_FILE` and `SSL_CERT_DIR`) and those in
   * `NODE_EXTRA_CA_CERTS`, as they are when the first is needed; who fails is answered for with status 502.
   *
   * `SECURITY.md` says what this does not promise: above all, a host that sends headers back, or publishes
   * what it is sent, hands out the value.
   */
  secrets?: Readonly<Record<string, SecretOptions>>;
}

/** A value that a VM uses and does not have, and where it may go. */
export interface SecretOptions {
  /** Text that can stand in a header: ASCII, 32 KiB at most, without line breaks or space at its ends. */
  value: string;
  /**
   * Names of the hosts that get it, one at least (the rules of `network` have to allow them, too): `"api.example.com"`, or `"*.example.com"` for every name
   * below (not for itself), with `:port` where that is not 443. No addresses: TLS asks for none.
   */
  hosts: readonly string[];
  /**
   * Names of the headers in which it takes the placeholder's place: as all of the header or a part of it,
   * as in `Bearer …`, and in the user or password of `Basic …`.
   * Default: `["authorization", "x-api-key", "x-goog-api-key"]`.
   */
  headers?: readonly string[];
  /** Names of query parameters, the same. Default: none. */
  query?: readonly string[];
  /**
   * What programs get instead of the value, for those that look at its form: 16 to 256 letters, digits, `-`,
   * `.`, `_` or `~`, which must occur nowhere by chance. Default: `agentvm-secret-` and 32 digits that are
   * random for each VM and name, and stay the same at each boot.
   */
  placeholder?: string;
}

/**
 * A directory or file of the host in a VM. What is mounted below it on the host is not shown, links out of
 * it lead nowhere, and devices and set-user-ID programs in it are only files. The data directory and the
 * agent store are seen empty in it; a mount of something in them is refused. Sockets are not only files: what
 * listens at one on the host, such as Docker, serves the VM too, also where the mount is read-only.
 *
 * Its owner on the host is `user` in the VM, and what `user` makes in it is that owner's on the host. Where
 * the host process is root, other owners of the host are nobody in the VM, which may do with their files
 * what everybody may, and files of the VM's root belong to nobody of the host. A VM that has a writable
 * mount sets no set-user-ID or set-group-ID bit, anywhere (`EPERM`): a package with such a program can't be
 * installed in it.
 *
 * Where something is missing, the call that boots the VM rejects with an errno name, `ENOENT` for
 * example, and names it: `mounts[0].hostPath`.
 */
export interface Mount {
  /**
   * Where it is in the VM: absolute, not in `/usr`, `/etc`, `/proc` and the like. What is missing of the
   * path is made in the VM; symbolic links on the way are an error (`ELOOP`).
   */
  path: string;
  /** On the host; a relative path starts at `process.cwd()`. It is looked up when the VM boots. */
  hostPath: string;
  /** No file in it can be changed from the VM. Default: `false`. */
  readOnly?: boolean;
}

/** An image in a directory on the host, as `skopeo copy docker://… oci:<dir>:<tag>` makes one. */
export interface OciLayoutImage {
  /**
   * A directory in the OCI image layout. Its image is unpacked once, into `imageStoreDir`. No symbolic link in
   * it is followed (`IMAGE_INVALID`), and none on the way to it that a VM could have made (`INVALID_ARGUMENT`).
   */
  ociLayout: string;
  rootfs?: never;
  /** Which image of it. Not needed if there is one. */
  tag?: string;
}

/** A directory on the host that holds a root file system, as debootstrap makes one. */
export interface RootfsImage {
  /**
   * It is used where it is, shared by all VMs that have it, never written to, and must not change while
   * one of them runs. Without root on the host, its files belong to the caller, or it is refused with
   * `IMAGE_INVALID`: a VM can change no others. It is not `/`, and neither holds nor lies in a data
   * directory, `agentStoreDir` or `imageStoreDir` (`INVALID_ARGUMENT`).
   */
  rootfs: string;
  ociLayout?: never;
  tag?: never;
}

/**
 * What programs in a VM may reach over TCP. `deny` comes before `allow`, and `allow` before `default`.
 *
 * A rule is `host[:port[-port]]`, of all ports unless it has some. A host is
 * - a name, `api.example.com`;
 * - `*.example.com`: every name below this one, at any depth, and not the name itself;
 * - an IPv4 or IPv6 address, or a network: `203.0.113.7`, `10.0.0.0/8`, `2001:db8::1`,
 *   `[2001:db8::/32]:443`;
 * - `*`: every name and public address.
 *
 * Names are of any case, also of other scripts. A name that is not allowed is not resolved (`REFUSED`, and
 * no resolver outside is asked), nor is one with an alias that is denied on all ports. A name that is allowed is reached
 * at the addresses that the VM's own resolver has given out for it, in the last ten minutes to an hour by
 * the time to live of the answer, and if a connection begins with TLS, only for a server name that is
 * allowed as well: no raw address, no other site of the same address, no changed answer leads around it.
 * What begins otherwise (plain HTTP, STARTTLS) is held to the address alone.
 *
 * Private, link-local, carrier-grade NAT, metadata, multicast and reserved addresses are opened by a rule
 * of their address or of a network that is not public as a whole, never by a name or by `*`; an address of
 * the host by a rule of exactly this address; its loopback by `loopbackExemptPorts`, which hold under every
 * default.
 *
 * What is refused fails at once inside (connection refused, or reset), and is the event `networkDenied`.
 * Other protocols than TCP never leave a VM. Of new connections 1024 may come at once, and 256 in each second
 * from then on; of questions to the resolver 256, and 128. More wait, as do connections beyond 1024 that are
 * open at the same time (fewer where the host process may open few files).
 *
 * @example
 * ```ts
 * const agent = client.vm.getOrCreate("build", {
 *   network: { default: "allowlist", allow: ["api.anthropic.com:443", "*.npmjs.org:443"] },
 * });
 * ```
 */
export interface NetworkRules {
  /**
   * What no rule speaks of: the public internet is allowed (`public`, the default), nothing is (`none`,
   * which takes no `allow`), or nothing but what `allow` has (`allowlist`).
   */
  default?: "public" | "none" | "allowlist";
  /** At most 4096. Where the default is `public`, those that open what is not: of addresses and networks. */
  allow?: readonly string[];
  /** At most 4096. */
  deny?: readonly string[];
}

/**
 * What a VM may take. Limits hold from the VM's next boot. One that is given here and that this host can't
 * enforce makes the call that boots the VM reject with `VM_UNSUPPORTED`, naming it, unless `bestEffort` is
 * set.
 *
 * `memoryBytes` and `cpus` need cgroups: v1 as root, or a v2 subtree that was delegated to this process, as
 * `systemd-run --user --scope -p Delegate=yes node …` makes one. Joining a cgroup takes a boot some 10 ms,
 * for which reason VMs without these limits are in none.
 */
export interface VmLimits {
  /**
   * Of all processes together, with the page cache and what they keep in `/tmp` (half of it at most),
   * `/dev/shm` (a quarter) and `/run` (an eighth). Beyond it the kernel kills the largest process:
   * `limitReached`, and an `exec` or a turn that dies of it rejects with `VM_LIMIT`. Where nothing else is
   * left to kill it kills all of the VM: calls that were under way reject with `VM_LIMIT`, the next one
   * boots it again. At least 4 MiB. Default: no limit.
   */
  memoryBytes?: number;
  /** CPUs' worth of time, as `0.5` or `2`; beyond it processes wait. 0.01 to 8192. Default: no limit. */
  cpus?: number;
  /**
   * Processes and threads, 8 to 4,194,304. Beyond it programs can start none (`EAGAIN`, "Cannot fork"), and a
   * call that has to start one, as `exec`, rejects with `VM_LIMIT`; `sleep()` ends them all. A fork bomb,
   * which slows the machine down long before, is ended: hundreds of processes that go on starting others
   * and end, a hundred orphans of them a second for three seconds. All that runs in the VM is killed then:
   * `limitReached`, and what runs rejects with `VM_LIMIT`.
   *
   * Default: 4096 for `user`, and as many for each other user of the VM, which needs no cgroup (Linux 5.14)
   * and which the VM's root gets around by acting as others. A number that is given here is for all users
   * together, which takes a cgroup where the VM has a root.
   */
  pids?: number;
  /**
   * Open files of each process, 64 to 1,048,576: its hard limit. The soft one is 1024 at most, as on other
   * Linux systems; who needs more raises it (`ulimit -n`). Default: as many as the host process may have,
   * where it runs as an ordinary user half of that, 1,048,576 at most.
   */
  openFiles?: number;
  /**
   * Of the VM's directory: home, `/var`, `/root`, what its root wrote to the system, sessions and events. At
   * least 1 MiB. It is looked at as often as it could be exceeded, at most four times a second, so that fast
   * writers get beyond it for a moment; then every process of the VM, agents too, is killed:
   * `limitReached`, and what runs rejects with `VM_LIMIT`. After that the VM goes on as long as it does not
   * grow, so that something can be deleted. What the caller writes itself (`writeFile`, `uploadFile`) counts,
   * and is not stopped by it. A program that hides from the measuring gets beyond it (`SECURITY.md`).
   * Default: no limit.
   */
  diskBytes?: number;
  /**
   * What the file system of the data directory keeps free, for the stores of all VMs and for the host. When
   * less is left, every process of a VM that goes on growing is killed: `limitReached`, and what runs
   * rejects with `VM_LIMIT`. It is looked at as often as a fast disk could be filled; who allocates much at
   * once (`fallocate`) is seen too late. A file system may run out of files (inodes) first: each that is
   * left counts as 16 KiB, then. `0`: nothing. Default: a 64th of the file system, 512 MiB at most.
   */
  minFreeDiskBytes?: number;
  /** Leave out what this host can't enforce. `stats()` tells what is in force. Default: `false`. */
  bestEffort?: boolean;
}

export interface ClientOptions extends VmOptions {
  /**
   * Directory of VMs, sessions and events, made with mode 0700 when it is first needed.
   * Default: `$AGENTVM_DATA_DIR`, else `$XDG_DATA_HOME/agentvm`, else `~/.local/share/agentvm`.
   */
  dataDir?: string;
  /**
   * Where installed agents are, shared by all data directories of this user.
   * Default: `$AGENTVM_CACHE_DIR/agents`, else `$XDG_CACHE_HOME/agentvm/agents`, else
   * `~/.cache/agentvm/agents`.
   */
  agentStoreDir?: string;
  /**
   * Where images are unpacked, shared by all data directories of this user. Default: `images`, beside
   * `agentStoreDir`.
   */
  imageStoreDir?: string;
  /**
   * Whether `createSession` installs an agent that is missing. Otherwise it rejects with
   * `AGENT_NOT_INSTALLED`. Default: `true`.
   */
  autoInstall?: boolean;
  /**
   * What a power cut may take back. `"normal"`: the last events of a turn that had not resolved yet,
   * though listeners have been told them; `"full"`: nothing, every batch of events is synced to the disk
   * before it is emitted. The death of the process takes back nothing in either. Default: `"normal"`.
   */
  durability?: "normal" | "full";
  /**
   * Longest line, in bytes, that an agent may send; a longer one ends it, as does one of more than 100,000 JSON
   * values (`[`, `{` and `,` count) or 2,000 levels. 1 KiB to 1 GiB. Default: 64 MiB.
   */
  maxMessageBytes?: number;
  /**
   * Milliseconds that an agent gets to obey a cancel before it is stopped. Its session is resumed by
   * the next prompt. Default: 5,000.
   */
  cancelGraceMs?: number;
  /**
   * Agents of your own, by the name that `createSession` takes: letters, digits, `-` and `_`. Under the
   * name of an agent that agentvm brings itself: the version of it that this client runs.
   *
   * ```ts
   * createClient({
   *   agents: {
   *     mybot: { command: "node", args: ["/home/user/mybot.js"] },
   *     pi: { version: "0.87.0" },
   *   },
   * });
   * ```
   */
  agents?: Readonly<Record<string, AgentDefinition | AgentVersion>>;
  /** For the agents of all sessions, before the session's own. Default: none. */
  additionalInstructions?: string;
}

/** A program inside the VM that speaks the Agent Client Protocol on its stdin and stdout. */
export interface AgentDefinition {
  /** An absolute path in the VM, or a name on the `PATH`. */
  command: string;
  args?: readonly string[];
  /** Set unless the session sets them otherwise. */
  env?: Readonly<Record<string, string>>;
}

/**
 * Another version of a built-in agent than the one that this agentvm pins, and is tested with. A session
 * runs the version of the client that starts or resumes it; which one it was is in its `agentInfo`.
 */
export interface AgentVersion {
  /** An exact version of the npm package that `client.agents.list()` names: no range, no tag. */
  version: string;
}

export interface Client extends AsyncDisposable {
  readonly agents: AgentStore;
  readonly images: ImageStore;
  readonly vm: {
    /**
     * The VM of this key, the same one after a restart of the process. `"a"` equals `["a"]`. Does no
     * I/O: a VM boots when something needs it.
     *
     * @param options what this VM has over the client's options, from its next boot on; `network` from the next
     * call on that needs the VM, also where another client has booted it, and until later ones are given there.
     * They hold for this client until they are given again, and are not kept on disk. Not given: as they were;
     * `network` and `secrets` are so too where others are given
     * @throws {AgentVmError} `INVALID_ARGUMENT`, `CLIENT_CLOSED`
     */
    getOrCreate(key: string | readonly string[], options?: VmOptions): Agent;

    /**
     * The VMs that the data directory has, by key: those that anything was asked of that boots a VM, in any
     * process, and that were not destroyed. One whose boot was refused may be among them. Boots nothing.
     *
     * @throws {AgentVmError} `CLIENT_CLOSED`, errno names for the data directory
     */
    list(): Promise<VmRecord[]>;
  };

  /**
   * Tries everything that VMs need of this host, and boots a temporary one in the data directory. Nothing
   * of it is left. `npx agentvm doctor` prints the same. A host on which no VM runs is a result, not an
   * error.
   *
   * @throws {AgentVmError} `CLIENT_CLOSED`
   */
  doctor(): Promise<DoctorResult>;

  /**
   * Ends agents and VMs of this client, except those that another open client of this process uses.
   * Running turns are cancelled. Deletes nothing. Later calls reject with `CLIENT_CLOSED`.
   */
  close(): Promise<void>;
}

export interface VmRecord {
  /** As `getOrCreate` takes it. */
  key: string[];
  /** Milliseconds since the epoch. */
  createdAt: number;
}

/** A VM and the sessions in it. Disposing it puts it to sleep. */
export interface Agent extends AsyncDisposable {
  readonly key: readonly string[];

  /**
   * Launches an agent inside the VM. If it fails, nothing of the session is left.
   *
   * @throws {AgentVmError} `AGENT_UNKNOWN`, `AGENT_NOT_INSTALLED`, `INSTALL_FAILED`,
   * `AGENT_EXITED` (with the end of its stderr), `AGENT_PROTOCOL`, `AUTH_REQUIRED`, `VM_UNSUPPORTED`,
   * `VM_LIMIT` (the agent was killed, or could not be started, for a limit of the VM),
   * `VM_BUSY`, `NETWORK_DENIED` (an MCP server that the VM can't reach), `INVALID_ARGUMENT`,
   * `ABORTED`, …
   */
  createSession(agentType: AgentType, options?: CreateSessionOptions): Promise<Session>;

  /**
   * Sends a message and resolves when the turn has ended, every event of it is on disk, and the
   * listeners that are there have been handed them. A session that is closed is resumed first.
   *
   * @param text the message, or ACP content blocks
   * @throws {AgentVmError} `AGENT_ERROR` or `AUTH_REQUIRED` with the agent's own code and data when the
   * model or the agent failed, `SESSION_BUSY` while another turn runs, `AGENT_EXITED`,
   * `SESSION_NOT_FOUND`, `ABORTED`, …
   */
  sendPrompt(
    sessionId: string,
    text: string | readonly ContentBlock[],
    options?: SendPromptOptions,
  ): Promise<PromptResult>;

  /**
   * Ends the turn that is under way: its `sendPrompt` resolves with `stopReason: "cancelled"`, the
   * commands that it runs are killed, and what it left in the background goes on. An agent that does
   * not obey within `cancelGraceMs` is stopped. Resolves when the turn has ended; with no turn under
   * way in this process, `cancelled` is `false`.
   *
   * @throws {AgentVmError} `SESSION_NOT_FOUND`
   */
  cancelPrompt(sessionId: string): Promise<CancelResult>;

  /**
   * Starts the agent of a session that was closed or suspended, or whose VM sleeps, with the
   * conversation and the configuration that it had. Does nothing to a session that is live. Prompts
   * and the `set…` calls do the same by themselves.
   *
   * @throws {AgentVmError} `SESSION_NOT_FOUND`, `ENV_REQUIRED` for a session with `persistEnv: false`,
   * and what `createSession` rejects with
   */
  resumeSession(sessionId: string, options?: ResumeSessionOptions): Promise<SessionState>;

  /**
   * Ends the session's agent, if it runs in this process, after cancelling its turn. Everything
   * persisted stays; a later prompt resumes the session. Does nothing to one that is closed.
   *
   * @throws {AgentVmError} `SESSION_NOT_FOUND`
   */
  closeSession(sessionId: string): Promise<void>;

  /**
   * Ends the session and removes all of it: events, kept environment, the agent's own state. Files that
   * the agent made stay. Does nothing where there is no such session. Wakes the VM for one that there is.
   *
   * @throws {AgentVmError} what `wake` rejects with
   */
  destroySession(sessionId: string): Promise<void>;

  /**
   * All sessions of this VM, newest first, with what is going on in them. Boots nothing.
   *
   * @throws {AgentVmError} `CLIENT_CLOSED`, errno names for the store
   */
  listSessions(): Promise<SessionState[]>;

  /**
   * One of them. Boots nothing.
   *
   * @throws {AgentVmError} `SESSION_NOT_FOUND`
   */
  getSession(sessionId: string): Promise<SessionState>;

  /** All sessions of this VM as they are stored, newest first. Boots nothing. */
  listPersistedSessions(): Promise<PersistedSession[]>;

  /**
   * Changes the model, from now on and after every resume. A session that is not live is resumed
   * first.
   *
   * @returns the agent's answer, as it came
   * @throws {AgentVmError} `INVALID_ARGUMENT` for a value that the agent does not offer, naming those
   * that it does; `AGENT_UNSUPPORTED` if it offers no such choice; `AGENT_ERROR` with the agent's own
   * code and data if it refuses; `SESSION_NOT_FOUND`, …
   */
  setModel(sessionId: string, model: string): Promise<JsonObject>;
  /** Changes the mode, one of `getModes`. Otherwise as {@link Agent.setModel}. */
  setMode(sessionId: string, modeId: string): Promise<JsonObject>;
  /** Changes how long the model thinks. Otherwise as {@link Agent.setModel}. */
  setThoughtLevel(sessionId: string, level: string): Promise<JsonObject>;
  /** Changes any option of `getConfigOptions`. Otherwise as {@link Agent.setModel}. */
  setConfigOption(
    sessionId: string,
    optionId: string,
    value: string | boolean,
  ): Promise<JsonObject>;

  /**
   * The modes of the agent and the one that is in force; `null` if it has none. Boots nothing.
   *
   * @throws {AgentVmError} `SESSION_NOT_FOUND`
   */
  getModes(sessionId: string): Promise<SessionModes | null>;

  /**
   * What can be configured of the agent, with the values in force. Boots nothing.
   *
   * @throws {AgentVmError} `SESSION_NOT_FOUND`
   */
  getConfigOptions(sessionId: string): Promise<ConfigOption[]>;

  /**
   * Sends the agent any request of ACP, or one of its own, but not those that have a call here. In
   * `params`, agentvm fills in the agent's own `sessionId`. A session that is not live is resumed first.
   *
   * @returns the agent's answer, as it came
   * @throws {AgentVmError} `AGENT_ERROR` with the agent's own code and data, …
   */
  rawSend(
    sessionId: string,
    method: string,
    params?: Readonly<Record<string, unknown>>,
  ): Promise<JsonValue>;

  /**
   * Answers a request of `permissionRequest`. The first answer counts.
   *
   * @param answer `"once"`, `"always"` or `"reject"`, or the exact `optionId` of one of its options
   * @returns what the agent was told
   * @throws {AgentVmError} `PERMISSION_NOT_FOUND` if it is none, or answered, or its turn has ended;
   * `INVALID_ARGUMENT` if the request has no such option, naming those that it has
   */
  respondPermission(
    sessionId: string,
    permissionId: string,
    answer: PermissionAnswer,
  ): Promise<PermissionResponse>;

  /**
   * The events of a session, in order: the bare messages. Recent ones come from memory, older ones from
   * SQLite. Boots nothing.
   *
   * @throws {AgentVmError} as {@link Agent.getSessionEvents}
   */
  getEvents(sessionId: string, options?: EventQuery): Promise<JsonRpcNotification[]>;

  /** The same with their numbers: what a client that reconnects asks for. */
  getSequencedEvents(sessionId: string, options?: EventQuery): Promise<SequencedEvent[]>;

  /**
   * The same as they are stored, for transcripts.
   *
   * @throws {AgentVmError} `SESSION_NOT_FOUND`; `SEQ_AHEAD` for a `since` beyond the last event;
   * `RESULT_TOO_LARGE` over 256 MiB or 5,000,000 JSON values: iterate with `sessionEvents`, or page with
   * `limit` and `since`
   */
  getSessionEvents(sessionId: string, options?: EventQuery): Promise<PersistedEvent[]>;

  /**
   * Iterates over the events of a session: those that are stored, and with `follow` then those that
   * come, each exactly once. It reads as fast as it is asked, holds one batch, and boots nothing.
   *
   * ```ts
   * for await (const { seq, event } of agent.sessionEvents(sessionId, { since, follow: true })) {
   *   show(event);
   *   since = seq; // where to go on after a reconnect
   * }
   * ```
   *
   * @throws {AgentVmError} at once `INVALID_ARGUMENT`; the iteration `SESSION_NOT_FOUND`, `SEQ_AHEAD`,
   * `ABORTED`, …
   */
  sessionEvents(sessionId: string, options?: SessionEventsOptions): SessionEventIterator;

  /**
   * Runs `sh -c command` in the VM. A non-zero exit code resolves. Resolves when the shell exits: what
   * it left running in the background may go on. What ends the VM kills it at once: to end in order, `spawn` it.
   *
   * @throws {AgentVmError} `TIMEOUT` (with the output until then in `data`), `VM_LIMIT` if it was killed
   * for a limit of the VM (the same), or could not be started for one, `ABORTED`, an errno name
   * as `ENOENT` for a `cwd` that does not exist, …
   */
  exec(command: string, options?: ExecOptions): Promise<ExecResult>;

  /**
   * Starts a program, found in `PATH` and run without a shell, as leader of a session of its own. It goes on
   * until it ends, keeps the VM awake and Node alive, and is told of by `processOutput` and `processExit`.
   *
   * ```ts
   * agent.on("processOutput", ({ pid, stream, data }) => process[stream].write(data));
   * const { pid } = await agent.spawn("npm", ["run", "dev"], { cwd: "app" });
   * const { exitCode } = await agent.waitProcess(pid);
   * ```
   *
   * While somebody listens to `processOutput`, the program is read only as fast as listeners take it. While
   * nobody does, it is read, and the end of its output kept for the first who listens. What it leaves running
   * in the background when it ends is not read any more.
   *
   * @throws {AgentVmError} `ENOENT`, `EACCES` for the program or `cwd`, `INVALID_ARGUMENT`, `ABORTED`,
   * `VM_LIMIT`, …
   */
  spawn(command: string, args?: readonly string[], options?: SpawnOptions): Promise<SpawnedProcess>;

  /**
   * Writes to the stdin of a process. What is written first arrives first, whether or not you wait. Resolves
   * when the pipe has taken all of it: a process that reads slowly makes it wait.
   *
   * @throws {AgentVmError} `EPIPE` if its stdin is closed, `PROCESS_NOT_FOUND`
   */
  writeProcessStdin(pid: number, data: string | Uint8Array): Promise<void>;

  /** Closes the stdin of a process, after what is being written. @throws {AgentVmError} `PROCESS_NOT_FOUND` */
  closeProcessStdin(pid: number): Promise<void>;

  /**
   * Resolves when a process has ended and listeners have been told all of its output and its end, those
   * too who came to listen after it; at once for one that has ended. Aborting gives up the wait, and does nothing to the process.
   *
   * @throws {AgentVmError} `PROCESS_NOT_FOUND`, `ABORTED`, `CLIENT_CLOSED`
   */
  waitProcess(pid: number, options?: WaitOptions): Promise<ProcessEnd>;

  /**
   * Asks a process and its process group to end: `signalProcess(pid, "SIGTERM")`, whose errors it has.
   */
  stopProcess(pid: number): Promise<void>;

  /**
   * Kills a process with everything in its session, also what it has moved to a process group of its own, as
   * shells do; not what it has detached (`setsid`). One that has ended is no error.
   *
   * @throws {AgentVmError} `PROCESS_NOT_FOUND`
   */
  killProcess(pid: number): Promise<void>;

  /**
   * Signals a process with its process group. One that has ended is no error.
   *
   * @param signal as `"SIGINT"`, or its number
   * @throws {AgentVmError} `PROCESS_NOT_FOUND`, `INVALID_ARGUMENT`
   */
  signalProcess(pid: number, signal: string | number): Promise<void>;

  /**
   * The processes that `spawn` has started in this VM, by pid: those that run, and the last 128 that have
   * ended. Does not wake the VM. A pid may be used again for a new process, which then takes the place of
   * the old one here.
   */
  listProcesses(): Promise<ProcessRecord[]>;

  /** One of them. @throws {AgentVmError} `PROCESS_NOT_FOUND` */
  getProcess(pid: number): Promise<ProcessRecord>;

  /**
   * Everything that runs in the VM, whoever started it, by pid; at most 20,000. Wakes the VM. Where a process
   * lets nobody look at it for two seconds, as those of a fork bomb can, processes have their names alone, and
   * 0 for times.
   */
  allProcesses(): Promise<VmProcess[]>;

  /** The same as a tree, whose root is PID 1; what has lost its parent meanwhile is a root, too. */
  processTree(): Promise<ProcessTree[]>;

  /**
   * Opens a terminal in the VM with a shell on it: a real one, with job control, in which editors, pagers
   * and multiplexers run. What it shows is told by `shellData`, its end by `shellExit`. It keeps the VM awake
   * and Node alive. `npx agentvm shell` is such a shell on your own terminal.
   *
   * The default is bash, or sh where there is none, as a login shell: it reads `/etc/profile` and
   * `~/.profile`; bash, unless there is a `~/.bash_profile`, before that `~/.bashrc`. (With an `image`, if the
   * image's files say so.) A terminal has one stream: `shellData` is read as fast as listeners take it, and the last
   * 256 KiB are kept while nobody listens.
   *
   * @throws {AgentVmError} `ENOENT`, `EACCES` for `command` or `cwd`, `INVALID_ARGUMENT`, `VM_LIMIT`,
   * `ENOSPC` if the VM has 256 terminals already
   */
  openShell(options?: ShellOptions): Promise<Shell>;

  /**
   * Types into a shell: `"\u0003"` is Ctrl-C. What is written first arrives first, whether or not you wait.
   *
   * @throws {AgentVmError} `EPIPE` if it has ended, `SHELL_NOT_FOUND`
   */
  writeShell(shellId: string, data: string | Uint8Array): Promise<void>;

  /**
   * Tells the programs on the terminal (SIGWINCH) that it has another size.
   *
   * @throws {AgentVmError} `SHELL_NOT_FOUND`, `INVALID_ARGUMENT`
   */
  resizeShell(shellId: string, size: ShellSize): Promise<void>;

  /**
   * Hangs up, as closing the window of a terminal does, and resolves when the shell has ended: if it has not
   * a second later, it is killed with everything in its session. One that has ended is no error.
   *
   * @throws {AgentVmError} `SHELL_NOT_FOUND`
   */
  closeShell(shellId: string): Promise<void>;

  /**
   * The shells that `openShell` has opened in this VM, the oldest first: those that run, and the last 32 that
   * have ended. Does not wake the VM.
   */
  listShells(): Promise<ShellRecord[]>;

  /**
   * Resolves when a shell has ended and listeners have been told everything; at once for one that has ended.
   * The last 32 that have ended are known.
   *
   * @throws {AgentVmError} `SHELL_NOT_FOUND`, `ABORTED`, `CLIENT_CLOSED`
   */
  waitShell(shellId: string, options?: WaitOptions): Promise<ShellEnd>;

  /**
   * Reads a regular file, or a part of it, of at most 2 GiB, as text of at most half a billion characters
   * (`EFBIG`: `createReadStream` has no such limit); of `/proc` none.
   *
   * Of all calls for files: a relative path starts at `/home/user`; it is resolved inside the VM, with the
   * rights of `user`; the magic links of `/proc` are not followed (`ELOOP`).
   *
   * ```ts
   * const text = await agent.readFile("notes.md", { encoding: "utf8" });
   * ```
   *
   * @returns its bytes; with `encoding: "utf8"` a string, in which what is not UTF-8 is U+FFFD
   * @throws {AgentVmError} with the errno's name as code: `ENOENT`, `EACCES`, `EISDIR`; `EINVAL` for a FIFO, a
   * device and a file of `/proc`, `ENXIO` for a socket, which only programs in the VM can read (`exec`); …
   */
  readFile(path: VmPath, options: ReadFileOptions & { encoding: "utf8" }): Promise<string>;
  readFile(
    path: VmPath,
    options?: ReadFileOptions & NoString & { encoding?: "buffer" },
  ): Promise<Uint8Array>;

  /**
   * Makes a file, or replaces what it holds, or with `append` writes behind that. A string is written as
   * UTF-8.
   *
   * @throws {AgentVmError} `ENOENT` if there is no such directory, `EACCES`, `ENOSPC`, …
   */
  writeFile(path: VmPath, content: string | Uint8Array, options?: WriteFileOptions): Promise<void>;

  /**
   * Reads files one after the other. A file that can't be read has an `error` in its place; the call
   * rejects only for what concerns all of them.
   */
  readFiles(paths: readonly VmPath[], options?: FileOptions): Promise<ReadFilesResult[]>;

  /** Writes files one after the other, with directories that are missing. Errors as with `readFiles`. */
  writeFiles(files: readonly FileToWrite[], options?: FileOptions): Promise<WriteFilesResult[]>;

  /**
   * @throws {AgentVmError} `EEXIST`, unless it is `recursive` and a directory; `ENOENT`; `ENOTDIR` where a
   * part of the path before the last is no directory; …
   */
  mkdir(path: VmPath, options?: MkdirOptions): Promise<void>;

  /**
   * The entries of a directory, in no particular order, without `.` and `..`.
   *
   * @throws {AgentVmError} `ENOENT`, `ENOTDIR`, …; `RESULT_TOO_LARGE` for more than 1,000,000 entries, or
   * paths of more than 128 MiB, which `walk` tells one after the other; `ABORTED`
   */
  readdir(path: VmPath, options?: ReaddirOptions): Promise<DirectoryEntry[]>;

  /**
   * The entries of a directory and of all directories below it, each directory before what is in it.
   * Symlinks are told, not followed. Errors as with `readdir`, for a directory below too, unless
   * `skipUnreadable`.
   */
  readdirRecursive(path: VmPath, options?: ReaddirRecursiveOptions): Promise<DirectoryEntry[]>;

  /**
   * The same one entry after the other, as fast as it is asked for. It keeps the VM awake from the first
   * `next()` to its end: `break`, `close()`, the end of an `await using`, `signal`, or the last entry.
   *
   * @throws {AgentVmError} at once `INVALID_ARGUMENT`; the iteration what `readdir` rejects with, and `EMFILE`
   * where 256 others are under way in the VM
   */
  walk(path: VmPath, options?: WalkOptions): FileIterator<DirectoryEntry>;

  /** @throws {AgentVmError} `ENOENT`, `EACCES`, … */
  stat(path: VmPath, options?: StatOptions): Promise<FileStat>;

  /**
   * Whether there is something at a path, after symlinks.
   *
   * @throws {AgentVmError} `EACCES` where `user` may not look, `ELOOP`, …
   */
  exists(path: VmPath, options?: FileOptions): Promise<boolean>;

  /**
   * Renames a file, a symlink or a directory. What is at `to` is replaced, unless `overwrite` is `false`:
   * a file by a file, an empty directory by a directory.
   *
   * @throws {AgentVmError} `EEXIST`, `ENOTEMPTY`, `EISDIR`, `ENOTDIR` where a `/` ends the path of what is no
   * directory, `EXDEV` if `to` is on another file system (`/tmp` is one of its own: `copy` and `delete` it), …
   */
  move(from: VmPath, to: VmPath, options?: MoveOptions): Promise<void>;

  /**
   * Copies a file, a symlink (as one), or with `recursive` a directory with everything in it, inside the VM:
   * nothing of it passes the host. Permissions are those of what is copied, without set-user-ID and sticky
   * bits; the copy belongs to `user`, and its times are new. A directory that exists at `to` is filled, a
   * file or link in the way is replaced, never written through. If the call fails, or is aborted, a part of
   * the copy is there.
   *
   * @param to the copy itself, not the directory that it is put into
   * @throws {AgentVmError} `EISDIR` for a directory without `recursive`, `EEXIST` with `overwrite: false`,
   * `EINVAL` for a directory into itself, and for what is neither file, directory nor symlink; `ENOENT`,
   * `ENOTDIR`, `ENOSPC`, …
   */
  copy(from: VmPath, to: VmPath, options?: CopyOptions): Promise<void>;

  /**
   * Deletes a file, a symlink (not what it leads to), or an empty directory; with `recursive` a directory
   * with everything in it, what is mounted there too. If that fails, or is aborted, a part of it is gone.
   *
   * @throws {AgentVmError} `ENOENT` unless `force`, `ENOTEMPTY`, `ENOTDIR` where a `/` ends the path of what
   * is no directory, `EBUSY`, …
   */
  delete(path: VmPath, options?: DeleteOptions): Promise<void>;

  /**
   * Sets permissions as they are to be, whatever the umask; of what a symlink leads to.
   *
   * @throws {AgentVmError} `EPERM` unless it is a file of `user`; `ENOENT`, `EROFS`, …
   */
  chmod(path: VmPath, mode: number, options?: FileOptions): Promise<void>;

  /**
   * Sets owner, group or both, in ids of the VM. Only its root may give a file away.
   *
   * @throws {AgentVmError} `EPERM`; `ENOENT`, `EROFS`, …
   */
  chown(path: VmPath, owner: Owner, options?: StatOptions): Promise<void>;

  /**
   * Sets when a file was last read and changed. A time that is left out stays.
   *
   * @throws {AgentVmError} `EPERM` unless it is a file of `user`; `ENOENT`, …
   */
  utimes(path: VmPath, times: FileTimes, options?: StatOptions): Promise<void>;

  /**
   * Makes a symlink at `path` that holds `target`, as it is to be read: relative to its directory.
   *
   * @throws {AgentVmError} `EEXIST`, `ENOENT` if there is no such directory, `EACCES`, …
   */
  symlink(target: VmPath, path: VmPath, options?: FileOptions): Promise<void>;

  /**
   * What a symlink holds.
   *
   * @throws {AgentVmError} `EINVAL` if it is none; `ENOENT`, …
   */
  readlink(path: VmPath, options: LinkOptions & { encoding: "buffer" }): Promise<Uint8Array>;
  readlink(path: VmPath, options?: LinkOptions & { encoding?: "utf8" }): Promise<string>;

  /**
   * The absolute path without symlinks, `.` and `..`.
   *
   * @throws {AgentVmError} `ENOENT`, `ELOOP`, `EACCES`, …
   */
  realpath(path: VmPath, options: LinkOptions & { encoding: "buffer" }): Promise<Uint8Array>;
  realpath(path: VmPath, options?: LinkOptions & { encoding?: "utf8" }): Promise<string>;

  /**
   * Brings a file of any length into the VM, in constant memory and as fast as the VM takes it. It appears
   * at `path` when all of it is there, and replaces what is at `path` then, a symlink too; if the call
   * fails or is aborted, nothing of it is left. (Only the death of the host process leaves a file
   * `.agentvm-upload-…` beside it.)
   *
   * ```ts
   * await agent.uploadFile("./data.csv", "data.csv");
   * await agent.uploadFile(response.body, "model.bin", { signal });
   * ```
   *
   * @param source a path of the host (a string or a `file:` URL), or the content: a `Uint8Array`, a `Blob`,
   * or a stream or iterable of chunks
   * @throws {AgentVmError} errno names of either side (`ELOOP`: a symbolic link that a VM could have made
   * leads to the source), `ABORTED`; or what the source throws
   */
  uploadFile(source: UploadSource, path: VmPath, options?: UploadOptions): Promise<void>;

  /**
   * Copies a file of any length out of the VM, in constant memory.
   *
   * @param destination a path of the host (a string or a `file:` URL), where the file appears when all of
   * it has arrived and replaces what is there (no symbolic link, nor through one that a VM could have made:
   * `ELOOP`); or a stream, which is ended. A process that is killed leaves nothing of it, but on file systems
   * without `O_TMPFILE` a `.agentvm-download-*` beside it
   * @throws {AgentVmError} errno names of either side, `ABORTED`; or the error of the stream
   */
  downloadFile(
    path: VmPath,
    destination: string | URL | Writable | WritableStream<Uint8Array>,
    options?: DownloadOptions,
  ): Promise<void>;

  /**
   * Reads a file bit by bit, as `fs.createReadStream`. It keeps the VM awake until it is read or destroyed;
   * what ends the VM destroys it with `ABORTED`.
   *
   * @throws {AgentVmError} at once `INVALID_ARGUMENT`; what `readFile` rejects with is its `error` event
   */
  createReadStream(path: VmPath, options?: ReadStreamOptions & NoString): Readable;

  /**
   * Watches a file, or a directory and what is in it; with `recursive` also everything below, directories
   * included that come later. Resolves when it is in force: what happens from then on is told.
   *
   * ```ts
   * const changes = await agent.watch("project", { recursive: true });
   * for await (const change of changes) {
   *   if (change.type !== "overflow") console.log(change.type, change.path);
   *   if (enough()) break; // ends it, as `changes.close()` does
   * }
   * ```
   *
   * Changes are told in their order, by the kernel (inotify). Who does not keep up with them loses some,
   * and is told so by `"overflow"`: look again at what you need to know. It keeps the VM awake until it is
   * closed, and ends when the path itself is deleted or moved. Of a file that `uploadFile` brings, it tells
   * nothing before it is there: `created`, whether or not it replaces another.
   *
   * @throws {AgentVmError} `ENOENT`, `EMFILE` for more than 64 watches at a time, or a quarter of the host's
   * `fs.inotify.max_user_instances` (32 of 128), `ENOSPC` for more directories than a quarter of its
   * `max_user_watches`, …; the iteration `ABORTED`, also by what ends the VM
   */
  watch(path: VmPath, options?: WatchOptions): Promise<FileIterator<FileEvent>>;

  /**
   * `fetch` to an HTTP server inside the VM that listens on `127.0.0.1` or `::1`, whoever started it. The
   * port is open to nobody else, on the host neither.
   *
   * ```ts
   * const response = await agent.vmFetch(3000, "/api/items?limit=5", { method: "POST", body: "…" });
   * console.log(response.status, await response.json());
   * ```
   *
   * It is the platform's `fetch` in all that follows from `init`: streams in both directions, redirects,
   * compressed bodies, `signal`. A redirect is followed inside the VM only. There is no time-out but your
   * `signal`, and no connection is kept for the next request. The VM stays awake until the body has been
   * read, cancelled, or garbage collected.
   *
   * @param path begins with `/`
   * @throws {AgentVmError} `ECONNREFUSED` if nothing listens on the port, `ECONNRESET` if the server
   * closed the connection instead of answering, `EPROTO` if it does not speak HTTP, `NETWORK_DENIED` for a
   * redirect out of the VM, `REDIRECTED` for any with `redirect: "error"`, `INVALID_ARGUMENT`, also for a port of `loopbackExemptPorts`, which in the VM
   * is the host's; `ABORTED`. When the connection or the VM ends later, reading the body fails with a
   * `TypeError` that has the `cause`
   */
  vmFetch(port: number, path: string, init?: VmFetchInit): Promise<Response>;

  /**
   * A WebSocket to a server inside the VM: a standard one, from undici. It is returned at once; `open`
   * follows, or where there is no such server `error` and `close`. Its last event is always `close`, with the
   * code 1006 if the connection, or the VM, ended without a word. A message of more than 128 MiB closes it.
   *
   * @throws {AgentVmError} `INVALID_ARGUMENT`
   */
  vmWebSocket(port: number, path: string, protocols?: string | readonly string[]): WebSocket;

  /**
   * A TCP connection to a server inside the VM that listens on `127.0.0.1` or `::1`. It keeps the VM awake
   * until it is closed; what ends the VM destroys it with `ABORTED`.
   *
   * @throws {AgentVmError} `ECONNREFUSED`, `INVALID_ARGUMENT` as with `vmFetch`; `ABORTED`
   */
  connect(port: number, options?: ConnectOptions): Promise<VmConnection>;

  /**
   * Resolves when something listens on this port, where `vmFetch` and `connect` reach it: after a
   * development server was started, say. It looks ten times a second, keeps the VM awake, and waits as
   * long as it takes: `signal` gives it an end.
   *
   * @throws {AgentVmError} `ABORTED`, `INVALID_ARGUMENT`
   */
  waitForPort(port: number, options?: ConnectOptions): Promise<void>;

  /**
   * The TCP sockets that listen in the VM, by port; at most 3,000. Wakes the VM.
   *
   * @throws {AgentVmError} what `wake` rejects with
   */
  listeningPorts(): Promise<ListeningPort[]>;

  /**
   * Replaces the VM's `network` rules, now if it runs and for the boots to come by this client until `getOrCreate`
   * is given others. New connections and names are judged by the new rules at once, and connections that they do
   * not allow are reset, whether by their address or by the server that their TLS has asked for. Like every option
   * it is not kept on disk. Boots nothing.
   *
   * @throws {AgentVmError} `INVALID_ARGUMENT`, which names the rule; `VM_BUSY` where the VM runs in another
   * process, and keeps the rules that it has there
   */
  setNetwork(network: NetworkRules): Promise<void>;

  /**
   * What the VM takes of the host, and which limits are in force. Boots nothing. Its directory is measured
   * each time, which takes about a second for a million files.
   *
   * @throws {AgentVmError} `VM_BUSY` if it runs in another process
   */
  stats(): Promise<VmStats>;

  /**
   * Ends agents, and what runs in the VM: shells are hung up, what `spawn` has started gets SIGTERM, and a
   * second later all is killed, `exec` with it. Keeps files and sessions. The next call that needs the VM
   * wakes it.
   */
  sleep(): Promise<void>;

  /**
   * Exchanges the VM's secrets, to rotate a key for example: for requests from now on, and for its next
   * boots until `getOrCreate` is given others. Placeholders of names that stay are as before; those of new
   * names are in the environment of programs that are started from now on. A connection that is open
   * already to what becomes a host of a secret stays without: its program has to connect anew. Boots nothing.
   *
   * @throws {AgentVmError} `INVALID_ARGUMENT`, naming the field and never showing a value; also where the VM
   * runs and was booted without secrets: `sleep()` it first. `VM_BUSY` where it runs in another process
   */
  setSecrets(secrets: Readonly<Record<string, SecretOptions>>): Promise<void>;

  /**
   * Boots the VM if it does not run.
   *
   * @throws {AgentVmError} `VM_BUSY` where it runs in another process; `VM_UNSUPPORTED` where this host
   * refuses something, with the remedy; `INVALID_ARGUMENT` for a mount that can't be made; codes of images
   */
  wake(): Promise<void>;

  /**
   * Deletes the VM with all its files and sessions. A later call starts with an empty one.
   *
   * @throws {AgentVmError} `VM_BUSY` where it runs in another process
   */
  destroy(): Promise<void>;

  /**
   * Calls `listener` for everything that happens from now on, in order; with `permissionRequest` also,
   * soon after `on` has returned, for the requests that wait for an answer already.
   *
   * Slow listeners delay neither agents nor calls: events wait in the log, and after some 10 ms of
   * listeners everything else in the process has its turn. What waits until they have been told is
   * `sendPrompt`, and `destroy` and `close`, after which nothing could be read. A listener that throws
   * does not keep others from theirs; its error surfaces as `uncaughtException`. Listening does not keep
   * Node alive.
   *
   * @returns a function that removes the listener
   */
  on<E extends keyof AgentEvents>(event: E, listener: Listener<E>): () => void;
  /** Like `on`, for one event. */
  once<E extends keyof AgentEvents>(event: E, listener: Listener<E>): () => void;
  off<E extends keyof AgentEvents>(event: E, listener: Listener<E>): void;
}

/** What it returns is not waited for; a promise that rejects is an `unhandledRejection`. */
export type Listener<E extends keyof AgentEvents> = (value: AgentEvents[E]) => unknown;

/**
 * A built-in agent (Amp is there for x64 alone: elsewhere `AGENT_UNSUPPORTED`), or a name of the client's
 * `agents`; any other rejects with `AGENT_UNKNOWN`.
 */
export type AgentType = "pi" | "claude" | "codex" | "opencode" | "amp" | (string & {});

export interface CreateSessionOptions {
  /**
   * Environment of the agent process. Nothing of `process.env` is inherited: pass API keys here.
   * `ANTHROPIC_BASE_URL` and `OPENAI_BASE_URL` point the agent to another server.
   */
  env?: Readonly<Record<string, string>>;
  /**
   * Working directory inside the VM, made if it is missing. A relative path starts at `/home/user`.
   * Default: `/home/user`.
   */
  cwd?: string;
  /** Servers of the Model Context Protocol whose tools the agent gets. Default: none. */
  mcpServers?: readonly McpServer[];
  /** Appended to the agent's system prompt, after the client's. Default: none. */
  additionalInstructions?: string;
  /**
   * Leave out what agentvm tells the agent about the VM, which it can read there in
   * `/etc/agentvm/instructions.md`. The list of the VM's commands and of the session's MCP servers stays.
   * Default: `false`.
   */
  skipOsInstructions?: boolean;
  /**
   * Who answers an agent that asks for permission. `"ask"`: you, by `respondPermission`; a request that
   * nobody listens to waits, `getSession` lists it, and the next `permissionRequest` listener is told.
   * `"allow"`, `"reject"`: every request, at once. Fixed for the life of the session.
   *
   * Default: `"ask"` if somebody listens to `permissionRequest` of this object at this moment, else
   * `"allow"`: the VM is the boundary.
   */
  permissionPolicy?: PermissionPolicy;
  /** As by `setModel`. Default: the agent's. */
  model?: string;
  /** As by `setMode`. Default: the agent's. */
  mode?: string;
  /** As by `setThoughtLevel`. Default: the agent's. */
  thoughtLevel?: string;
  /**
   * Keep `env` and the environments and headers of `mcpServers`, in a file of mode 0600 beside the VM,
   * so that the session can be resumed without them. Default: `true`.
   */
  persistEnv?: boolean;
  /** Aborting rejects with `ABORTED` and leaves nothing of the session. */
  signal?: AbortSignal;
}

export type PermissionPolicy = "ask" | "allow" | "reject";

export type McpServer = LocalMcpServer | RemoteMcpServer;

/** A program inside the VM that speaks MCP on its stdin and stdout. It lives as long as the agent. */
export interface LocalMcpServer {
  type: "local";
  /** Unique in the session. Default: derived from the package or the command. */
  name?: string;
  command: string;
  args?: readonly string[];
  /** Default: nothing but what every program of the VM has. */
  env?: Readonly<Record<string, string>>;
}

/** A service that the VM reaches by the rules of its network. */
export interface RemoteMcpServer {
  type: "remote";
  /** Unique in the session. Default: derived from the host. */
  name?: string;
  url: string;
  headers?: Readonly<Record<string, string>>;
  /** Default: streamable HTTP is tried, then SSE. */
  transport?: "http" | "sse";
}

export interface ResumeSessionOptions {
  /** Replaces the environment that was kept; needed if none was (`ENV_REQUIRED`). */
  env?: Readonly<Record<string, string>>;
  /** Replaces all MCP servers of the session; needed as `env`. */
  mcpServers?: readonly McpServer[];
}

export interface SendPromptOptions {
  /** Aborting cancels the turn and rejects with `ABORTED`. */
  signal?: AbortSignal;
}

/** Which events of a session. */
export interface EventQuery {
  /** Only events after this number. Default: 0, all. */
  since?: number;
  /** Only events of this method, as `"session/update"`. Default: all. */
  method?: string;
  /** At most so many events. Default: all. */
  limit?: number;
}

export interface SessionEventsOptions {
  /** Only events after this number. Default: 0, all. */
  since?: number;
  /**
   * Go on with events as they come, over sleep and resume, until the session is destroyed, the client
   * closed or the iteration ended. Default: `false`, end after the last stored one.
   */
  follow?: boolean;
  /** Aborting ends the iteration: it rejects with `ABORTED`. */
  signal?: AbortSignal;
}

/** `break`, `return()` and the end of an `await using` end it, whatever is under way. */
export interface SessionEventIterator
  extends AsyncIterableIterator<PersistedEvent>,
    AsyncDisposable {
  next(): Promise<IteratorResult<PersistedEvent, undefined>>;
  return(): Promise<IteratorResult<PersistedEvent, undefined>>;
}

export interface Session {
  /** Permanent, and public: the agent's own id of the conversation is another one. */
  sessionId: string;
  agentType: string;
  /** What the agent says it can do: ACP's `agentCapabilities`, as it came. */
  capabilities: JsonObject | null;
  /** ACP's `agentInfo`, as it came. */
  agentInfo: JsonObject | null;
}

export interface PersistedSession extends Session {
  cwd: string;
  /**
   * `"open"`: its agent runs, or ran when the host process died; `"closed"`: by `closeSession`;
   * `"suspended"`: its agent ended otherwise. A prompt resumes all three.
   */
  status: "open" | "closed" | "suspended";
  /** Number of its last event; 0 if it has none. */
  lastSequenceNumber: number;
  /** Milliseconds since the epoch. */
  createdAt: number;
  /** Milliseconds since the epoch: of its last event or change. */
  updatedAt: number;
}

/** A session and what is going on in it, as far as it runs in this process. */
export interface SessionState extends PersistedSession {
  /** The turn that is under way. */
  turn: {
    turnId: string;
    /** Milliseconds since the epoch. */
    startedAt: number;
  } | null;
  /** Requests that wait for `respondPermission`, in their order. */
  pendingPermissions: PermissionRequest[];
  permissionPolicy: PermissionPolicy;
}

/** An agent asks whether it may. */
export interface PermissionRequest {
  permissionId: string;
  /** The tool's own name if the agent gives it, else its ACP kind, as `"execute"`. */
  toolName: string;
  /** What the tool would do, in the agent's words. May be empty. */
  description: string;
  /** What can be answered. */
  options: PermissionOption[];
  /** The agent's whole request, ACP's `session/request_permission`, as it came. */
  // biome-ignore lint/suspicious/noExplicitAny: agents send fields that no version of ACP knows
  params: any;
}

export interface PermissionOption {
  optionId: string;
  /** For a person. */
  name: string;
  kind: "allow_once" | "allow_always" | "reject_once" | "reject_always" | (string & {});
}

/**
 * `"once"`: allow this; `"always"`: allow this, and from now on in this session what the option of the kind
 * `allow_always` names; `"reject"`: don't. Or the exact `optionId` of one of the request's options.
 *
 * What "always" holds for is the agent's to say: with Pi, Codex and Amp every call of the tool, whatever it
 * is called with; with Claude Code its own rule for reading and editing files, every call of an MCP tool,
 * else the same call; with OpenCode the patterns in the request, such as `touch *`. Show the option's `name` to whoever answers.
 */
export type PermissionAnswer = "once" | "always" | "reject" | (string & {});

export interface PermissionResponse {
  outcome: PermissionOutcome;
}

/** What an agent is told about a request. */
export type PermissionOutcome =
  | { outcome: "selected"; optionId: string }
  | { outcome: "cancelled" };

/** ACP's modes of a session, as the agent describes them. */
export interface SessionModes {
  currentModeId: string;
  availableModes: { id: string; name: string; description?: string | null }[];
}

/** ACP's configuration option, as the agent describes it. */
export type ConfigOption = SelectOption | BooleanOption;

export interface SelectOption extends ConfigOptionBase {
  type: "select";
  currentValue: string;
  options: ConfigValue[] | { group: string; name: string; options: ConfigValue[] }[];
}

export interface BooleanOption extends ConfigOptionBase {
  type: "boolean";
  currentValue: boolean;
}

export interface ConfigOptionBase {
  /** For `setConfigOption`. */
  id: string;
  name: string;
  description?: string | null;
  category?: "mode" | "model" | "thought_level" | (string & {}) | null;
}

export interface ConfigValue {
  value: string;
  name: string;
  description?: string | null;
}

export interface PromptResult {
  /** The agent's answer to `session/prompt`, as it came. */
  response: JsonObject;
  /**
   * The agent's message text of this turn, with a blank line between messages; of more than 16 MiB
   * the beginning. The events have all of it.
   */
  text: string;
  /** `"end_turn"`, `"max_tokens"`, `"max_turn_requests"`, `"refusal"` or `"cancelled"`. */
  stopReason: string;
}

export interface CancelResult {
  /** Whether a turn was under way. */
  cancelled: boolean;
}

export interface SequencedEvent {
  /** 1, 2, 3, … without gaps within a session. */
  sequenceNumber: number;
  notification: JsonRpcNotification;
}

export interface PersistedEvent {
  sessionId: string;
  /** 1, 2, 3, … without gaps; the `sequenceNumber` of `sessionEvent`. */
  seq: number;
  event: JsonRpcNotification;
  /** Milliseconds since the epoch. */
  createdAt: number;
}

/**
 * A message of the agent, exactly as it came but for `params.sessionId`, or one that agentvm adds so
 * that the log alone is a transcript: see {@link AddedEvent}.
 */
export interface JsonRpcNotification {
  jsonrpc: "2.0";
  /** Also `"_agentvm/retry"`, of the adapters of built-in agents: {@link RetryEvent}. */
  method: string;
  // biome-ignore lint/suspicious/noExplicitAny: agents send fields that no version of ACP knows
  params?: any;
}

/** `params` of `_agentvm/retry`: a request to the model has failed, and is repeated. */
export interface RetryEvent {
  sessionId: string;
  /** 1 for the first repetition in this turn. */
  attempt: number;
  maxAttempts?: number;
  /** Milliseconds until then. */
  delayMs?: number;
  /** The text of this message, as far as it came, is void: it comes again. */
  discardedMessageId?: string;
  error: {
    message: string;
    /** Of HTTP. */
    status?: number;
    type?: string;
  };
}

/**
 * What agentvm adds to the log, beside the `session/update`s of {@link AddedUpdate}. `method` tells them
 * apart:
 *
 * ```ts
 * const added = event as AddedEvent;
 * if (added.method === "_agentvm/turn_end") console.log(added.params.stopReason);
 * ```
 */
export type AddedEvent =
  /** A turn begins; the blocks of its prompt follow. */
  | Added<"_agentvm/turn_start", { turnId: string }>
  | Added<"_agentvm/turn_end", TurnEnd>
  /** An agent asks for permission. */
  | Added<"_agentvm/permission_request", PermissionRequestEvent>
  /** What became of it. */
  | Added<"_agentvm/permission_outcome", PermissionOutcomeEvent>
  /** A session was resumed, and not everything of it could be restored. */
  | Added<"_agentvm/session_restored", SessionRestoredEvent>
  | Added<"session/update", { update: AddedUpdate }>;

/**
 * An event that agentvm adds. `_meta.agentvm` is in these only: a message of an agent that has it, or a
 * method `_agentvm/…` other than our adapters' `_agentvm/retry`, does not get into the log.
 */
export interface Added<Method extends string, Params> {
  jsonrpc: "2.0";
  method: Method;
  params: Params & {
    sessionId: string;
    _meta: { agentvm: { /** Of a prompt's block. */ turnId?: string } };
  };
}

/** How a turn ended: one of the three is there. */
export interface TurnEnd {
  /** Not there if the turn's start is not known. */
  turnId?: string;
  /** The agent answered. */
  stopReason?: string;
  /** The agent's answer, as it came. */
  response?: JsonObject;
  /** The agent, or something on the way to it, failed: what `sendPrompt` rejected with. */
  error?: { code: ErrorCode; message: string; data?: unknown };
  /** The process that ran it ended, or the agent was stopped. */
  interrupted?: { reason: string };
}

export interface PermissionRequestEvent {
  permissionId: string;
  /** Not there if no turn was under way. */
  turnId?: string;
  /** The agent's whole request, ACP's `session/request_permission`, as it came. */
  // biome-ignore lint/suspicious/noExplicitAny: agents send fields that no version of ACP knows
  request: any;
}

export interface PermissionOutcomeEvent {
  permissionId: string;
  outcome: PermissionOutcome;
  /** The session's policy, `respondPermission`, or agentvm because nobody can answer any more. */
  decidedBy: "policy" | "caller" | "agentvm";
  /**
   * Of `"agentvm"`: why. `"too_many_requests"`: with it more than 256 would wait, 64 MiB, or 100,000 JSON
   * values (counted as for `maxMessageBytes`).
   */
  reason?: string;
}

export interface SessionRestoredEvent {
  /**
   * Why the agent can't go on with its own memory of the conversation. It gets the transcript with the
   * next prompt instead.
   */
  fromTranscript?: string;
  /** Settings that the agent no longer takes. */
  notRestored?: { setting: string; error: string }[];
}

/** The `update` of a `session/update` that agentvm adds. */
export type AddedUpdate =
  /** A block of a prompt. */
  | { sessionUpdate: "user_message_chunk"; content: ContentBlock }
  /** The agent changed its mode without saying so, as the answer to `setMode`. */
  | { sessionUpdate: "current_mode_update"; currentModeId: string }
  /** The same of its options. */
  | { sessionUpdate: "config_option_update"; configOptions: ConfigOption[] };

/** ACP content: <https://agentclientprotocol.com/protocol/content>. */
export type ContentBlock =
  | { type: "text"; text: string }
  | { type: "image"; data: string; mimeType: string; uri?: string }
  | { type: "audio"; data: string; mimeType: string }
  | { type: "resource_link"; uri: string; name: string; mimeType?: string }
  | {
      type: "resource";
      resource: { uri: string; mimeType?: string } & ({ text: string } | { blob: string });
    };

export interface ExecOptions {
  /** Added to the VM's own defaults (`PATH`, `HOME`, …). Nothing of the host's. */
  env?: Readonly<Record<string, string>>;
  /** Default: `/home/user`. */
  cwd?: string;
  /** `"root"` is the VM's root, never the host's; it exists where the host process is root. */
  user?: "user" | "root";
  /** Written to the command's stdin, which is closed then. */
  stdin?: string | Uint8Array;
  /** Kills the command with everything it started, after so many milliseconds (≥ 1). Default: none. */
  timeoutMs?: number;
  /** Kept of stdout and stderr each; the rest is dropped and `truncated` is set. Default: 16 MiB. */
  maxOutputBytes?: number;
  /** Aborting kills the command and rejects with `ABORTED`. */
  signal?: AbortSignal;
}

export interface ExecResult {
  /** Decoded as UTF-8. */
  stdout: string;
  stderr: string;
  /** `null` when a signal ended it. */
  exitCode: number | null;
  /** Name of the signal that ended it, as `"SIGKILL"`. */
  signal: string | null;
  truncated: boolean;
}

export interface SpawnOptions {
  /** Added to the VM's own defaults (`PATH`, `HOME`, …). Nothing of the host's. */
  env?: Readonly<Record<string, string>>;
  /** Default: `/home/user`. */
  cwd?: string;
  /** `"root"` is the VM's root, never the host's; it exists where the host process is root. */
  user?: "user" | "root";
  /** Written to the process's stdin, which is closed then. Default: stdin stays open for `writeProcessStdin`. */
  stdin?: string | Uint8Array;
  /** Kills the process as `killProcess` does, after so many milliseconds (≥ 1). Default: none. */
  timeoutMs?: number;
  /**
   * Kept of stdout and of stderr each while nobody listens to `processOutput`, of what was written last. At
   * most 64 MiB, which is also the most that is kept of all processes of a VM. Default: 256 KiB.
   */
  maxOutputBytes?: number;
  /** Aborting rejects with `ABORTED`; once the process runs, it kills it as `killProcess` does. */
  signal?: AbortSignal;
}

export interface SpawnedProcess {
  /** As inside the VM. */
  pid: number;
}

export interface WaitOptions {
  /** Aborting gives the wait up and rejects with `ABORTED`. */
  signal?: AbortSignal;
}

export interface ProcessEnd {
  /** `null` when a signal ended it. */
  exitCode: number | null;
  /** Name of the signal that ended it, as `"SIGKILL"`. */
  signal: string | null;
  /** Whether it had run for `timeoutMs`. */
  timedOut: boolean;
  /**
   * Whether it was ended with its VM. `sleep`, `close` and `destroy` send SIGTERM, and what has not ended a
   * second later is killed; a VM that dies kills what is in it.
   */
  vmEnded: boolean;
}

export interface ShellOptions extends Partial<ShellSize> {
  /** A program to run instead of a shell, found in `PATH`. */
  command?: string;
  /** Arguments of `command`. */
  args?: readonly string[];
  /** Added to the VM's own defaults (`PATH`, `HOME`, …) and `TERM=xterm-256color`. */
  env?: Readonly<Record<string, string>>;
  /** Default: `/home/user`. */
  cwd?: string;
  /** `"root"` is the VM's root, never the host's; it exists where the host process is root. */
  user?: "user" | "root";
}

/** In characters, from 1 to 65535. */
export interface ShellSize {
  /** Default: 80. */
  cols: number;
  /** Default: 24. */
  rows: number;
}

export interface Shell {
  shellId: string;
}

export type ShellEnd = Omit<ProcessEnd, "timedOut">;

/** A process that was started by `spawn`. */
export interface ProcessRecord {
  pid: number;
  command: string;
  args: string[];
  cwd: string;
  user: "user" | "root";
  /** Milliseconds since the epoch. */
  startedAt: number;
  running: boolean;
  /** Both are `null` while it runs; then one of them. */
  exitCode: number | null;
  signal: string | null;
  /** As in {@link ProcessEnd}; `false` while it runs. */
  timedOut: boolean;
  vmEnded: boolean;
}

/** A shell that was opened by `openShell`, as {@link ProcessRecord}: its `command` is `/bin/bash` or `/bin/sh` by default. */
export interface ShellRecord extends Omit<ProcessRecord, "pid" | "timedOut"> {
  shellId: string;
}

/** A process of the VM. What its command line says is its own choice. */
export interface VmProcess {
  pid: number;
  /** Its parent; 0 of PID 1. What `spawn` and `exec` have started is a child of PID 1. */
  ppid: number;
  /** Its process group. */
  pgid: number;
  /** Its session. */
  sid: number;
  /** `"user"`, `"root"`, or the number of another uid. */
  user: string;
  /** `"waiting"`: for a disk, mostly, and not to be interrupted. `"traced"`: stopped by a debugger. */
  state: "running" | "sleeping" | "waiting" | "stopped" | "traced" | "zombie" | "other";
  threads: number;
  /** CPU time of it alone. */
  cpuTimeMs: number;
  /** Its resident set: what it shares with others counts for each. */
  memoryBytes: number;
  /** Milliseconds since the epoch. */
  startedAt: number;
  /**
   * Program and arguments, the first 2 KiB and 256 of them. Its name in brackets of a process without any, and where reading
   * them took long, as during a fork bomb.
   */
  command: string[];
}

export interface ProcessTree extends VmProcess {
  children: ProcessTree[];
}

/** A path in a VM: bytes where it is not UTF-8. */
export type VmPath = string | Uint8Array;

export interface FileOptions {
  /**
   * Who does it. Default: `"user"`. `"root"` is the VM's root, never the host's; it exists where the host
   * process is root.
   */
  user?: "user" | "root";
}

/** A string has a `length`, and would pass for options that have one: `readFile(path, "utf8")`. */
export type NoString = object;

export interface ReadFileOptions extends FileOptions {
  /** In bytes. Default: 0. */
  offset?: number;
  /** Most that is read, in bytes. Default: to the end of the file. */
  length?: number;
}

export interface WriteFileOptions extends FileOptions {
  /**
   * Permissions, as they are to be, whatever the umask; of a file that exists too. Default: those that it
   * has, of a new one 0o644.
   */
  mode?: number;
  /** Write behind what the file holds. Default: `false`. */
  append?: boolean;
}

/** `path` is as it was given. */
export type ReadFilesResult =
  | { path: VmPath; content: Uint8Array; error?: undefined }
  | { path: VmPath; content?: undefined; error: AgentVmError };

export interface FileToWrite {
  path: VmPath;
  content: string | Uint8Array;
  /** As with `writeFile`. */
  mode?: number;
  append?: boolean;
}

/** `path` is as it was given. */
export interface WriteFilesResult {
  path: VmPath;
  error?: AgentVmError;
}

export interface MkdirOptions extends FileOptions {
  /** Make missing parents too; a directory that exists is fine. Default: `false`. */
  recursive?: boolean;
  /** Permissions, less the umask 022. Default: 0o777. */
  mode?: number;
}

export interface ReaddirOptions extends FileOptions {
  /** Aborting rejects with `ABORTED`. */
  signal?: AbortSignal;
}

export interface ReaddirRecursiveOptions extends ReaddirOptions {
  /**
   * Go on past what is below and can't be read, instead of failing (`EACCES`; in `/proc` also `EINVAL`, …):
   * of such a directory nothing is told but itself, and nothing of what has a path of more than 4095 bytes.
   * Default: `false`.
   */
  skipUnreadable?: boolean;
}

export interface WalkOptions extends ReaddirRecursiveOptions {
  /** Also the entries of the directories below. Default: `true`. */
  recursive?: boolean;
}

export type FileType =
  | "file"
  | "directory"
  | "symlink"
  | "fifo"
  | "socket"
  | "characterDevice"
  | "blockDevice"
  /** The file system does not say: `stat` does. */
  | "unknown";

export interface DirectoryEntry {
  name: string;
  /** The path that was listed and, below it, that of the entry: other calls take it. */
  path: string;
  /**
   * The same, where it is not UTF-8: take this one then, since `path` and `name` have replacement characters
   * (U+FFFD) in them.
   */
  rawPath?: Uint8Array;
  /** A symlink is one, whatever it leads to. */
  type: FileType;
}

export interface StatOptions extends FileOptions {
  /** `false`: look at a symlink itself. Default: `true`. */
  followSymlinks?: boolean;
}

export interface FileStat {
  type: FileType;
  /** In bytes. */
  size: number;
  /** Permissions, with the setuid, setgid and sticky bits: what `chmod` takes. */
  mode: number;
  /** Ids of the VM: 1000 is `user`. */
  uid: number;
  gid: number;
  /** Names of the file. */
  nlink: number;
  /** Of 512 bytes, on the disk. */
  blocks: number;
  /** Milliseconds since the epoch, with fractions: last read. */
  atimeMs: number;
  /** Last change of the content. */
  mtimeMs: number;
  /** Last change of anything. */
  ctimeMs: number;
}

export interface MoveOptions extends FileOptions {
  /** `false`: `EEXIST` if there is something. Default: `true`. */
  overwrite?: boolean;
}

export interface CopyOptions extends FileOptions {
  /** A directory with everything in it. Default: `false`. */
  recursive?: boolean;
  /** `false`: `EEXIST` where something is in the way. Default: `true`. */
  overwrite?: boolean;
  /** Aborting leaves what is copied, and rejects with `ABORTED`. */
  signal?: AbortSignal;
}

/** Milliseconds since the epoch, with fractions: as `stat` tells them, or `Date.now()`. */
export interface FileTimes {
  /** Last read. */
  atimeMs?: number;
  /** Last change of the content. */
  mtimeMs?: number;
}

export interface DeleteOptions extends FileOptions {
  /** A directory with everything in it. Default: `false`. */
  recursive?: boolean;
  /** A path where there is nothing is no error. Default: `false`. */
  force?: boolean;
  /** Aborting leaves the rest, and rejects with `ABORTED`. */
  signal?: AbortSignal;
}

/** Ids of the VM. What is left out stays. */
export interface Owner {
  uid?: number;
  gid?: number;
}

export interface LinkOptions extends FileOptions {
  /** `"buffer"`: as bytes, which need not be UTF-8. Default: `"utf8"`. */
  encoding?: "utf8" | "buffer";
}

export type UploadSource =
  | string
  | URL
  | Uint8Array
  | Blob
  | AsyncIterable<string | Uint8Array>
  | Iterable<string | Uint8Array>
  | ReadableStream<Uint8Array>;

export interface UploadOptions extends FileOptions {
  /** Permissions, as they are to be. Default: 0o644. */
  mode?: number;
  /** Aborting removes what has arrived, and rejects with `ABORTED`. */
  signal?: AbortSignal;
}

export interface DownloadOptions extends FileOptions {
  /** Aborting leaves a file at the destination as it was, destroys a stream, and rejects with `ABORTED`. */
  signal?: AbortSignal;
}

export interface ReadStreamOptions extends ReadFileOptions {
  /** Aborting destroys the stream with `ABORTED`. */
  signal?: AbortSignal;
}

export interface WatchOptions extends FileOptions {
  /** Also what is below the directories in it. Default: `false`. */
  recursive?: boolean;
  /** Aborting ends it: the iteration rejects with `ABORTED`. */
  signal?: AbortSignal;
}

/** Paths are as in {@link DirectoryEntry}; the one that is watched is itself. */
export type FileEvent =
  | FileChange<"created" | "modified" | "deleted">
  /** Of its mode, owner, times or links. */
  | FileChange<"attributes">
  /** Within what is watched. What comes from elsewhere is created, what goes there deleted. */
  | (FileChange<"moved"> & { from: string /** Where it is not UTF-8. */; rawFrom?: Uint8Array })
  /** Changes were lost: there were more than were asked for in time. */
  | { type: "overflow" };

export interface FileChange<Type extends string> {
  type: Type;
  path: string;
  rawPath?: Uint8Array;
  isDirectory: boolean;
}

/** `break`, `close()`, `return()` and the end of an `await using` end it, whatever is under way. */
export interface FileIterator<T> extends AsyncIterableIterator<T>, AsyncDisposable {
  next(): Promise<IteratorResult<T, undefined>>;
  return(): Promise<IteratorResult<T, undefined>>;
  close(): void;
}

/** What `fetch` takes. A stream as `body` needs no `duplex`. */
export type VmFetchInit = Omit<RequestInit, "dispatcher" | "duplex">;

export interface ConnectOptions {
  /** Aborting gives the call up and rejects with `ABORTED`. It does nothing to an open connection. */
  signal?: AbortSignal;
}

/**
 * A stream as `net.Socket` is one, with `end()` for one direction and `destroy()` for both. Errors have a
 * `code`: `ECONNRESET`, `EPIPE`, `ABORTED`, `VM_EXITED`, …
 */
export interface VmConnection extends Duplex {}

export interface ListeningPort {
  port: number;
  /** Where it listens, as `"127.0.0.1"`, `"0.0.0.0"`, `"::1"` or `"::"`. */
  address: string;
}

export interface AgentEvents {
  /** An event of any session of this VM, after it is committed. */
  sessionEvent: {
    sessionId: string;
    /** 1, 2, 3, … without gaps within a session. */
    sequenceNumber: number;
    event: JsonRpcNotification;
  };
  /**
   * An agent asks for permission, in a session with `permissionPolicy: "ask"`. Each listener is told
   * each request once, also those that wait when it comes.
   */
  permissionRequest: {
    sessionId: string;
    request: PermissionRequest;
  };
  /**
   * What a session does has changed: it is opened, closed or gone, a turn begins or ends, … A state that
   * another has replaced before a listener could be told is left out.
   */
  sessionStatus: {
    sessionId: string;
    status: "open" | "closed" | "suspended" | "destroyed";
    /** The turn that is under way. */
    turnId: string | null;
    /** How many requests wait for `respondPermission`. */
    pendingPermissions: number;
  };
  vmBooted: {
    /** The host's programs changed since this VM last booted. */
    baseChanged: boolean;
    /** The host crashed while it ran: writes outside of `/home/user`, `/root` and `/var` may be lost. */
    layersSuspect: boolean;
  };
  vmShutdown: { reason: "sleep" | "destroy" | "close" | "error" };
  /** The VM has met a limit. A limit that is met again and again is told a few times a second. */
  limitReached: {
    limit: "memoryBytes" | "pids" | "diskBytes" | "minFreeDiskBytes";
    /** One line for a person. */
    detail: string;
  };
  /**
   * A placeholder of `secrets` was sent where its value does not go, and stayed what it is. Seen is what goes
   * to hosts of secrets, and the beginning of what is not encrypted; inside TLS to other hosts nobody looks.
   */
  secretMisdirected: {
    /** Its name. */
    secret: string;
    /** What the request named as its host, else the address; `"*"` for many. */
    host: string;
    /** 0 for many. */
    port: number;
    /** `"plaintext"`: over a connection without TLS. */
    place: "header" | "url" | "plaintext";
    /** How often, since it was last told; at most once a second. */
    count: number;
  };
  /**
   * A program in the VM was refused something by the network's rules. It is told at once; the same again
   * (host, port, protocol and rule) within a second is counted in one event at the end of it. Of very many
   * different refusals a few hundred a second are told, and the rest is one event with `host` `"*"`, so that
   * the sum of all `count`s is how many there were.
   */
  networkDenied: {
    /** The name, where one is known, or the address. `"*"`: of several. */
    host: string;
    /** 53 of a name that was not resolved; 0 where there is none. */
    port: number;
    /** `dns`: a name was asked for. */
    protocol: "tcp" | "udp" | "dns" | "other";
    /**
     * The rule of `deny`, as it was written; `allowlist` or `none`, the default that had no rule for it;
     * `private`, `link-local`, `shared` (carrier-grade NAT), `metadata`, `multicast`, `loopback`,
     * `documentation` or `reserved`, which is no public address; `host`, an address of the host;
     * `protocol`, not TCP; `tls`, a TLS handshake that does not say for whom it is; `unknown`, which
     * could not be looked up; `*`, of several.
     */
    rule: string;
    count: number;
  };
  installProgress: InstallProgress;
  /** An image is pulled from a registry, or unpacked. */
  imageProgress: ImageProgress;
  /**
   * A process of `spawn` has written something. The first listener is also told what was kept while nobody
   * listened.
   */
  processOutput: {
    pid: number;
    stream: "stdout" | "stderr";
    data: Uint8Array;
    /** How much of the stream before these bytes was not kept, because nobody listened; mostly 0. */
    droppedBytes: number;
  };
  /**
   * A process of `spawn` has ended, and all of its output was told to whoever listens to it. The first listener
   * is also told of the ends that nobody has heard of, of the processes that `listProcesses` knows. Who wants
   * the output before the end listens to both in one go.
   */
  processExit: { pid: number } & ProcessEnd;
  /** A terminal shows something. The first listener is also told what was kept while nobody listened. */
  shellData: {
    shellId: string;
    /** As a terminal gets it, with control sequences; a character may be cut between two of these. */
    data: Uint8Array;
    /** How much before these bytes was not kept, because nobody listened; mostly 0. */
    droppedBytes: number;
  };
  /** A shell has ended, and all of its data was told: as `processExit`. */
  shellExit: { shellId: string } & ShellEnd;
}

/** What a VM takes of the host. */
export type VmStats = RunningVmStats | SleepingVmStats;

export interface SleepingVmStats {
  running: false;
  /** Of its directory, measured now. */
  diskBytes: number;
}

export interface RunningVmStats {
  running: true;
  /** Of its directory, measured now. */
  diskBytes: number;
  /** Since it booted. */
  uptimeMs: number;
  /**
   * CPU time since it booted, of all its processes; where `countedBy` is `"processes"`, of those that run
   * now and of their children that they have waited for. Where a process lets nobody look at it for two seconds,
   * as those of a fork bomb can, of the first thread of each; and processes are counted, not threads.
   */
  cpuTimeMs: number;
  memoryBytes: number;
  /** The most so far. `null` where nobody has counted it. */
  memoryPeakBytes: number | null;
  /** Processes and threads, PID 1 included. */
  pids: number;
  /**
   * By whom CPU time, memory and pids are counted: the kernel, for a VM in a cgroup, or the VM itself, as
   * sums over its processes. Memory is then that of resident sets: what processes share counts for each,
   * and files in `/tmp` do not.
   */
  countedBy: "cgroup2" | "cgroup1" | "processes";
  /** What programs in the VM have received and sent since it booted, without headers. */
  networkRxBytes: number;
  networkTxBytes: number;
  limits: LimitInForce[];
}

export interface LimitInForce {
  name: "memoryBytes" | "cpus" | "pids" | "openFiles" | "diskBytes" | "minFreeDiskBytes";
  /** `null`: no limit. */
  value: number | null;
  /** How it is enforced. `"none"`: it is not. */
  mechanism: "cgroup2" | "cgroup1" | "rlimit" | "polled" | "none";
}

/** The agents that are installed on this host, for all data directories of this user. */
export interface AgentStore {
  /**
   * The agents that agentvm brings, and everything that is in the store.
   *
   * @throws {AgentVmError} `CLIENT_CLOSED`, errno names for the store
   */
  list(): Promise<AgentListing>;

  /**
   * Installs an agent, if it is not installed yet: Node and npm, its packages, its compiled scripts.
   * `createSession` does the same. If it fails, nothing of it is left.
   *
   * @param agent a name, as `"pi"`, or a name and an exact version, as `"pi@0.87.0"`: one that this
   * agentvm does not pin is resolved by npm now, and kept as it is
   * @throws {AgentVmError} `INSTALL_FAILED`, `AGENT_UNKNOWN`, `INVALID_ARGUMENT` for what is no exact
   * version, `ABORTED`, …
   */
  install(agent: string, options?: InstallOptions): Promise<void>;

  /**
   * Removes an agent in all versions, as `"pi"`, or in one, as `"pi@0.87.0"`. What is not there is as good
   * as removed.
   *
   * @returns what was removed
   * @throws {AgentVmError} `AGENT_IN_USE` if a running VM of any process uses some of it, or if it is
   * just being installed: that stays, the rest is removed
   */
  remove(agent: string): Promise<AgentStoreEntry[]>;

  /**
   * Removes what this version of agentvm never uses: agents and Nodes of other versions, old adapters,
   * what killed installers left. What a running VM uses, or is just being installed, stays.
   */
  prune(options?: PruneOptions): Promise<PruneResult>;
}

/**
 * The images in `imageStoreDir`, of all data directories of this user. An image stays as long as there is a
 * VM that was made with it, awake or asleep, in whatever data directory.
 */
export interface ImageStore {
  /**
   * What is in the store, the newest first.
   *
   * @throws {AgentVmError} `CLIENT_CLOSED`, errno names for the store
   */
  list(): Promise<ImageRecord[]>;

  /**
   * Asks the registry what a name stands for, and fetches and unpacks it if it is not in the store yet. A
   * VM does the same at its first boot. What has come of layers when it fails is gone on from by the next.
   *
   * @param image a name in a registry, as `"python:3.12"`, or an OCI layout
   * @throws {AgentVmError} `IMAGE_NOT_FOUND`, `IMAGE_DENIED`, `IMAGE_PULL_FAILED`, `IMAGE_INVALID`,
   * `IMAGE_UNSUPPORTED`, `IMAGE_TOO_LARGE`, `STORE_FULL`, `ABORTED`, `INVALID_ARGUMENT`
   */
  pull(image: string | OciLayoutImage, options?: PullOptions): Promise<ImageRecord>;

  /**
   * Takes a name from an image, and removes the image if it has no other; by its digest, with all its
   * names. What is not there is as good as removed.
   *
   * @param image a name, as `"python:3.12"` or one of `references`; or `"sha256:…"`, of which the first 12
   * digits are enough
   * @throws {AgentVmError} `IMAGE_IN_USE` names the VMs that were made with it: neither it nor its name is
   * removed. `INVALID_ARGUMENT` also if the digits are those of several images
   */
  remove(image: string): Promise<ImageRemoval>;

  /**
   * Removes every image that no VM was made with, what pulls that ended early have left, and, in this
   * client's data directory, what VMs shared of earlier states of the host.
   */
  prune(options?: PruneOptions): Promise<ImagePruneResult>;
}

export interface PullOptions {
  onProgress?: (progress: ImageProgress) => void;
  /** Aborting rejects with `ABORTED`. */
  signal?: AbortSignal;
}

export interface ImageRecord {
  /** `"sha256:…"`, of the manifest for this machine's platform. */
  digest: string;
  /**
   * What it was last pulled as: `"docker.io/library/python:3.12"`, or `"oci:/path/of/a/layout:tag"`. Empty
   * when its names stand for newer images.
   */
  references: string[];
  /** What it takes of the disk, unpacked. */
  bytes: number;
  /** When it was unpacked, in milliseconds since the epoch. */
  pulledAt: number;
  /** The VMs that were made with it, of every data directory. */
  vms: ImageVm[];
  /** Whether a VM, of any process, runs on it or boots on it at this moment. */
  running: boolean;
}

export interface ImageVm {
  /** `null`: it can't be told at the moment, because the disk is not mounted or not readable. */
  key: string[] | null;
  dataDir: string;
}

export interface ImageRemoval {
  removed: ImageRecord[];
  /** Names that stand for no image any more. */
  untagged: string[];
}

export interface ImagePruneResult {
  /** What was removed, or would be. */
  removed: ImageRecord[];
  /** VMs were made with them, or they are just being used. */
  kept: ImageRecord[];
  /** Packed layers. */
  layers: PrunedFiles;
  /** What VMs shared of earlier states of the host. */
  bases: PrunedFiles;
}

export interface PrunedFiles {
  count: number;
  bytes: number;
}

export interface DoctorResult {
  /** Whether VMs run on this host: no check is `"missing"`. */
  ok: boolean;
  checks: DoctorCheck[];
}

export interface DoctorCheck {
  /** Stable: `"kernel"`, `"user-namespaces"`, `"cgroups"`, `"boot"`, … */
  name: string;
  /** `"degraded"`: VMs run, with something less. `"missing"`: none runs. */
  state: "ok" | "degraded" | "missing";
  /** What was found, for a person. */
  detail: string;
  /** What does not work for it; `null` where all is well. */
  lost: string | null;
  /** How to enable it; `null` where all is well. */
  remedy: string | null;
}

export interface InstallOptions {
  onProgress?: (progress: InstallProgress) => void;
  /** Aborting rejects with `ABORTED` and leaves nothing of the installation. */
  signal?: AbortSignal;
}

export interface PruneOptions {
  /** Only tell what would be removed. Default: `false`. */
  dryRun?: boolean;
}

export interface AgentListing {
  agents: AvailableAgent[];
  entries: AgentStoreEntry[];
}

export interface AvailableAgent {
  /** As `createSession` takes it. */
  name: string;
  /** The npm package that is this agent, or that speaks ACP for it. */
  package: string;
  /** The version of the package that this client runs. */
  version: string;
  /** Whether it is the version that this agentvm pins, and is tested with. */
  pinned: boolean;
  installed: boolean;
}

export interface AgentStoreEntry {
  /** Its directory below `agentStoreDir`. */
  name: string;
  /** The agent that it belongs to; `"node"` for the Node and npm that all agents share. */
  agent: string;
  version: string;
  bytes: number;
  /**
   * What this version of agentvm does with it: `"pinned"`, it runs; `"on-request"`, it runs for a client
   * that asks for this version; `"unused"`, nothing.
   */
  use: "pinned" | "on-request" | "unused";
  /** Whether a VM, of any process, runs on it at this moment. */
  running: boolean;
}

export interface PruneResult {
  /** What was removed, or would be. */
  removed: AgentStoreEntry[];
  kept: (AgentStoreEntry & { reason: "in-use" | "installing" })[];
}

export interface ImageProgress {
  /** Its name in full, as `docker.io/library/python:3.12`, or `oci:/path/of/a/layout:tag`. */
  image: string;
  step: "resolving" | "downloading" | "unpacking";
  /** One line for a person. */
  message: string;
  /** Of the packed image, arrived or unpacked, of `totalBytes`; both 0 while that is being asked. */
  bytes: number;
  totalBytes: number;
}

export interface InstallProgress {
  agentType: string;
  /** `"waiting"` for another installer; `"runtime"`: Node and npm; `"agent"`: its packages. */
  step: "waiting" | "runtime" | "agent";
  /** One line for a person. */
  message: string;
  /** Packages that have arrived, of `total`; both 0 while npm has still to find out which. */
  done: number;
  total: number;
  /** Bytes written so far in this step. */
  bytes: number;
}

/** Stable: programs may depend on it. */
export type ErrorCode =
  | "SESSION_NOT_FOUND"
  | "SESSION_BUSY"
  | "AGENT_UNKNOWN"
  | "AGENT_NOT_INSTALLED"
  | "AGENT_IN_USE"
  | "INSTALL_FAILED"
  | "AGENT_EXITED"
  | "AGENT_PROTOCOL"
  | "AGENT_ERROR"
  | "AGENT_UNSUPPORTED"
  | "AUTH_REQUIRED"
  | "ENV_REQUIRED"
  | "PERMISSION_NOT_FOUND"
  | "PROCESS_NOT_FOUND"
  | "SHELL_NOT_FOUND"
  /** The host refuses something that is asked for, or the database is a newer agentvm's. */
  | "VM_UNSUPPORTED"
  /** It is open in another process. */
  | "VM_BUSY"
  /** It ended while the call was under way. */
  | "VM_EXITED"
  | "VM_LIMIT"
  | "NETWORK_DENIED"
  | "REDIRECTED"
  | "IMAGE_NOT_FOUND"
  | "IMAGE_INVALID"
  | "IMAGE_UNSUPPORTED"
  | "IMAGE_TOO_LARGE"
  | "IMAGE_MISMATCH"
  | "IMAGE_IN_USE"
  | "IMAGE_DENIED"
  | "IMAGE_PULL_FAILED"
  | "TIMEOUT"
  | "INVALID_ARGUMENT"
  | "SEQ_AHEAD"
  | "RESULT_TOO_LARGE"
  | "STORE_CORRUPT"
  | "STORE_FULL"
  | "CLIENT_CLOSED"
  | "ABORTED"
  /** A defect of agentvm, or of the host under it: the message says where. */
  | "INTERNAL"
  /** Names of errnos, as `"ENOENT"`, for files and processes. */
  | (string & {});

/** Every failure of this package, as a rejection or thrown. `name` is `"AbortError"` for `ABORTED`. */
export declare class AgentVmError extends Error {
  private constructor();
  readonly code: ErrorCode;
  /**
   * `AGENT_ERROR`, `AUTH_REQUIRED`: the agent's `{ code, data }`. `TIMEOUT` and `VM_LIMIT` of
   * `exec`: `{ stdout, stderr }`.
   */
  readonly data?: unknown;
}

export type JsonObject = { [key: string]: JsonValue };
export type JsonValue = string | number | boolean | null | JsonValue[] | JsonObject;

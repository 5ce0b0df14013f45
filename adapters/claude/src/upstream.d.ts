/**
 * The part that we use of `@agentclientprotocol/claude-agent-acp@0.101.0` and of its ACP SDK, which are
 * only there in the agent store: as a development dependency they would bring 320 MB.
 */

declare module "@agentclientprotocol/claude-agent-acp/dist/acp-agent.js" {
  export interface McpServerStatus {
    name: string;
    status: "connected" | "failed" | "needs-auth" | "pending" | "disabled";
    error?: string;
  }

  /** A session that is open. */
  export interface OpenSession {
    query: { mcpServerStatus(): Promise<McpServerStatus[]> };
    modes: { currentModeId: string; availableModes: { id: string }[] };
    configOptions: unknown[];
    /** Its `claude` has ended: no prompt will be answered any more. */
    queryClosed?: boolean;
  }

  export interface ClaudeAcpAgent {
    sessions: Record<string, OpenSession | undefined>;
    setSessionMode(params: { sessionId: string; modeId: string }): Promise<object>;
    closeSession(params: { sessionId: string }): Promise<unknown>;
    dispose(): Promise<void>;
  }

  /** One JSON-RPC message each way. */
  export interface Stream {
    readable: ReadableStream<object>;
    writable: WritableStream<object>;
  }

  /** ACP version 1 over a stream. `onAgent` is called while it is connected. */
  export function v1AgentApp(
    logger: { log(...words: unknown[]): void; error(...words: unknown[]): void },
    onAgent: (agent: ClaudeAcpAgent) => void,
  ): { connect(stream: Stream): { closed: Promise<void> } };
}

declare module "@agentclientprotocol/claude-agent-acp/dist/managed-policy.js" {
  /** Sets the variables of an organisation's settings in this process's environment. */
  export function applyManagedPolicyEnv(): Promise<void>;
}

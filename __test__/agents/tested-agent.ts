/** What the matrix has to know of an agent. Each agent's file here describes one. */

import type { Agent } from "agentvm";
import type { ModelRequest, ModelServer, ToolCallReply } from "../model-server.js";
import type { Row } from "./rows.js";

export interface TestedAgent {
  /** As `createSession` takes it. */
  name: string;
  /** What a user sets to let it ask this model. Nothing else may be needed. */
  env(model: ModelServer): Record<string, string>;
  /** Turns its repetitions of failed requests off, or down to what ends soon. */
  noRetries: Record<string, string>;
  /** Whether it tells of its repetitions, as `_agentvm/retry`. */
  tellsRetries: boolean;
  /** Puts into a VM what the agent needs beside its installation. */
  prepare?(vm: Agent): Promise<void>;

  /** The call of its tool that runs a shell command. */
  run(command: string): ToolCallReply;
  /** The calls, one after the other, that replace a text in a file that the model has not seen yet. */
  edit(path: string, before: string, after: string): ToolCallReply[];
  /** The name under which the model sees a tool of an MCP server. */
  mcpTool(server: string, tool: string): string;
  /** Whether a request asks for no more than a title of the session. Default: none does. */
  isTitle?(request: ModelRequest): boolean;

  models: Choices;
  modes: Choices;
  thoughtLevels: Choices;

  /** What it does not do, and what happens instead. */
  limits: Partial<Record<Row, Limit>>;
}

/**
 * Values to choose from, by how a request to the model tells that they are in force. Two of each kind, in
 * an order in which they can be chosen one after the other; none if there is no such choice, which is a
 * limit then.
 */
export type Choices = Record<string, (request: ModelRequest) => boolean>;

export interface Limit {
  /** Goes on after "not so, ": `because it has no modes`. */
  because: string;
  /** Asserts it. */
  instead(it: TestedAgent): Promise<void>;
}

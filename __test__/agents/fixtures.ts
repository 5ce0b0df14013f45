/** An agent of the matrix in a VM of its own, with a model that follows a conversation. */

import type { Agent, Client, ClientOptions, CreateSessionOptions } from "agentvm";
import { newClient, newDirectory, newModel } from "../fixtures.js";
import type { ModelRequest, ModelServer, Reply } from "../model-server.js";
import type { TestedAgent } from "./tested-agent.js";

/**
 * What the model says, by the user's words that it answers: after the words, after the result of the
 * first tool call, of the second, and so on. The words need be part of the prompt only.
 */
export type Conversation = Record<string, readonly (Reply | Answer)[]>;

export type Answer = (request: ModelRequest) => Reply | Promise<Reply>;

export interface AgentVm {
  dataDir: string;
  client: Client;
  agent: Agent;
  model: ModelServer;
  /** The requests so far that are not for a title, but for the conversation. */
  asked(): ModelRequest[];
  session(options?: CreateSessionOptions): Promise<string>;
}

export async function newAgentVm(
  it: TestedAgent,
  conversation: Conversation,
  options: ClientOptions = {},
): Promise<AgentVm> {
  const model = await newConversation(it, conversation);
  const dataDir = options.dataDir ?? (await newDirectory());
  const loopbackExemptPorts = [model.port, ...(options.loopbackExemptPorts ?? [])];
  const client = await newClient({ ...options, dataDir, loopbackExemptPorts });
  const agent = client.vm.getOrCreate("vm");
  await it.prepare?.(agent);
  return {
    dataDir,
    client,
    agent,
    model,
    asked: () => askedOf(it, model),
    session: async (options) => {
      const { sessionId } = await agent.createSession(it.name, {
        ...options,
        env: { ...envOf(it, model), ...options?.env },
      });
      return sessionId;
    },
  };
}

/** The same with a session. */
export async function newAgentSession(
  it: TestedAgent,
  conversation: Conversation,
  options: CreateSessionOptions = {},
): Promise<AgentVm & { sessionId: string }> {
  const vm = await newAgentVm(it, conversation);
  return { ...vm, sessionId: await vm.session(options) };
}

export function newConversation(it: TestedAgent, conversation: Conversation): Promise<ModelServer> {
  return newModel((request) => (it.isTitle?.(request) ? TITLE : replyTo(request, conversation)));
}

export function askedOf(it: TestedAgent, model: ModelServer): ModelRequest[] {
  return model.requests.filter((request) => !it.isTitle?.(request));
}

/** A session's environment: this model, and failures at once. */
export function envOf(it: TestedAgent, model: ModelServer): Record<string, string> {
  return { ...it.env(model), ...it.noRetries };
}

/** For those who want JSON and those who do not. */
const TITLE: Reply = { text: '{"title":"A test"}' };

async function replyTo(request: ModelRequest, conversation: Conversation): Promise<Reply> {
  const { messages } = request;
  const users = messages.map(({ role, text }) =>
    role === "user" || role === "beside" ? lastOf(text, conversation) : undefined,
  );
  const at = users.findLastIndex((words) => words !== undefined);
  const words = users[at];
  if (words === undefined)
    return unknown(`no words of the conversation are in ${JSON.stringify(messages)}`);
  const results = messages.slice(at).filter(({ role }) => role === "tool").length;
  const reply = conversation[words]?.[results];
  if (reply === undefined)
    return unknown(`after "${words}" and ${results} results there is no reply`);
  return typeof reply === "function" ? await reply(request) : reply;
}

/** An agent that has forgotten gets a transcript, with earlier words before the new ones. */
function lastOf(text: string, conversation: Conversation): string | undefined {
  return Object.keys(conversation)
    .filter((words) => text.includes(words))
    .sort((one, other) => text.lastIndexOf(one) - text.lastIndexOf(other))
    .at(-1);
}

/** 400: no agent takes it for an overload and asks again. */
function unknown(message: string): Reply {
  return { error: { status: 400, type: "invalid_request_error", message } };
}

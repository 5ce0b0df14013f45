/** What a client can choose for a live session: the model and how much it thinks. */

import type { AgentSession } from "@earendil-works/pi-coding-agent";
import type { ConfigOption } from "./shared/acp.js";
import { invalidParams } from "./shared/errors.js";

type ThinkingLevel = AgentSession["thinkingLevel"];

const MODEL = "model";
const THOUGHT_LEVEL = "thought_level";

export class Configuration {
  readonly #pi: AgentSession;
  readonly #changed: (options: ConfigOption[]) => void;
  /** What the client knows. */
  #reported: string | undefined;
  /** The options that are being set: their change is answered, not announced. */
  #setting = 0;

  /** `changed` is called when options change that nobody has set. */
  constructor(pi: AgentSession, changed: (options: ConfigOption[]) => void) {
    this.#pi = pi;
    this.#changed = changed;
  }

  /** For the answer to a request. */
  report(): ConfigOption[] {
    const options = this.#options();
    this.#reported = JSON.stringify(options);
    return options;
  }

  /** Tells the client what has become different by itself, if anything has. */
  announce(): void {
    if (this.#reported === undefined || this.#setting > 0) return;
    const before = this.#reported;
    const options = this.report();
    if (this.#reported !== before) this.#changed(options);
  }

  async set(configId: string, value: unknown): Promise<ConfigOption[]> {
    const before = this.#options();
    const option = before.find(({ id }) => id === configId);
    if (!option) {
      const ids = before.map(({ id }) => id).join(", ");
      throw invalidParams(`configId "${configId}" is not an option; the options are: ${ids}`);
    }
    if (!option.options.some((allowed) => allowed.value === value)) {
      const values = option.options.map((allowed) => allowed.value).join(", ");
      throw invalidParams(`${configId} can't be ${JSON.stringify(value)}; it can be: ${values}`);
    }
    this.#setting += 1;
    try {
      if (configId === THOUGHT_LEVEL) this.#pi.setThinkingLevel(value as ThinkingLevel);
      else if (value !== option.currentValue) await this.#setModel(value as string);
    } finally {
      this.#setting -= 1;
    }
    const after = this.report();
    const others = (options: ConfigOption[]) =>
      JSON.stringify(options.filter(({ id }) => id !== configId));
    if (others(after) !== others(before)) this.#changed(after);
    return after;
  }

  #options(): ConfigOption[] {
    const { model, thinkingLevel } = this.#pi;
    const options: ConfigOption[] = [];
    const models = this.#models();
    if (model && models.length > 0) {
      options.push({
        id: MODEL,
        name: "Model",
        category: "model",
        type: "select",
        currentValue: modelValue(model),
        options: models.map((each) => ({ value: modelValue(each), name: each.name })),
      });
    }
    options.push({
      id: THOUGHT_LEVEL,
      name: "Thinking",
      category: "thought_level",
      type: "select",
      currentValue: thinkingLevel,
      options: this.#pi.getAvailableThinkingLevels().map((value) => ({ value, name: value })),
    });
    return options;
  }

  /** Those that have a key, and the current one, which may have lost its. */
  #models(): NonNullable<AgentSession["model"]>[] {
    const { model, modelRuntime } = this.#pi;
    const models = [...modelRuntime.getAvailableSnapshot()];
    const current = model && modelRuntime.getModel(model.provider, model.id);
    if (current && !models.some((each) => modelValue(each) === modelValue(current)))
      models.push(current);
    return models;
  }

  async #setModel(value: string): Promise<void> {
    const model = this.#models().find((each) => modelValue(each) === value);
    if (model) await this.#pi.setModel(model);
  }
}

function modelValue({ provider, id }: { provider: string; id: string }): string {
  return `${provider}/${id}`;
}

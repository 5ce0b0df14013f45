/** What a client can choose for a session: the model, how much it thinks, and the mode. */

import type { Json, Model, OpenedThread } from "./codex.js";
import type { ConfigOption } from "./shared/acp.js";
import { invalidParams } from "./shared/errors.js";

const MODEL = "model";
const THOUGHT_LEVEL = "thought_level";

const DEFAULT_MODE = "default";
const MODES = [
  { id: DEFAULT_MODE, name: "Default", description: "Codex does the work" },
  { id: "plan", name: "Plan", description: "Codex talks about a plan and changes nothing" },
];

export interface ModesState {
  currentModeId: string;
  availableModes: typeof MODES;
}

export class Configuration {
  readonly #models: Model[];
  #model: string;
  /** Undefined: the model's own default. */
  #effort: string | undefined;
  #mode: string;
  /** Codex tells the model of a mode, which goes without saying until it changes. */
  #modeIsSaid: boolean;

  constructor(models: Model[], thread: OpenedThread) {
    this.#models = models;
    this.#model = thread.model;
    this.#effort = thread.reasoningEffort ?? undefined;
    this.#mode = thread.collaborationMode?.mode ?? DEFAULT_MODE;
    this.#modeIsSaid = this.#mode !== DEFAULT_MODE;
  }

  get model(): string {
    return this.#model;
  }

  /** For `turn/start`. */
  forTurn(): Record<string, Json> {
    const effort = this.#level() ?? null;
    if (!this.#modeIsSaid) return { model: this.#model, effort };
    // `null`: the mode's own instructions.
    const settings = { model: this.#model, reasoning_effort: effort, developer_instructions: null };
    return { collaborationMode: { mode: this.#mode, settings } };
  }

  modes(): ModesState {
    return { currentModeId: this.#mode, availableModes: MODES };
  }

  setMode(modeId: string): void {
    if (!MODES.some(({ id }) => id === modeId)) {
      const ids = MODES.map(({ id }) => id).join(", ");
      throw invalidParams(`modeId "${modeId}" is not a mode; the modes are: ${ids}`);
    }
    this.#mode = modeId;
    this.#modeIsSaid ||= modeId !== DEFAULT_MODE;
  }

  options(): ConfigOption[] {
    const options: ConfigOption[] = [
      {
        id: MODEL,
        name: "Model",
        category: "model",
        type: "select",
        currentValue: this.#model,
        options: this.#offered(),
      },
    ];
    const level = this.#level();
    if (level !== undefined) {
      options.push({
        id: THOUGHT_LEVEL,
        name: "Reasoning effort",
        category: "thought_level",
        type: "select",
        currentValue: level,
        options: this.#efforts().map((value) => ({ value, name: value })),
      });
    }
    return options;
  }

  set(configId: string, value: unknown): ConfigOption[] {
    const options = this.options();
    const option = options.find(({ id }) => id === configId);
    if (!option) {
      const ids = options.map(({ id }) => id).join(", ");
      throw invalidParams(`configId "${configId}" is not an option; the options are: ${ids}`);
    }
    const allowed = option.options.find((one) => one.value === value);
    if (!allowed) {
      const values = option.options.map((one) => one.value).join(", ");
      throw invalidParams(`${configId} can't be ${JSON.stringify(value)}; it can be: ${values}`);
    }
    if (configId === MODEL) this.#model = allowed.value;
    else this.#effort = allowed.value;
    return this.options();
  }

  /** Those of Codex's catalogue, and the one in use, which need not be in it. */
  #offered(): { value: string; name: string }[] {
    const listed = this.#models.filter((model) => !model.hidden || model.model === this.#model);
    const offered = listed.map(({ model, displayName }) => ({ value: model, name: displayName }));
    if (!offered.some(({ value }) => value === this.#model)) {
      offered.push({ value: this.#model, name: this.#model });
    }
    return offered;
  }

  /** That of the current model, if Codex knows how it thinks. */
  #level(): string | undefined {
    const efforts = this.#efforts();
    if (this.#effort !== undefined && efforts.includes(this.#effort)) return this.#effort;
    return this.#known()?.defaultReasoningEffort ?? this.#effort;
  }

  #efforts(): string[] {
    const known = this.#known();
    if (known) return known.supportedReasoningEfforts.map(({ reasoningEffort }) => reasoningEffort);
    // Configured for a model that Codex does not know.
    return this.#effort === undefined ? [] : [this.#effort];
  }

  #known(): Model | undefined {
    return this.#models.find(({ model }) => model === this.#model);
  }
}

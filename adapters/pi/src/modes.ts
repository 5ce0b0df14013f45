/** What a session's tools may do. Pi itself has no modes: these are the adapter's. */

import type { AgentSession } from "@earendil-works/pi-coding-agent";
import { invalidParams } from "./shared/errors.js";
import { READING_TOOLS } from "./tools.js";

const BUILD = { id: "build", name: "Build", description: "Pi with all of its tools" };
const PLAN = {
  id: "plan",
  name: "Plan",
  description: "Pi looks at files and changes nothing: it has only the tools that read",
};
const MODES = [BUILD, PLAN];

export interface ModesState {
  currentModeId: string;
  availableModes: typeof MODES;
}

export class Modes {
  readonly #pi: AgentSession;
  /** The tools to have again after `plan`; undefined in `build`. */
  #before: string[] | undefined;

  constructor(pi: AgentSession) {
    this.#pi = pi;
  }

  report(): ModesState {
    return { currentModeId: this.isPlan ? PLAN.id : BUILD.id, availableModes: MODES };
  }

  /** From the next request to the model on, the tools are others; none but these runs any more. */
  set(modeId: string): void {
    if (!MODES.some(({ id }) => id === modeId)) {
      const ids = MODES.map(({ id }) => id).join(", ");
      throw invalidParams(`modeId "${modeId}" is not a mode; the modes are: ${ids}`);
    }
    if (modeId === PLAN.id) {
      this.#before ??= this.#pi.getActiveToolNames();
      this.#pi.setActiveToolsByName([...READING_TOOLS]);
    } else if (this.#before) {
      this.#pi.setActiveToolsByName(this.#before);
      this.#before = undefined;
    }
  }

  get isPlan(): boolean {
    return this.#before !== undefined;
  }
}

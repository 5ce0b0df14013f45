import { expectType } from "tsd";
import { version } from ".";

expectType<string>(version);

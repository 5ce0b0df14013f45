#!/bin/sh
# cargo, for the napi CLI. Where it has built nothing yet, it sets a variable to the time, to force a
# build that is going to happen anyway; cargo remembers the value, finds another one (none) the next
# time, and builds the whole crate again.
unset NAPI_FORCE_BUILD_AGENTVM
exec cargo "$@"

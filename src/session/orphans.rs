//! What an agent that did not end by itself leaves running.

use std::time::Duration;

use crate::agents::Launch;
use crate::vm::DynVm;
use crate::vm::exec::{ExecEnd, ExecOptions, exec};

/// Programs of the VM may stop the search, but not what waits for it.
const LIMIT: Duration = Duration::from_secs(5);

/// Finds processes of this session that run a program of the agent's packages, and all below them by
/// parents that live; ends them, and returns when none is left. Who is stopped starts nothing while the
/// others are looked for. Builtins do the walk: a VM need not have `ps`.
const END: &str = r#"
while :; do
  set -- $(grep -lzxF "AGENTVM_STATE_DIR=$STATE_DIR" /proc/[0-9]*/environ 2> /dev/null)
  found=' '
  for environ; do
    pid=${environ#/proc/} pid=${pid%/environ}
    case "$(readlink "/proc/$pid/exe")" in "$PROGRAMS"/*) found="$found$pid " ;; esac
  done
  [ "$found" = ' ' ] && exit
  before=
  while [ "$found" != "$before" ]; do
    before=$found
    kill -STOP $found 2> /dev/null
    for stat in /proc/[0-9]*/stat; do
      read -r line 2> /dev/null < "$stat" || continue
      pid=${line%% *}
      set -- ${line##*) }
      case "$found" in *" $pid "*) ;; *" $2 "*) found="$found$pid " ;; esac
    done
  done
  kill -KILL $found 2> /dev/null
done
"#;

/// Where to look for them.
#[derive(Clone)]
pub(super) struct Orphans {
    programs: String,
    state_dir: String,
}

impl Orphans {
    /// `None`: which programs are the agent's is not known.
    pub(super) fn of(launch: &Launch) -> Option<Self> {
        Some(Self {
            programs: launch.programs.clone()?,
            state_dir: launch.state_dir.as_str().to_owned(),
        })
    }

    /// Ends the programs that the agent has left, and what they run. They would go on with its turn, and
    /// write into the state of a session that may be started again, or be gone. What the agent has put
    /// into the background lives on.
    pub(super) async fn end(&self, vm: &DynVm) {
        let options = ExecOptions {
            env: [("PROGRAMS", &self.programs), ("STATE_DIR", &self.state_dir)]
                .map(|(name, value)| (name.to_owned(), value.clone()))
                .into(),
            timeout: Some(LIMIT),
            ..ExecOptions::default()
        };
        match exec(vm, END, options).await {
            Ok(ExecEnd::Exited(_)) => {}
            Ok(ExecEnd::TimedOut(_)) => {
                tracing::warn!("programs of an agent that has ended may still run in its VM");
            }
            Err(error) => tracing::debug!(%error, "the agent's VM is gone too"),
        }
    }
}

//! What an agent finds of a session in the VM when it starts, and what is removed with the session.

use crate::agents::{self, Launch, Link};
use crate::error::{Code, Error, Result};
use crate::ids::SessionId;
use crate::vm::exec::{ExecEnd, ExecOptions, exec};
use crate::vm::{DynVm, Exit, GuestPath, User, VmError, file};

/// Makes the directory of a launch plan, and what has to be in it.
pub(super) async fn prepare(vm: &DynVm, launch: &Launch, instructions: Option<&str>) -> Result<()> {
    vm.create_dir_all(&launch.state_dir, User::User).await?;
    remove_stale_locks(vm, launch).await?;
    if let Some(file) = launch.instructions {
        let path = guest_path(&path(launch, file))?;
        let text = instructions.unwrap_or_default();
        file::write(&**vm, &path, text.into(), User::User).await?;
    }
    make_links(vm, launch).await
}

async fn make_links(vm: &DynVm, launch: &Launch) -> Result<()> {
    if launch.links.is_empty() {
        return Ok(());
    }
    let mut commands = Vec::new();
    for Link { path: link, target } in &launch.links {
        let path = path(launch, link);
        if let Some((parent, _)) = path.rsplit_once('/') {
            vm.create_dir_all(&guest_path(parent)?, User::User).await?;
        }
        // The session's environment may have a say in a target.
        let quoted = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
        commands.push(format!("ln -sfnT -- {} {}", quoted(target), quoted(&path)));
    }
    let made = exec(vm, &commands.join(" && "), ExecOptions::default()).await?;
    match made {
        ExecEnd::Exited(output) if output.exit != Exit::Code(0) => Err(Error::new(
            Code::from_errno(libc::EACCES),
            format!(
                "the state directory {} of the session can't be set up in the VM: {}",
                launch.state_dir.as_str(),
                String::from_utf8_lossy(&output.stderr).trim()
            ),
        )),
        _ => Ok(()),
    }
}

/// Removes the locks whose holders died with an earlier run of the VM. Those of agents that run now are
/// younger than `/run/user`, which was made when it booted and has not changed since.
async fn remove_stale_locks(vm: &DynVm, launch: &Launch) -> Result<()> {
    const STALE: &str = "-mindepth 1 -maxdepth 1 -type d -empty -name '*.lock' ! -newer /run/user -exec rmdir -- {} +";
    let absolute = launch.lock_dirs.iter().filter(|dir| dir.starts_with('/'));
    // Paths as the session's environment names them: not for a shell to read.
    let env: Vec<_> = absolute
        .enumerate()
        .map(|(number, dir)| (format!("DIR{number}"), dir.clone()))
        .collect();
    if env.is_empty() {
        return Ok(());
    }
    let dirs = (0..env.len()).fold(String::new(), |dirs, number| {
        format!("{dirs} \"$DIR{number}\"")
    });
    let options = ExecOptions {
        env,
        ..ExecOptions::default()
    };
    // What can't be removed, or is not there, does not keep an agent from its start.
    exec(vm, &format!("find{dirs} {STALE} 2> /dev/null"), options).await?;
    Ok(())
}

fn path(launch: &Launch, relative: &str) -> String {
    format!("{}/{relative}", launch.state_dir.as_str())
}

fn guest_path(path: &str) -> Result<GuestPath> {
    GuestPath::new(path).map_err(|problem| Error::new(Code::Internal, format!("{path}: {problem}")))
}

/// Deletes the directory in which an agent keeps its own memory of a session. The agent, or the VM's
/// root, may have made something in it that the user can't delete as it is.
pub(super) async fn remove(vm: &DynVm, session: SessionId) -> Result<()> {
    let directory = agents::state_dir(session);
    let directory = directory.as_str();
    let remove = format!("rm -rf -- '{directory}'");
    let command =
        format!("{remove} 2>/dev/null || {{ chmod -R u+rwx -- '{directory}'; {remove}; }}");
    let output = exec(vm, &command, ExecOptions::default()).await?;
    let ExecEnd::Exited(failed) = output else {
        return Ok(()); // without a time limit there is no other end
    };
    if failed.exit == Exit::Code(0) {
        return Ok(());
    }
    let as_root = ExecOptions {
        user: User::Root,
        ..ExecOptions::default()
    };
    let failed = match exec(vm, &remove, as_root).await {
        Ok(ExecEnd::Exited(output)) if output.exit != Exit::Code(0) => output,
        Ok(_) => return Ok(()),
        Err(VmError::User(_no_root)) => failed,
        Err(error) => return Err(error.into()),
    };
    let why = String::from_utf8_lossy(&failed.stderr);
    let problem = format!(
        "session {session} is not destroyed: its agent's state in the VM can't be deleted: {}",
        why.trim()
    );
    Err(Error::new(Code::from_errno(libc::EACCES), problem))
}

//! Directories of the host in a VM.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use agentvm::error::Error;
use agentvm::vm::exec::{ExecEnd, ExecOptions, exec};
use agentvm::vm::mount::HostMount;
use agentvm::vm::namespace::{BootOptions, boot};
use agentvm::vm::{DynVm, Exit, User};

use super::super::child::{block_on, in_child, unshare};
use super::{options, sh, stdout};

fn mount(path: &str, host_path: &Path) -> HostMount {
    HostMount::new(path, host_path, false).unwrap()
}

fn read_only(path: &str, host_path: &Path) -> HostMount {
    HostMount::new(path, host_path, true).unwrap()
}

fn with(data: &Path, mounts: Vec<HostMount>) -> BootOptions {
    BootOptions {
        mounts,
        private: vec![data.to_owned()],
        ..options(data, "a")
    }
}

async fn booted(data: &Path, mounts: Vec<HostMount>) -> DynVm {
    boot(with(data, mounts)).await.unwrap().vm
}

async fn refused(options: BootOptions) -> Error {
    Error::from(boot(options).await.err().expect("a refusal"))
}

async fn as_root(vm: &DynVm, command: &str) -> (Exit, String) {
    let options = ExecOptions {
        user: User::Root,
        ..ExecOptions::default()
    };
    match exec(vm, command, options).await.unwrap() {
        ExecEnd::Exited(output) => (
            output.exit,
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
        ),
        ExecEnd::TimedOut(_) => unreachable!("no time limit was given"),
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A directory of the host that everybody may go through, and a data directory.
fn world() -> (tempfile::TempDir, tempfile::TempDir) {
    let host = tempfile::tempdir().unwrap();
    fs::set_permissions(host.path(), fs::Permissions::from_mode(0o755)).unwrap();
    (host, tempfile::tempdir().unwrap())
}

#[tokio::test]
async fn what_the_vm_writes_is_owned_by_who_owns_the_directory() {
    let (host, data) = world();
    fs::write(host.path().join("given"), "from the host").unwrap();
    let vm = booted(data.path(), vec![mount("/work", host.path())]).await;
    let shown = stdout(&vm, "cat /work/given; stat -c ' %U %G' /work /work/given").await;
    assert_eq!(shown, "from the host user user\n user user\n");
    stdout(
        &vm,
        "echo new > /work/made; mkdir /work/dir; mv /work/made /work/dir; echo >> /work/given",
    )
    .await;
    vm.shutdown().await;
    let made = fs::metadata(host.path().join("dir/made")).unwrap();
    let owner = fs::metadata(host.path()).unwrap();
    assert_eq!((made.uid(), made.gid()), (owner.uid(), owner.gid()));
}

#[tokio::test]
async fn a_directory_of_another_user_of_the_host_is_the_vms_users_on_a_root_host() {
    if !is_root() {
        return;
    }
    let (host, data) = world();
    let project = host.path().join("project");
    fs::create_dir(&project).unwrap();
    fs::write(project.join("roots"), "").unwrap();
    chown(&project, Some(4321), Some(8765)).unwrap();
    let vm = booted(data.path(), vec![mount("/work", &project)]).await;
    let shown = stdout(&vm, "touch /work/made; stat -c %U /work /work/roots").await;
    assert_eq!(shown, "user\nnobody\n");
    let (_, owner) = as_root(&vm, "touch /work/by-root; stat -c %U /work/by-root").await;
    assert_eq!(owner, "root\n");
    vm.shutdown().await;
    let made = fs::metadata(project.join("made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (4321, 8765));
    // Neither the host's root nor anybody else of the host.
    let by_root = fs::metadata(project.join("by-root")).unwrap();
    assert!(by_root.uid() > 1_000_000_000, "{}", by_root.uid());
}

#[tokio::test]
async fn nothing_can_be_written_to_a_read_only_mount() {
    let (host, data) = world();
    fs::write(host.path().join("file"), "kept").unwrap();
    let vm = booted(data.path(), vec![read_only("/work", host.path())]).await;
    assert_eq!(stdout(&vm, "cat /work/file").await, "kept");
    let write = "touch /work/new || echo > /work/file || rm -f /work/file || chmod 777 /work";
    assert_ne!(sh(&vm, write).await.exit, Exit::Code(0));
    if is_root() {
        assert_ne!(as_root(&vm, write).await.0, Exit::Code(0));
    }
    vm.shutdown().await;
    assert_eq!(
        fs::read_to_string(host.path().join("file")).unwrap(),
        "kept"
    );
}

#[tokio::test]
async fn a_single_file_can_be_mounted() {
    let (host, data) = world();
    let file = host.path().join("settings");
    fs::write(&file, "text").unwrap();
    let vm = booted(
        data.path(),
        vec![mount("/home/user/.config/tool/rc", &file)],
    )
    .await;
    let shown = stdout(
        &vm,
        "cat .config/tool/rc; stat -c ' %U' .config .config/tool; echo more > .config/tool/rc",
    )
    .await;
    assert_eq!(shown, "text user\n user\n");
    vm.shutdown().await;
    assert_eq!(fs::read_to_string(&file).unwrap(), "more\n");
}

#[tokio::test]
async fn links_lead_out_of_a_mount_only_to_the_vms_own_files() {
    let (host, data) = world();
    let secret = host.path().join("secret");
    fs::write(&secret, "of the host").unwrap();
    let work = host.path().join("work");
    fs::create_dir(&work).unwrap();
    symlink(&secret, work.join("absolute")).unwrap();
    symlink("../secret", work.join("relative")).unwrap();
    symlink("../..", work.join("up")).unwrap();
    let vm = booted(data.path(), vec![mount("/work", &work)]).await;
    let reach = "cd /work; cat absolute || cat relative || cat up/secret || cat ../secret || \
                 ln ../secret hard || find /work -name secret | grep .";
    assert_ne!(sh(&vm, reach).await.exit, Exit::Code(0));
    vm.shutdown().await;
}

#[tokio::test]
async fn a_directory_that_the_host_moves_away_gives_no_way_out() {
    let (host, data) = world();
    fs::write(host.path().join("secret"), "of the host").unwrap();
    fs::create_dir_all(host.path().join("work/deep")).unwrap();
    let vm = booted(data.path(), vec![mount("/work", &host.path().join("work"))]).await;
    stdout(
        &vm,
        "mkfifo /work/go; (cd /work/deep; cat /work/go; cat ../secret > /tmp/out 2>&1; echo > /tmp/done) \
         > /dev/null 2>&1 & \
         until [ \"$(readlink /proc/$!/cwd)\" = /work/deep ]; do :; done",
    )
    .await;
    fs::rename(host.path().join("work/deep"), host.path().join("deep")).unwrap();
    let out = stdout(
        &vm,
        "echo > /work/go; until [ -e /tmp/done ]; do :; done; cat /tmp/out",
    )
    .await;
    assert!(!out.contains("of the host"), "{out}");
    vm.shutdown().await;
}

#[tokio::test]
async fn nothing_becomes_setuid_in_a_vm_that_can_write_to_the_host() {
    let (host, data) = world();
    let vm = booted(data.path(), vec![mount("/work", host.path())]).await;
    let attempts = "cd /work; cp /bin/true t; chmod 755 t; \
        chmod u+s t; chmod g+s t; chmod 4755 t; install -m 4755 /bin/true i; \
        perl -e 'use Fcntl; sysopen(F, \"p\", O_CREAT|O_WRONLY, 04755); umask 0; mkdir \"d\", 02755; \
                 chmod 02755, \"d\"; syscall(437, -100, \"q\", pack(\"QQQ\", 0101, 06755, 0), 24)'; \
        mknod -m 4755 f p; exit 0";
    stdout(&vm, attempts).await;
    if is_root() {
        as_root(&vm, attempts).await;
    }
    vm.shutdown().await;
    assert!(host.path().join("t").exists());
    for entry in fs::read_dir(host.path()).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().mode();
        assert_eq!(mode & 0o6000, 0, "{:?} {mode:o}", entry.file_name());
    }
}

#[tokio::test]
async fn a_setuid_program_of_the_host_that_the_vm_writes_to_is_setuid_no_more() {
    let (host, data) = world();
    let programs = ["by-user", "by-root"].map(|name| host.path().join(name));
    for program in &programs {
        fs::write(program, "").unwrap();
        fs::set_permissions(program, fs::Permissions::from_mode(0o6755)).unwrap();
    }
    let vm = booted(data.path(), vec![mount("/work", host.path())]).await;
    stdout(&vm, "echo x >> /work/by-user").await;
    if is_root() {
        as_root(&vm, "echo x >> /work/by-root").await;
    }
    vm.shutdown().await;
    for program in &programs[..if is_root() { 2 } else { 1 }] {
        let metadata = fs::metadata(program).unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o7777), (2, 0o755));
    }
}

#[tokio::test]
async fn device_nodes_and_setuid_programs_of_the_host_are_only_files() {
    if !is_root() {
        return;
    }
    let (host, data) = world();
    let node = host.path().join("zero");
    let device = nix::sys::stat::makedev(1, 5);
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o666);
    nix::sys::stat::mknod(&node, nix::sys::stat::SFlag::S_IFCHR, mode, device).unwrap();
    let vm = booted(data.path(), vec![mount("/work", host.path())]).await;
    assert_ne!(sh(&vm, "head -c1 /work/zero").await.exit, Exit::Code(0));
    let (exit, _) = as_root(&vm, "mknod /work/mine c 1 5").await;
    assert_ne!(exit, Exit::Code(0));
    vm.shutdown().await;
}

#[tokio::test]
async fn a_mount_that_holds_the_data_directory_shows_it_empty() {
    let (host, _) = world();
    let data = host.path().join("project/state/agentvm");
    fs::create_dir_all(&data).unwrap();
    fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).unwrap();
    let vm = booted(&data, vec![mount("/work", host.path())]).await;
    assert_eq!(stdout(&vm, "ls -A /work/project/state/agentvm").await, "");
    // Nor can it be moved to where the next boot would not find it.
    for from in ["project/state/agentvm", "project/state", "project"] {
        let moved = sh(&vm, &format!("mv /work/{from} /work/elsewhere")).await;
        assert_ne!(moved.exit, Exit::Code(0), "{from}");
    }
    let written = sh(&vm, "touch /work/project/state/agentvm/x").await;
    assert_ne!(written.exit, Exit::Code(0));
    stdout(&vm, "touch /work/project/state/other").await;
    vm.shutdown().await;
    assert!(data.join("vms/a/vm.json").exists());
}

#[tokio::test]
async fn a_store_that_is_not_there_yet_can_not_be_made_by_the_vm() {
    let (home, data) = world();
    let store = home.path().join(".cache/agentvm/agents");
    let options = BootOptions {
        private: vec![data.path().to_owned(), store.clone()],
        ..with(data.path(), vec![mount("/home/user/host", home.path())])
    };
    let vm: DynVm = boot(options).await.unwrap().vm;
    assert!(store.is_dir());
    let planted = sh(
        &vm,
        "mkdir -p host/.cache/agentvm/agents/node && exit 0; mv host/.cache/agentvm host/x && exit 0; \
         exit 1",
    )
    .await;
    assert_eq!(planted.exit, Exit::Code(1));
    // What the host puts there later is not seen.
    fs::write(store.join("later"), "").unwrap();
    assert_eq!(stdout(&vm, "ls -A host/.cache/agentvm/agents").await, "");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_store_elsewhere_is_not_made_for_a_mount() {
    let (host, data) = world();
    let store = data.path().join("cache/agents");
    let options = BootOptions {
        private: vec![store.clone()],
        ..with(data.path(), vec![mount("/work", host.path())])
    };
    let vm: DynVm = boot(options).await.unwrap().vm;
    vm.shutdown().await;
    assert!(!store.exists());
}

#[tokio::test]
async fn a_mount_in_the_data_directory_is_refused_by_whatever_name() {
    let (host, data) = world();
    let link = host.path().join("link");
    symlink(data.path(), &link).unwrap();
    for path in [
        data.path().to_owned(),
        data.path().join("vms"),
        data.path().join("vms/a/home"),
        link.join("vms"),
    ] {
        let error = refused(with(data.path(), vec![read_only("/work", &path)])).await;
        assert_eq!(error.code.as_str(), "INVALID_ARGUMENT", "{error}");
        assert!(error.message.contains("mounts[0].hostPath"), "{error}");
    }
}

#[test]
fn a_bind_mount_is_no_way_around_the_data_directory() {
    // A mount of its own, for this test alone.
    in_child(
        &unshare(&["--mount"]),
        "vm::mounts::a_bind_mount_is_no_way_around_the_data_directory",
        || {
            let (host, outer) = world();
            let data = outer.path().join("data");
            let second = host.path().join("second");
            fs::create_dir(&data).unwrap();
            fs::create_dir(&second).unwrap();
            let none: Option<&str> = None;
            nix::mount::mount(
                Some(outer.path()),
                &second,
                none,
                nix::mount::MsFlags::MS_BIND,
                none,
            )
            .unwrap();
            block_on(async {
                let vm = booted(&data, vec![read_only("/work", &second)]).await;
                assert_eq!(stdout(&vm, "ls -A /work/data").await, "");
                vm.shutdown().await;
                let inside = vec![read_only("/work", &second.join("data/vms"))];
                let error = refused(with(&data, inside)).await;
                assert_eq!(error.code.as_str(), "INVALID_ARGUMENT", "{error}");
            });
            nix::mount::umount2(&second, nix::mount::MntFlags::MNT_DETACH).unwrap();
        },
    );
}

#[tokio::test]
async fn the_hosts_root_shows_neither_its_processes_nor_the_data_directory() {
    let (_, data) = world();
    let vm = booted(data.path(), vec![read_only("/host", Path::new("/"))]).await;
    assert_eq!(
        stdout(&vm, "ls -A /host/proc /host/sys").await,
        "/host/proc:\n\n/host/sys:\n"
    );
    let pid = std::process::id();
    assert_ne!(
        sh(&vm, &format!("cat /host/proc/{pid}/environ")).await.exit,
        Exit::Code(0)
    );
    stdout(&vm, "cat /host/etc/passwd").await;
    let hidden = format!("/host{}", data.path().display());
    assert_eq!(stdout(&vm, &format!("ls -A {hidden}")).await, "");
    vm.shutdown().await;
}

#[tokio::test]
async fn windows_on_the_kernel_can_not_be_mounted() {
    let (_, data) = world();
    for path in ["/proc", "/proc/self/net", "/sys", "/sys/kernel"] {
        let error = refused(with(data.path(), vec![read_only("/work", Path::new(path))])).await;
        assert_eq!(error.code.as_str(), "INVALID_ARGUMENT", "{error}");
    }
    let null = refused(with(
        data.path(),
        vec![mount("/work", Path::new("/dev/null"))],
    ))
    .await;
    assert_eq!(null.code.as_str(), "INVALID_ARGUMENT", "{null}");
}

#[tokio::test]
async fn what_does_not_exist_is_enoent_and_leaves_the_vm_usable() {
    let (host, data) = world();
    let missing = host.path().join("missing");
    let error = refused(with(data.path(), vec![mount("/work", &missing)])).await;
    assert_eq!(error.code.as_str(), "ENOENT");
    assert!(error.message.contains("mounts[0].hostPath"), "{error}");
    assert!(error.message.contains("missing"), "{error}");
    booted(data.path(), Vec::new()).await.shutdown().await;
}

#[tokio::test]
async fn a_mount_point_that_is_a_symlink_in_the_vm_is_not_followed() {
    let (host, data) = world();
    let vm = booted(data.path(), Vec::new()).await;
    stdout(&vm, "ln -s /tmp work; touch file").await;
    vm.shutdown().await;
    for (point, code) in [
        ("/home/user/work", "ELOOP"),
        ("/home/user/work/x", "ELOOP"),
        ("/home/user/file", "ENOTDIR"),
    ] {
        let error = refused(with(data.path(), vec![mount(point, host.path())])).await;
        assert_eq!(error.code.as_str(), code, "{error}");
        assert!(error.message.contains(point), "{error}");
    }
}

#[tokio::test]
async fn a_mount_in_a_mount_lies_on_top_whatever_the_order() {
    let (host, data) = world();
    let (outer, inner) = (host.path().join("outer"), host.path().join("inner"));
    fs::create_dir(&outer).unwrap();
    fs::create_dir(&inner).unwrap();
    fs::write(inner.join("file"), "inner").unwrap();
    let mounts = vec![read_only("/work/sub", &inner), mount("/work", &outer)];
    let vm = booted(data.path(), mounts).await;
    assert_eq!(stdout(&vm, "cat /work/sub/file").await, "inner");
    assert_ne!(sh(&vm, "touch /work/sub/x").await.exit, Exit::Code(0));
    stdout(&vm, "touch /work/x").await;
    vm.shutdown().await;
}

#[tokio::test]
async fn a_symlink_that_the_vm_could_have_made_decides_nothing() {
    let (host, data) = world();
    let (outer, secret) = (host.path().join("outer"), host.path().join("secret"));
    fs::create_dir(&outer).unwrap();
    fs::create_dir(&secret).unwrap();
    symlink(&secret, outer.join("config")).unwrap();
    let mounts = vec![
        mount("/work", &outer),
        read_only("/config", &outer.join("config")),
    ];
    let error = refused(with(data.path(), mounts)).await;
    assert_eq!(error.code.as_str(), "INVALID_ARGUMENT");
    assert!(error.message.contains("mounts[1].hostPath"), "{error}");
}

/// A VM that can write to `work` plants a link to `target` there, and has ended.
async fn planted(data: &Path, work: &Path, target: &Path) {
    let vm = booted(data, vec![mount("/work", work)]).await;
    let plant = format!("ln -s {} /work/config", target.display());
    stdout(&vm, &plant).await;
    vm.shutdown().await;
}

#[tokio::test]
async fn a_symlink_that_a_vm_has_left_decides_no_later_mount() {
    let (host, data) = world();
    let (work, secret) = (host.path().join("work"), host.path().join("secret"));
    fs::create_dir(&work).unwrap();
    fs::create_dir(&secret).unwrap();
    planted(data.path(), &work, &secret).await;
    let link = work.join("config");
    for name in ["a", "another"] {
        let options = BootOptions {
            mounts: vec![read_only("/config", &link)],
            ..options(data.path(), name)
        };
        let error = refused(options).await;
        assert_eq!(error.code.as_str(), "INVALID_ARGUMENT");
        for named in ["mounts[0].hostPath", "work/config", "pass the path"] {
            assert!(error.message.contains(named), "{error}");
        }
    }
    // What it leads to is the caller's to mount.
    let vm = booted(data.path(), vec![read_only("/config", &secret)]).await;
    vm.shutdown().await;
}

#[tokio::test]
async fn another_name_of_a_writable_mount_is_no_way_around_its_symlinks() {
    let (host, data) = world();
    let (work, secret) = (host.path().join("work"), host.path().join("secret"));
    fs::create_dir(&work).unwrap();
    fs::create_dir(&secret).unwrap();
    planted(data.path(), &work, &secret).await;
    symlink("work", host.path().join("alias")).unwrap();
    let through_alias = host.path().join("alias/config");
    let error = refused(with(
        data.path(),
        vec![read_only("/config", &through_alias)],
    ))
    .await;
    assert_eq!(error.code.as_str(), "INVALID_ARGUMENT");
    fs::rename(&work, host.path().join("renamed")).unwrap();
    let renamed = host.path().join("renamed/config");
    let error = refused(with(data.path(), vec![read_only("/config", &renamed)])).await;
    assert_eq!(error.code.as_str(), "INVALID_ARGUMENT");
}

#[tokio::test]
async fn a_symlink_in_a_vms_own_files_decides_no_mount() {
    let (host, data) = world();
    let vm = booted(data.path(), Vec::new()).await;
    stdout(&vm, &format!("ln -s {} link", host.path().display())).await;
    vm.shutdown().await;
    let link = data.path().join("vms/a/home/link");
    let error = refused(with(data.path(), vec![read_only("/work", &link)])).await;
    assert_eq!(error.code.as_str(), "INVALID_ARGUMENT");
    assert!(error.message.contains("symlink"), "{error}");
}

#[tokio::test]
async fn symlinks_that_no_vm_could_have_made_are_followed() {
    let (host, data) = world();
    let (work, shared) = (host.path().join("work"), host.path().join("shared"));
    fs::create_dir(&work).unwrap();
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("file"), "shared").unwrap();
    symlink("shared", host.path().join("current")).unwrap();
    let mounts = || {
        vec![
            mount("/work", &work),
            read_only("/shared", &host.path().join("current")),
            read_only("/same", &work.join("../shared")),
        ]
    };
    for _ in 0..2 {
        let vm = booted(data.path(), mounts()).await;
        let shown = stdout(&vm, "cat /shared/file /same/file").await;
        assert_eq!(shown, "sharedshared");
        vm.shutdown().await;
    }
}

fn mount_tmpfs(point: &Path) {
    let (tmpfs, flags) = (Some("tmpfs"), nix::mount::MsFlags::empty());
    nix::mount::mount(tmpfs, point, tmpfs, flags, None::<&str>).unwrap();
}

#[test]
fn a_vm_neither_unmounts_nor_moves_what_the_host_has_mounted_in_a_mount() {
    in_child(
        &unshare(&["--mount"]),
        "vm::mounts::a_vm_neither_unmounts_nor_moves_what_the_host_has_mounted_in_a_mount",
        || {
            let (host, data) = world();
            let work = host.path().join("work");
            let point = work.join("deep/point");
            fs::create_dir_all(&point).unwrap();
            mount_tmpfs(&point);
            fs::write(point.join("file"), "mounted").unwrap();
            block_on(async {
                let vm = booted(data.path(), vec![mount("/work", &work)]).await;
                assert_eq!(stdout(&vm, "ls -A /work/deep/point").await, "");
                for attempt in ["rmdir deep/point", "mv deep/point x", "mv deep x"] {
                    let done = sh(&vm, &format!("cd /work && {attempt}")).await;
                    assert_ne!(done.exit, Exit::Code(0), "{attempt}");
                }
                stdout(&vm, "touch /work/deep/beside").await;
                vm.shutdown().await;
            });
            assert_eq!(fs::read_to_string(point.join("file")).unwrap(), "mounted");
            nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH).unwrap();
        },
    );
}

/// In a directory that its owner may search, and PID 1 may not, because its group is nobody's in the VM.
#[test]
fn what_is_mounted_where_only_the_owner_gets_stays_mounted() {
    const TEST: &str = "vm::mounts::what_is_mounted_where_only_the_owner_gets_stays_mounted";
    if !is_root() {
        return; // An ordinary user's VM has a clone of what is mounted, and not the mount itself.
    }
    in_child(&unshare(&["--mount"]), TEST, || {
        let (host, data) = world();
        let (work, owner, group) = (host.path().join("work"), Some(1234), Some(4321));
        let point = work.join("between/inner/point");
        fs::create_dir_all(&point).unwrap();
        for directory in [host.path(), &work, &work.join("between/inner"), &point] {
            chown(directory, owner, owner).unwrap();
        }
        chown(work.join("between"), owner, group).unwrap();
        mount_tmpfs(&point);
        fs::write(point.join("file"), "mounted").unwrap();
        let mode = |mode| {
            fs::set_permissions(work.join("between"), fs::Permissions::from_mode(mode)).unwrap();
        };
        block_on(async {
            mode(0o750);
            let vm = booted(data.path(), vec![mount("/work", &work)]).await;
            assert_eq!(stdout(&vm, "ls -A /work/between/inner/point").await, "");
            for attempt in ["rmdir inner/point", "mv inner/point x", "mv inner x"] {
                let done = sh(&vm, &format!("cd /work/between && {attempt}")).await;
                assert_ne!(done.exit, Exit::Code(0), "{attempt}");
            }
            vm.shutdown().await;
            mode(0);
            let error = refused(with(data.path(), vec![mount("/work", &work)])).await;
            assert!(error.message.contains("chmod u+x"), "{error}");
        });
        assert_eq!(fs::read_to_string(point.join("file")).unwrap(), "mounted");
        nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH).unwrap();
    });
}

#[tokio::test]
async fn many_hidden_directories_need_few_mounts() {
    let (host, data) = world();
    let mut private = vec![data.path().to_owned()];
    for number in 0..12 {
        let path = host.path().join(format!("a/b/c/d/{number}"));
        fs::create_dir_all(&path).unwrap();
        private.push(path);
    }
    let options = BootOptions {
        private,
        ..with(data.path(), vec![mount("/work", host.path())])
    };
    let vm: DynVm = boot(options).await.unwrap().vm;
    let mounts = stdout(&vm, "grep -c ' /work' /proc/self/mountinfo").await;
    // The mount, four directories that lead there, and the covers.
    assert_eq!(mounts, "17\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_link_that_the_vms_root_has_put_into_its_layer_leads_to_nothing_of_the_host() {
    if !is_root() {
        return;
    }
    for replaced in ["/usr/lib/agentvm/etc", "/usr/lib/agentvm/srv"] {
        let (host, data) = world();
        fs::write(host.path().join("of-the-host"), "").unwrap();
        let vm = booted(data.path(), Vec::new()).await;
        let target = host.path().display();
        let replace = format!("mv {replaced} {replaced}.away && ln -s {target} {replaced}");
        let (exit, output) = as_root(&vm, &replace).await;
        assert_eq!(exit, Exit::Code(0), "{output}");
        vm.shutdown().await;
        let error = refused(with(data.path(), Vec::new())).await;
        assert!(error.message.contains("symbolic links"), "{error}");
    }
}

#[tokio::test]
async fn what_is_shown_below_opt_is_not_for_the_vms_root_to_move() {
    if !is_root() {
        return;
    }
    let (_, data) = world();
    for _ in 0..2 {
        let vm = booted(data.path(), Vec::new()).await;
        let (exit, _) = as_root(&vm, "mv /opt/agentvm /opt/away").await;
        assert_ne!(exit, Exit::Code(0));
        let (_, listed) = as_root(&vm, "ls /opt/agentvm; ls -d /var/lib/dpkg/status").await;
        assert_eq!(listed, "agents\ndpkg\n/var/lib/dpkg/status\n");
        vm.shutdown().await;
    }
}

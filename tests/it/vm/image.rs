//! VMs on the files of an image, which here are programs of the host with what they are linked to.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use agentvm::error::Error;
use agentvm::net::secrets::{Secret, SecretOptions, Secrets};
use agentvm::vm::exec::{ExecOptions, exec};
use agentvm::vm::mount::HostMount;
use agentvm::vm::namespace::boot;
use agentvm::vm::{DynVm, Image, User};

use super::{options, sh, stdout};

const PROGRAMS: [&str; 10] = [
    "sh", "cat", "env", "id", "ln", "ls", "mkdir", "rm", "stat", "chmod",
];

/// A root file system at `<data>/<name>`.
fn rootfs(data: &Path, name: &str) -> PathBuf {
    let root = data.join(name);
    let programs: Vec<_> = PROGRAMS
        .iter()
        .map(|name| Path::new("/bin").join(name))
        .collect();
    let linked = Command::new("ldd").args(&programs).output().unwrap();
    let linked = String::from_utf8(linked.stdout).unwrap();
    let libraries: BTreeSet<_> = linked
        .split_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(PathBuf::from)
        .collect();
    for file in programs.iter().chain(&libraries) {
        let to = root.join(file.strip_prefix("/").unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, to).unwrap();
    }
    for directory in ["etc", "var/lib/own", "root", "tmp"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::write(root.join("etc/os-release"), "ID=of-the-image\n").unwrap();
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nsomebody:x:7:7::/:/bin/sh",
    )
    .unwrap();
    fs::write(root.join("var/lib/own/data"), "kept by the image\n").unwrap();
    fs::set_permissions(&root, Permissions::from_mode(0o755)).unwrap();
    root
}

fn image(rootfs: PathBuf) -> Image {
    let env = [("PATH", "/opt/own:/bin"), ("OWN", "of the image")];
    Image {
        id: format!("rootfs {}", rootfs.display()),
        source: String::new(),
        rootfs,
        is_directory: false,
        env: env
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec(),
    }
}

async fn try_boot(data: &Path, name: &str, image: Option<Image>) -> Result<DynVm, Error> {
    let options = agentvm::vm::namespace::BootOptions {
        image,
        ..options(data, name)
    };
    Ok(boot(options).await?.vm)
}

async fn on(data: &Path, name: &str, rootfs: &Path) -> DynVm {
    try_boot(data, name, Some(image(rootfs.to_owned())))
        .await
        .unwrap()
}

#[tokio::test]
async fn a_vm_has_the_images_files_and_none_of_the_hosts() {
    let data = tempfile::tempdir().unwrap();
    let root = rootfs(data.path(), "rootfs");
    let vm = on(data.path(), "a", &root).await;
    assert_eq!(
        stdout(&vm, "cat /etc/os-release /var/lib/own/data").await,
        "ID=of-the-image\nkept by the image\n"
    );
    assert_eq!(stdout(&vm, "id -un; pwd").await, "user\n/home/user\n");
    assert_eq!(
        stdout(&vm, "cat /etc/resolv.conf /etc/hostname").await,
        "nameserver 127.0.0.53\nagentvm\n"
    );
    let passwd = stdout(&vm, "cat /etc/passwd").await;
    assert_eq!(
        passwd,
        "root:x:0:0:root:/root:/bin/sh\nsomebody:x:7:7::/:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n"
    );
    assert_eq!(
        stdout(&vm, "ls /proc/1/cwd/ 2>&1 || echo no").await,
        "ls: cannot access '/proc/1/cwd/': Permission denied\nno\n"
    );
    assert!(
        !sh(&vm, "ls /usr/share")
            .await
            .exit
            .eq(&agentvm::vm::Exit::Code(0))
    );
    vm.shutdown().await;
}

#[tokio::test]
async fn what_a_vm_writes_over_an_image_is_kept_and_its_own() {
    let data = tempfile::tempdir().unwrap();
    let root = rootfs(data.path(), "rootfs");
    let is_root = nix_is_root();
    let user = if is_root { User::Root } else { User::User };
    let change = "echo changed > /etc/os-release; rm /var/lib/own/data; mkdir /new; echo home > /home/user/f";
    let run = |vm: DynVm| async move {
        let options = ExecOptions {
            user,
            ..ExecOptions::default()
        };
        exec(&vm, change, options).await.unwrap();
    };
    let vm = on(data.path(), "a", &root).await;
    run(vm.clone()).await;
    vm.shutdown().await;

    let vm = on(data.path(), "a", &root).await;
    let seen = "cat /etc/os-release /home/user/f; ls /var/lib/own; ls -d /new";
    assert_eq!(stdout(&vm, seen).await, "changed\nhome\n/new\n");
    let other = on(data.path(), "b", &root).await;
    assert_eq!(
        stdout(&other, "cat /etc/os-release").await,
        "ID=of-the-image\n"
    );
    assert_eq!(
        stdout(&other, "ls /home/user; ls -d /new || echo none").await,
        "none\n"
    );
    vm.shutdown().await;
    other.shutdown().await;
    assert!(root.join("var/lib/own/data").exists());
    assert!(!root.join("new").exists());
    let owner = fs::metadata(&root).unwrap().uid();
    assert_eq!(
        owner,
        nix::unistd::geteuid().as_raw(),
        "the image is not touched"
    );
}

fn nix_is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[tokio::test]
async fn the_environment_of_an_image_is_below_the_callers() {
    let data = tempfile::tempdir().unwrap();
    let vm = on(data.path(), "a", &rootfs(data.path(), "rootfs")).await;
    assert_eq!(
        stdout(&vm, "echo $PATH $OWN $HOME").await,
        "/home/user/.local/bin:/home/user/.cargo/bin:/opt/own:/bin of the image /home/user\n"
    );
    let options = ExecOptions {
        env: vec![("OWN".to_owned(), "mine".to_owned())],
        ..ExecOptions::default()
    };
    let end = exec(&vm, "echo $OWN", options).await.unwrap();
    assert!(
        format!("{end:?}").contains(&format!("{:?}", b"mine\n")),
        "{end:?}"
    );
    vm.shutdown().await;
}

#[tokio::test]
async fn a_vm_boots_on_no_other_image_than_it_was_made_with() {
    let data = tempfile::tempdir().unwrap();
    let data = data.path();
    let (one, two) = (rootfs(data, "one"), rootfs(data, "two"));
    on(data, "a", &one).await.shutdown().await;
    for other in [Some(image(two.clone())), None] {
        let error = try_boot(data, "a", other).await.err().unwrap();
        assert_eq!(error.code.as_str(), "IMAGE_MISMATCH");
        assert!(error.message.contains("destroy()"), "{error}");
    }
    on(data, "a", &one).await.shutdown().await;

    super::booted(data, "b").await.shutdown().await;
    let error = try_boot(data, "b", Some(image(one))).await.err().unwrap();
    assert!(error.message.contains("the host's programs"), "{error}");
}

#[tokio::test]
async fn a_link_leads_nothing_of_the_boot_to_the_host() {
    for link in [
        "etc", "home", "opt", "proc", "dev", "tmp", "run", "var", "var/lib",
    ] {
        let data = tempfile::tempdir().unwrap();
        let victim = data.path().join("victim");
        fs::create_dir(&victim).unwrap();
        fs::set_permissions(&victim, Permissions::from_mode(0o777)).unwrap();
        let put = |at: PathBuf| {
            let _ = fs::remove_dir_all(&at);
            fs::create_dir_all(at.parent().unwrap()).unwrap();
            symlink(&victim, at).unwrap();
        };
        // Of the image, and written over it by the VM.
        let bad = rootfs(data.path(), "bad");
        put(bad.join(link));
        let good = rootfs(data.path(), "good");
        on(data.path(), "b", &good).await.shutdown().await;
        put(options(data.path(), "b")
            .dir
            .join("layers/upper")
            .join(link));
        for (key, root) in [("a", bad), ("b", good)] {
            let booted = try_boot(data.path(), key, Some(image(root))).await;
            let error = booted.err().unwrap();
            assert_eq!(error.code.as_str(), "IMAGE_INVALID", "{link}: {error}");
            assert!(error.message.contains("symbolic link"), "{link}: {error}");
            assert!(
                error.message.contains(&format!("/{link}")),
                "{link}: {error}"
            );
            assert_eq!(fs::read_dir(&victim).unwrap().count(), 0, "{link}");
        }
    }
}

#[tokio::test]
async fn an_image_that_has_never_booted_does_not_stay_with_the_vm() {
    let data = tempfile::tempdir().unwrap();
    // The boot comes as far as the accounts, and has files of the VM in the layer by then.
    let bad = rootfs(data.path(), "bad");
    fs::remove_file(bad.join("etc/passwd")).unwrap();
    fs::create_dir(bad.join("etc/passwd")).unwrap();
    let error = try_boot(data.path(), "a", Some(image(bad))).await;
    let error = error.err().unwrap();
    assert_eq!(error.code.as_str(), "IMAGE_INVALID", "{error}");
    assert!(error.message.contains("/etc/passwd"), "{error}");
    let good = rootfs(data.path(), "good");
    let vm = on(data.path(), "a", &good).await;
    assert_eq!(stdout(&vm, "id -un").await, "user\n");
    vm.shutdown().await;

    let mut other = options(data.path(), "b");
    other.image = Some(image(data.path().join("bad")));
    assert!(boot(other).await.is_err());
    super::booted(data.path(), "b").await.shutdown().await;
}

#[tokio::test]
async fn an_ordinary_user_is_told_to_own_the_files_of_an_image() {
    if nix_is_root() {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    // Root's, as what debootstrap makes.
    let error = try_boot(data.path(), "a", Some(image("/usr".into()))).await;
    let error = error.err().unwrap();
    assert_eq!(error.code.as_str(), "IMAGE_INVALID", "{error}");
    assert!(error.message.contains("belongs to uid 0"), "{error}");
    assert!(error.message.contains("chown"), "{error}");
}

#[tokio::test]
async fn a_file_of_the_vms_replaces_a_link_of_the_image() {
    let data = tempfile::tempdir().unwrap();
    let root = rootfs(data.path(), "rootfs");
    let victim = data.path().join("victim");
    fs::write(&victim, "untouched").unwrap();
    fs::set_permissions(&victim, Permissions::from_mode(0o666)).unwrap();
    symlink(&victim, root.join("etc/resolv.conf")).unwrap();
    let vm = on(data.path(), "a", &root).await;
    assert_eq!(
        stdout(&vm, "cat /etc/resolv.conf").await,
        "nameserver 127.0.0.53\n"
    );
    vm.shutdown().await;
    assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
}

#[tokio::test]
async fn a_vm_with_secrets_trusts_whom_its_image_trusts_and_one_more() {
    let data = tempfile::tempdir().unwrap();
    let secret = SecretOptions {
        value: "the value".to_owned().into(),
        hosts: vec!["api.example.com".to_owned()],
        headers: None,
        query: Vec::new(),
        placeholder: None,
    };
    let secret = Secret::new("KEY", secret).unwrap();
    let secrets = Secrets::new(vec![secret]).unwrap();
    let bundle = "etc/ssl/certs/ca-certificates.crt";
    for (name, content) in [("own", Some("of the image")), ("none", None)] {
        let root = rootfs(data.path(), name);
        if let Some(content) = content {
            fs::create_dir_all(root.join("etc/ssl/certs")).unwrap();
            fs::write(root.join(bundle), content).unwrap();
        }
        let options = agentvm::vm::namespace::BootOptions {
            image: Some(image(root)),
            secrets: secrets.clone(),
            ..options(data.path(), name)
        };
        let vm: DynVm = boot(options).await.unwrap().vm;
        let own = stdout(&vm, "cat $NODE_EXTRA_CA_CERTS").await;
        assert!(own.starts_with("-----BEGIN CERTIFICATE-----"), "{own}");
        let all = stdout(&vm, "cat $SSL_CERT_FILE").await;
        let others = all.strip_suffix(&own).unwrap();
        match content {
            Some(content) => assert_eq!(others, format!("{content}\n")),
            // The host's.
            None => assert_eq!(
                others,
                fs::read_to_string(Path::new("/").join(bundle)).unwrap()
            ),
        }
        vm.shutdown().await;
    }
}

#[tokio::test]
async fn an_exec_without_a_shell_says_so() {
    let data = tempfile::tempdir().unwrap();
    let root = rootfs(data.path(), "rootfs");
    fs::remove_file(root.join("bin/sh")).unwrap();
    let vm = on(data.path(), "a", &root).await;
    let error = exec(&vm, "true", ExecOptions::default()).await.unwrap_err();
    let error = Error::from(error);
    assert_eq!(error.code.as_str(), "ENOENT");
    assert!(error.message.contains("no /bin/sh"), "{error}");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_mount_lies_in_an_image_and_follows_none_of_its_links() {
    let data = tempfile::tempdir().unwrap();
    let host = tempfile::tempdir().unwrap();
    fs::set_permissions(host.path(), Permissions::from_mode(0o755)).unwrap();
    fs::write(host.path().join("file"), "of the host").unwrap();
    let root = rootfs(data.path(), "rootfs");
    symlink("/home", root.join("link")).unwrap();
    let at = |point: &str| agentvm::vm::namespace::BootOptions {
        image: Some(image(root.clone())),
        mounts: vec![HostMount::new(point, host.path(), false).unwrap()],
        ..options(data.path(), "a")
    };
    let vm: DynVm = boot(at("/srv/project")).await.unwrap().vm;
    let shown = stdout(&vm, "cat /srv/project/file; ln -s file /srv/project/made").await;
    assert_eq!(shown, "of the host");
    vm.shutdown().await;
    let made = fs::symlink_metadata(host.path().join("made")).unwrap();
    assert_eq!(made.uid(), fs::metadata(host.path()).unwrap().uid());
    for point in ["/link", "/link/project"] {
        let error = Error::from(boot(at(point)).await.err().expect("a refusal"));
        assert_eq!(error.code.as_str(), "ELOOP", "{error}");
        assert!(error.message.contains(point), "{error}");
    }
}

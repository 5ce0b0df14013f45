//! Layers of an image are anybody's archives: whatever they hold, nothing beside the directory that they
//! are unpacked to is made, changed or removed, and the bounds hold.

#![no_main]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use agentvm::images::Limits;
use agentvm::images::fuzzed::unpack;
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits {
    bytes: 1 << 20,
    entries: 64,
    min_free: 0,
};

/// `root` is unpacked to; `victim` is what links lead to.
static SCRATCH: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    };
    let scratch = place.join(format!("agentvm-fuzz-{}", std::process::id()));
    fs::create_dir_all(scratch.join("victim/sub")).expect("a scratch directory");
    fs::write(scratch.join("victim/file"), "untouched").expect("a file");
    scratch
});

fuzz_target!(|input: (u8, &[u8])| {
    let (kind, bytes) = input;
    let layers = match kind % 3 {
        0 => vec![bytes.to_vec()],
        1 => vec![with_checksums(bytes)],
        // One layer over the other.
        _ => bytes
            .splitn(3, |byte| *byte == u8::MAX)
            .map(archive)
            .collect(),
    };
    let root = SCRATCH.join("root");
    let unpacked = unpack(layers.iter().map(Vec::as_slice), &root, LIMITS);
    let (entries, bytes) = look(&root);
    assert!(entries <= LIMITS.entries, "{entries} entries: {unpacked:?}");
    assert!(bytes <= LIMITS.bytes, "{bytes} bytes: {unpacked:?}");
    fs::remove_dir_all(&root).expect("what was unpacked can be removed");
    assert_eq!(names(&SCRATCH), ["victim"]);
    assert_eq!(names(&SCRATCH.join("victim")), ["file", "sub"]);
    assert_eq!(names(&SCRATCH.join("victim/sub")), [] as [&str; 0]);
    let file = SCRATCH.join("victim/file");
    assert_eq!(fs::read(file).expect("there"), b"untouched");
});

/// Chance would hardly find the sum of a header.
fn with_checksums(bytes: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for block in bytes.chunks(512) {
        let mut header = tar::Header::new_old();
        header.as_mut_bytes()[..block.len()].copy_from_slice(block);
        if block.iter().any(|byte| *byte != 0) {
            header.set_cksum();
        }
        archive.extend_from_slice(header.as_bytes());
    }
    archive
}

/// Entries that are about the same few names, four bytes each: kind, name, link, length and mode.
fn archive(bytes: &[u8]) -> Vec<u8> {
    let victim = SCRATCH.join("victim");
    let victim = victim.to_str().expect("UTF-8");
    let names = [
        "a",
        "b",
        "a/b",
        "a/b/c",
        "b/a",
        "./a/",
        "",
        ".wh.a",
        ".wh.b",
        ".wh..wh..opq",
        "a/.wh..wh..opq",
        "a/.wh.b",
        "a/file",
        "a/sub",
        "..",
        "../victim/file",
        "a/../../x",
        ".wh...",
        "file",
        "sub/x",
        "b/file",
        "a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a",
    ];
    let relative = "../".repeat(20) + victim;
    let targets = [
        victim,
        &relative,
        "a",
        "b",
        ".",
        "..",
        "a/b",
        "/a",
        "victim",
        "../victim",
        "file",
    ];
    let mut archive = Vec::new();
    for entry in bytes.chunks_exact(4) {
        let pick = |from: &[&str], index: u8| from[usize::from(index) % from.len()].to_owned();
        let (name, target) = (pick(&names, entry[1]), pick(&targets, entry[2]));
        let mut header = tar::Header::new_gnu();
        let kind = b"0125SLKxg3467"[usize::from(entry[0]) % 13];
        header.set_entry_type(tar::EntryType::new(kind));
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        let length = target.len().min(old.linkname.len());
        old.linkname[..length].copy_from_slice(&target.as_bytes()[..length]);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_mode(if entry[3] & 1 == 0 { 0o7000 } else { 0o6755 });
        let content = vec![entry[3]; usize::from(entry[3]) * 8];
        header.set_size(content.len() as u64);
        header.set_cksum();
        archive.extend_from_slice(header.as_bytes());
        archive.extend_from_slice(&content);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive
}

/// Entries, and bytes of their content. There is nothing that would be more on the host than a file.
fn look(directory: &Path) -> (u64, u64) {
    let (mut entries, mut bytes) = (0, 0);
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let data = entry.metadata().expect("there");
        entries += 1;
        assert!(data.is_dir() || data.is_file() || data.is_symlink());
        assert!(data.is_symlink() || data.permissions().mode() & 0o6000 == 0);
        if data.is_dir() {
            let (more_entries, more_bytes) = look(&entry.path());
            entries += more_entries;
            bytes += more_bytes;
        } else if data.is_file() {
            bytes += data.len();
        }
    }
    (entries, bytes)
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    let mut names: Vec<_> = entries
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("UTF-8")
        })
        .collect();
    names.sort();
    names
}

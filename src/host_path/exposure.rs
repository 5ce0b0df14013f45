//! Where on the host VMs can write, or could before: what lies there decides nothing.
//!
//! The places that were ever mounted writable are in a file of the data directory, which is written
//! before a VM that can write there runs. Each is kept by three names, since none holds for ever: what
//! it is (device, inode, time of birth), its path in its file system, its path on the host.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use agentvm_guest::mountinfo::unescape;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use thiserror::Error;

use super::place::path_of;
use super::{Found, Identity, Link, Table, resolve};

/// In the data directory.
const RECORD: &str = "exposed";

/// As many places are kept apart. Beyond that, those in the same directory become that directory.
const MOST: usize = 1024;

const HEADER: &str = "# Directories of this host that VMs can write to, or could before. Symlinks in \
them are followed on the way to no mount, image, upload or download. Written by agentvm.\n";

#[derive(Debug, Error)]
pub enum Refused {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It says where the path leads.
    #[error(
        "{link:?} is a symlink that a VM could have made, in {place:?}: pass the path that it leads to"
    )]
    Link { link: PathBuf, place: PathBuf },
    #[error("can't use {path:?}, the record of what VMs could write to: {source}")]
    Record { path: PathBuf, source: io::Error },
}

impl From<Errno> for Refused {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// A directory that VMs can write to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spot {
    identity: Option<Identity>,
    device: String,
    in_file_system: PathBuf,
    path: PathBuf,
}

impl Spot {
    pub fn of(directory: &File, table: &Table) -> io::Result<Self> {
        let place = table.place(directory)?.ok_or(Errno::ESTALE)?;
        Ok(Self {
            identity: Some(Identity::of(directory)?),
            device: place.device,
            in_file_system: place.path,
            path: path_of(directory)?,
        })
    }

    /// Whether the directory of a symlink, where `at` is, lies in it.
    fn holds(&self, link: &Link, at: &Self) -> bool {
        self.identity.is_some_and(|own| link.way.contains(&own))
            || (self.device == at.device && at.in_file_system.starts_with(&self.in_file_system))
            || at.path.starts_with(&self.path)
    }

    /// Whether `other` need not be noted beside it.
    fn stands_for(&self, other: &Self) -> bool {
        self == other || (self.identity.is_none() && self.is_around(other))
    }

    /// By its paths.
    fn is_around(&self, other: &Self) -> bool {
        self.device == other.device
            && other.in_file_system.starts_with(&self.in_file_system)
            && other.path.starts_with(&self.path)
    }

    /// The directory that it is in.
    fn parent(&self) -> Option<Self> {
        Some(Self {
            identity: None,
            device: self.device.clone(),
            in_file_system: self.in_file_system.parent()?.to_owned(),
            path: self.path.parent()?.to_owned(),
        })
    }

    fn line(&self) -> String {
        let identity = self.identity.map_or_else(
            || "-".to_owned(),
            |Identity {
                 device,
                 inode,
                 born,
             }| format!("{device}:{inode}:{born}"),
        );
        let (place, path) = (escape(&self.in_file_system), escape(&self.path));
        format!("{identity} {} {place} {path}\n", self.device)
    }

    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let identity = std::str::from_utf8(fields.next()?).ok()?;
        let identity = if identity == "-" {
            None
        } else {
            let mut numbers = identity.split(':');
            Some(Identity {
                device: numbers.next()?.parse().ok()?,
                inode: numbers.next()?.parse().ok()?,
                born: numbers.next()?.parse().ok()?,
            })
        };
        let device = String::from_utf8(fields.next()?.to_vec()).ok()?;
        let path = |field| PathBuf::from(OsString::from_vec(unescape(field)));
        let in_file_system = path(fields.next()?);
        let path = path(fields.next()?);
        (fields.next().is_none() && path.is_absolute()).then_some(Self {
            identity,
            device,
            in_file_system,
            path,
        })
    }
}

/// As in `proc_pid_mountinfo(5)`. Bytes that are no text are escaped, too.
fn escape(path: &Path) -> String {
    let mut escaped = String::new();
    for byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_graphic() && *byte != b'\\' {
            escaped.push(char::from(*byte));
        } else {
            // Writing to a String can't fail.
            let _ = write!(escaped, "\\{byte:03o}");
        }
    }
    escaped
}

/// What of the host the VMs of a data directory can write to.
#[derive(Debug, Clone)]
pub struct Exposure {
    record: PathBuf,
    private: Vec<PathBuf>,
}

impl Exposure {
    /// `private`: the directories of agentvm itself, in which the files of VMs lie.
    #[must_use]
    pub fn new(data: &Path, private: Vec<PathBuf>) -> Self {
        Self {
            record: data.join(RECORD),
            private,
        }
    }

    /// Finds what is at a path, unless a VM could decide what that is.
    pub fn open(&self, path: &Path) -> Result<Found, Refused> {
        let found = resolve(path)?;
        self.check(&found, &[])?;
        Ok(found)
    }

    /// Refuses what was found through a symlink that a VM could have made; `beside`: where one is going
    /// to write. The record is read after the way was gone, so it names whoever could write meanwhile.
    pub fn check(&self, found: &Found, beside: &[Spot]) -> Result<(), Refused> {
        if found.links.is_empty() {
            return Ok(());
        }
        let table = Table::read()?;
        let mut spots = self.read()?;
        spots.extend_from_slice(beside);
        for path in &self.private {
            match resolve(path) {
                Ok(private) => spots.push(Spot::of(&private.descriptor, &table)?),
                // What is not there holds no link.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        for link in &found.links {
            let at = Spot::of(&link.directory, &table)?;
            if let Some(spot) = spots.iter().find(|spot| spot.holds(link, &at)) {
                return Err(Refused::Link {
                    link: at.path.join(&link.name),
                    place: spot.path.clone(),
                });
            }
        }
        Ok(())
    }

    /// Notes for ever, on the disk when this returns, that VMs can write to `spots`.
    pub fn add(&self, spots: Vec<Spot>) -> Result<(), Refused> {
        let is_known = |all: &[Spot], spot: &Spot| all.iter().any(|known| known.stands_for(spot));
        let known = self.read()?;
        if spots.iter().all(|spot| is_known(&known, spot)) {
            return Ok(());
        }
        let failed = |source| self.failed(source);
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.record.with_extension("lock"))
            .map_err(failed)?;
        // Against other processes: held while a few kilobytes are written.
        let _lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, errno)| failed(errno.into()))?;
        let mut all = self.read()?;
        for spot in spots {
            if !is_known(&all, &spot) {
                all.push(spot);
            }
        }
        fold(&mut all);
        self.write(&all).map_err(failed)
    }

    fn read(&self) -> Result<Vec<Spot>, Refused> {
        let text = match fs::read(&self.record) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            text => text.map_err(|error| self.failed(error))?,
        };
        let mut spots = Vec::new();
        for line in text.split(|byte| *byte == b'\n') {
            if !line.is_empty() && !line.starts_with(b"#") {
                let spot = Spot::parse(line).ok_or(io::ErrorKind::InvalidData);
                spots.push(spot.map_err(|kind| self.failed(kind.into()))?);
            }
        }
        Ok(spots)
    }

    fn write(&self, spots: &[Spot]) -> io::Result<()> {
        let partial = self.record.with_extension("partial");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&partial)?;
        let lines: String = spots.iter().map(Spot::line).collect();
        file.write_all(format!("{HEADER}{lines}").as_bytes())?;
        // A symlink that a VM has made may outlive a crash of the host.
        file.sync_all()?;
        fs::rename(&partial, &self.record)?;
        let directory = self.record.parent().unwrap_or(&self.record);
        File::open(directory)?.sync_all()
    }

    fn failed(&self, source: io::Error) -> Refused {
        Refused::Record {
            path: self.record.clone(),
            source,
        }
    }
}

/// Makes fewer of too many: the places in the directory that has most of them become that directory.
fn fold(spots: &mut Vec<Spot>) {
    while spots.len() > MOST {
        let parents: Vec<Option<Spot>> = spots.iter().map(Spot::parent).collect();
        let count = |parent: &Spot| {
            parents
                .iter()
                .flatten()
                .filter(|other| *other == parent)
                .count()
        };
        let Some(fullest) = parents.iter().flatten().max_by_key(|parent| count(parent)) else {
            return;
        };
        spots.retain(|spot| !fullest.is_around(spot));
        spots.push(fullest.clone());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct World {
        directory: tempfile::TempDir,
        exposure: Exposure,
    }

    impl World {
        /// With a data directory, a project that VMs can write to, and a secret that they can't see.
        fn new() -> Self {
            let directory = tempfile::tempdir().expect("a directory");
            for name in ["data", "project/deep", "secret"] {
                fs::create_dir_all(directory.path().join(name)).expect("mkdir");
            }
            let data = directory.path().join("data");
            Self {
                exposure: Exposure::new(&data, vec![data.clone()]),
                directory,
            }
        }

        fn at(&self, path: &str) -> PathBuf {
            self.directory.path().join(path)
        }

        fn spot(&self, path: &str) -> Spot {
            let found = resolve(&self.at(path)).expect("a place");
            Spot::of(&found.descriptor, &Table::read().expect("mounts")).expect("a spot")
        }

        fn expose(&self, path: &str) {
            self.exposure.add(vec![self.spot(path)]).expect("a record");
        }

        fn is_refused(&self, path: &str) -> bool {
            match self.exposure.open(&self.at(path)) {
                Ok(_) => false,
                Err(Refused::Link { .. }) => true,
                Err(error) => panic!("{path}: {error}"),
            }
        }
    }

    #[test]
    fn a_link_in_what_a_vm_could_write_to_decides_nothing() {
        let world = World::new();
        symlink("../../secret", world.at("project/deep/link")).expect("symlink");
        assert!(!world.is_refused("project/deep/link"));
        world.expose("project");
        assert!(world.is_refused("project/deep/link"));
        assert!(!world.is_refused("project/deep"));
        assert!(!world.is_refused("project/../secret"));
    }

    #[test]
    fn another_way_to_the_link_is_no_way_around() {
        let world = World::new();
        symlink("../secret", world.at("project/link")).expect("symlink");
        symlink(world.at("project"), world.at("alias")).expect("symlink");
        world.expose("project");
        assert!(!world.is_refused("alias"));
        assert!(world.is_refused("alias/link"));
        fs::rename(world.at("project"), world.at("renamed")).expect("rename");
        assert!(world.is_refused("renamed/link"));
    }

    #[test]
    fn a_link_beside_what_vms_can_write_to_is_followed() {
        let world = World::new();
        symlink("secret", world.at("link")).expect("symlink");
        world.expose("project");
        assert!(!world.is_refused("link"));
    }

    #[test]
    fn a_link_in_the_data_directory_decides_nothing() {
        let world = World::new();
        symlink("../secret", world.at("data/link")).expect("symlink");
        assert!(world.is_refused("data/link"));
    }

    #[test]
    fn what_is_noted_is_read_back_whatever_its_name() {
        let world = World::new();
        let name = OsString::from_vec(b"a \\ \n\xff".to_vec());
        fs::create_dir(world.directory.path().join(&name)).expect("mkdir");
        let found = resolve(&world.directory.path().join(&name)).expect("a place");
        let table = Table::read().expect("mounts");
        let spot = Spot::of(&found.descriptor, &table).expect("a spot");
        world.exposure.add(vec![spot.clone()]).expect("a record");
        world.exposure.add(vec![spot.clone()]).expect("a record");
        assert_eq!(world.exposure.read().expect("the record"), [spot]);
    }

    #[test]
    fn a_broken_record_lets_no_link_decide() {
        let world = World::new();
        symlink("secret", world.at("link")).expect("symlink");
        fs::write(world.at("data/exposed"), "what\n").expect("write");
        let refused = world
            .exposure
            .open(&world.at("link"))
            .expect_err("a refusal");
        assert!(matches!(refused, Refused::Record { .. }), "{refused}");
        assert!(world.exposure.open(&world.at("secret")).is_ok());
    }

    #[test]
    fn too_many_places_become_the_directory_that_they_are_in() {
        let spot = |path: &str| Spot {
            identity: None,
            device: "8:1".to_owned(),
            in_file_system: PathBuf::from(path),
            path: PathBuf::from(path),
        };
        let mut spots: Vec<_> = (0..MOST).map(|n| spot(&format!("/jobs/{n}"))).collect();
        spots.push(spot("/home/project"));
        fold(&mut spots);
        assert_eq!(spots, [spot("/home/project"), spot("/jobs")]);
    }
}

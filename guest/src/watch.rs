//! Watching for changes, with inotify.
//!
//! The kernel queues events for a worker, up to its own limit; a reader that is slow lets the worker wait,
//! and what is lost then is told as an overflow. What a program of the VM makes is seen as the VM sees it.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use agentvm_guest::protocol::Bytes;
use agentvm_guest::protocol::files::{Event, Record};
use nix::errno::Errno;
use nix::poll::PollTimeout;

use crate::files::{own_path, place};
use crate::tree::{self, Found};
use crate::worker::{Failure, Outcome, Output};

const MASK: u32 = libc::IN_CREATE
    | libc::IN_MODIFY
    | libc::IN_ATTRIB
    | libc::IN_DELETE
    | libc::IN_MOVED_FROM
    | libc::IN_MOVED_TO
    | libc::IN_DELETE_SELF
    | libc::IN_MOVE_SELF
    | libc::IN_EXCL_UNLINK;

/// For so long the second half of a move may come after the first: the kernel queues one right after the
/// other.
const HALF_OF_A_MOVE_MS: u16 = 20;

const BUFFER: usize = 64 * 1024;

struct Watch<'a> {
    inotify: OwnedFd,
    path: &'a [u8],
    recursive: bool,
    /// Where each watch descriptor is, relative to `path`.
    places: HashMap<i32, Bytes>,
    /// A move of which the second half has not come.
    moved: Option<Moved>,
    /// What was found, and told, in directories that are new: of what was made after they were watched the
    /// kernel has queued an event as well.
    told: HashSet<Bytes>,
}

struct Moved {
    cookie: u32,
    from: Bytes,
    directory: bool,
}

/// `struct inotify_event`.
struct Raw {
    watch: i32,
    mask: u32,
    cookie: u32,
    name: Bytes,
}

pub(crate) fn watch(path: &[u8], recursive: bool, output: &mut Output) -> Outcome {
    // SAFETY: takes flags; returns a new descriptor.
    let inotify = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
    let inotify = Errno::result(inotify)?;
    let mut watch = Watch {
        // SAFETY: the kernel has just returned this descriptor.
        inotify: unsafe { OwnedFd::from_raw_fd(inotify) },
        path,
        recursive,
        places: HashMap::new(),
        moved: None,
        told: HashSet::new(),
    };
    watch.add_all(None)?;
    output.say(&Record::Watching)?;
    output.flush();
    let mut buffer = vec![0; BUFFER];
    loop {
        let timeout = if watch.moved.is_some() {
            PollTimeout::from(HALF_OF_A_MOVE_MS)
        } else {
            PollTimeout::NONE
        };
        if !output.wait_for(&watch.inotify, timeout) {
            watch.give_up_move(output)?;
            output.flush();
            continue;
        }
        let length = match nix::unistd::read(&watch.inotify, &mut buffer) {
            Ok(length) => length,
            Err(Errno::EINTR | Errno::EAGAIN) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let mut rest = buffer.get(..length).unwrap_or_default();
        while let Some((raw, after)) = parse(rest) {
            rest = after;
            if !watch.handle(raw, output)? {
                return Ok(());
            }
        }
        if !watch.told.is_empty() && !output.wait_for(&watch.inotify, PollTimeout::ZERO) {
            // What was queued when it was told has come.
            watch.told.clear();
        }
        output.flush();
    }
}

fn parse(bytes: &[u8]) -> Option<(Raw, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<16>()?;
    let word = |at: usize| -> Option<[u8; 4]> { head.get(at..at + 4)?.try_into().ok() };
    let length = usize::try_from(u32::from_ne_bytes(word(12)?)).ok()?;
    let (name, after) = rest.split_at_checked(length)?;
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(length);
    let raw = Raw {
        watch: i32::from_ne_bytes(word(0)?),
        mask: u32::from_ne_bytes(word(4)?),
        cookie: u32::from_ne_bytes(word(8)?),
        name: name.get(..end)?.to_vec(),
    };
    Some((raw, after))
}

impl Watch<'_> {
    /// Watches what is to be watched at `below`, relative to the path; and tells what it finds there if
    /// that is new.
    fn add_all(&mut self, new: Option<(&[u8], &mut Output)>) -> Outcome {
        let (inotify, places, told) = (&self.inotify, &mut self.places, &mut self.told);
        let Some((below, output)) = new else {
            if !self.recursive {
                let top = place(self.path, true)?;
                return add(inotify, places, &top, Bytes::new());
            }
            // What is watched already keeps its number.
            return match tree::visit(self.path, &mut |found, path| match found {
                Found::Directory(directory) => add(inotify, places, directory, path),
                Found::Other => Ok(()),
            }) {
                // A file, then.
                Err(Failure {
                    path,
                    errno: Errno::ENOTDIR,
                    ..
                }) if path.is_empty() => Ok(()),
                result => result,
            };
        };
        let top = join(self.path, below);
        let found = tree::visit(&top, &mut |found, path| {
            let path = join(below, &path);
            if path != below {
                output.say(&Record::Event(Event::Created {
                    path: path.clone(),
                    directory: matches!(found, Found::Directory(_)),
                }))?;
                told.insert(path.clone());
            }
            match found {
                Found::Directory(directory) => add(inotify, places, directory, path),
                Found::Other => Ok(()),
            }
        });
        match found {
            // It is gone again, or not ours to read: nothing of it is told.
            Err(Failure {
                errno: Errno::ENOENT | Errno::ENOTDIR | Errno::EACCES | Errno::ELOOP,
                ..
            }) => Ok(()),
            result => result,
        }
    }

    /// `false`: what was watched is gone.
    fn handle(&mut self, raw: Raw, output: &mut Output) -> Result<bool, Failure> {
        let Raw {
            watch,
            mask,
            cookie,
            name,
        } = raw;
        if mask & libc::IN_Q_OVERFLOW != 0 {
            self.give_up_move(output)?;
            output.say(&Record::Event(Event::Overflow))?;
            return self.look_again(output);
        }
        let Some(place) = self.places.get(&watch).cloned() else {
            return Ok(true);
        };
        let at_top = place.is_empty();
        let directory = mask & libc::IN_ISDIR != 0;
        let path = join(&place, &name);
        if self
            .moved
            .as_ref()
            .is_some_and(|moved| mask & libc::IN_MOVED_TO == 0 || moved.cookie != cookie)
        {
            self.give_up_move(output)?;
        }
        let is_new =
            mask & libc::IN_CREATE != 0 || mask & libc::IN_MOVED_TO != 0 && self.moved.is_none();
        let is_gone = mask & (libc::IN_DELETE | libc::IN_MOVED_FROM) != 0;
        let was_told = (is_new || is_gone) && self.told.remove(&path);
        if was_told && is_new {
            return Ok(true);
        }
        let event = match mask {
            mask if mask & libc::IN_CREATE != 0 => Event::Created { path, directory },
            mask if mask & libc::IN_MODIFY != 0 => Event::Modified { path },
            mask if mask & libc::IN_DELETE != 0 => Event::Deleted { path, directory },
            // Of a directory that is watched itself, its parent tells too.
            mask if mask & libc::IN_ATTRIB != 0 => {
                if name.is_empty() && !at_top {
                    return Ok(true);
                }
                Event::Attributes { path, directory }
            }
            mask if mask & libc::IN_MOVED_FROM != 0 => {
                self.moved = Some(Moved {
                    cookie,
                    from: path,
                    directory,
                });
                return Ok(true);
            }
            mask if mask & libc::IN_MOVED_TO != 0 => match self.moved.take() {
                Some(Moved { from, .. }) => {
                    if directory {
                        self.rename(&from, &path);
                    }
                    output.say(&Record::Event(Event::Moved {
                        from,
                        path,
                        directory,
                    }))?;
                    return Ok(true);
                }
                None => Event::Created { path, directory },
            },
            mask if mask & (libc::IN_DELETE_SELF | libc::IN_MOVE_SELF | libc::IN_UNMOUNT) != 0 => {
                if !at_top {
                    return Ok(true);
                }
                output.say(&Record::Event(Event::Deleted { path, directory }))?;
                return Ok(false);
            }
            mask if mask & libc::IN_IGNORED != 0 => {
                self.places.remove(&watch);
                return Ok(true);
            }
            _ => return Ok(true),
        };
        output.say(&Record::Event(event.clone()))?;
        if let Event::Created {
            path,
            directory: true,
        } = event
            && self.recursive
        {
            self.add_all(Some((&path, output)))?;
        }
        Ok(true)
    }

    /// Among what was lost may be new directories, and the end of what is watched.
    fn look_again(&mut self, output: &mut Output) -> Result<bool, Failure> {
        let top = self.top();
        let again = place(self.path, true)
            .map_err(Failure::from)
            .and_then(|top| add(&self.inotify, &mut self.places, &top, Bytes::new()));
        if again.is_err() || self.top() != top {
            output.say(&Record::Event(Event::Deleted {
                path: Bytes::new(),
                directory: true,
            }))?;
            return Ok(false);
        }
        if self.recursive {
            self.add_all(None)?;
        }
        Ok(true)
    }

    /// The watch of the path itself; of what came to be there later, too.
    fn top(&self) -> Vec<i32> {
        let at_top = self.places.iter().filter(|(_, place)| place.is_empty());
        at_top.map(|(watch, _)| *watch).collect()
    }

    /// Its second half does not come: it went out of what is watched.
    fn give_up_move(&mut self, output: &mut Output) -> Outcome {
        let Some(Moved {
            from, directory, ..
        }) = self.moved.take()
        else {
            return Ok(());
        };
        if directory {
            let inotify = self.inotify.as_raw_fd();
            self.told.retain(|told| below(told, &from).is_none());
            self.places.retain(|watch, place| {
                let stays = below(place, &from).is_none();
                if !stays {
                    // SAFETY: integers. A watch that is gone already is an error, and as good.
                    unsafe { libc::inotify_rm_watch(inotify, *watch) };
                }
                stays
            });
        }
        output.say(&Record::Event(Event::Deleted {
            path: from,
            directory,
        }))
    }

    fn rename(&mut self, from: &[u8], to: &[u8]) {
        self.told.retain(|told| below(told, from).is_none());
        for place in self.places.values_mut() {
            if let Some(rest) = below(place, from) {
                *place = [to, rest].concat();
            }
        }
    }
}

fn add(
    inotify: &OwnedFd,
    places: &mut HashMap<i32, Bytes>,
    place: &OwnedFd,
    path: Bytes,
) -> Outcome {
    // Of the very thing that was opened, whatever is at its path by now.
    let own = own_path(place.as_fd())?;
    // SAFETY: the string outlives the call.
    let watch = unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), own.as_ptr(), MASK) };
    match Errno::result(watch) {
        Ok(watch) => {
            places.insert(watch, path);
            Ok(())
        }
        Err(errno) => Err(Failure {
            path,
            errno,
            found: None,
        }),
    }
}

fn join(directory: &[u8], name: &[u8]) -> Bytes {
    match (directory, name) {
        ([], path) | (path, []) => path.to_vec(),
        (directory, name) => [directory, b"/", name].concat(),
    }
}

/// What of a path comes after a directory: nothing, or a slash and more.
fn below<'a>(path: &'a [u8], directory: &[u8]) -> Option<&'a [u8]> {
    let rest = path.strip_prefix(directory)?;
    matches!(rest, [] | [b'/', ..]).then_some(rest)
}

//! The guest's end of the control socket.

use std::io::{IoSlice, IoSliceMut, Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use agentvm_guest::protocol::{
    IN_MEMFD, INLINE, MAX_DESCRIPTORS, MAX_PACKET, Reply, Request, decode, encode,
};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

pub(crate) struct Control(OwnedFd);

impl Control {
    /// Takes over the descriptor that the host left open across exec.
    pub(crate) fn inherited(fd: RawFd) -> Self {
        // SAFETY: the host passes exactly this descriptor, and nothing else in this process uses it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: plain fcntl on a descriptor we own; programs we start must not inherit it.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
        Self(fd)
    }

    /// Waits for the next request. `None`: the host is gone, or no longer makes sense.
    pub(crate) fn receive(&self) -> Option<(Request, Vec<OwnedFd>)> {
        let mut packet = vec![0; MAX_PACKET];
        let mut ancillary = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
        let (length, mut descriptors) = loop {
            let mut iov = [IoSliceMut::new(&mut packet)];
            let received = recvmsg::<UnixAddr>(
                self.0.as_raw_fd(),
                &mut iov,
                Some(&mut ancillary),
                MsgFlags::MSG_CMSG_CLOEXEC,
            );
            match received {
                Ok(message) => {
                    let mut descriptors = Vec::new();
                    for part in message.cmsgs().ok()? {
                        if let ControlMessageOwned::ScmRights(fds) = part {
                            // SAFETY: the kernel has just installed these descriptors for us.
                            descriptors
                                .extend(fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
                        }
                    }
                    break (message.bytes, descriptors);
                }
                Err(Errno::EINTR) => {}
                Err(_) => return None,
            }
        };
        let (&kind, body) = packet.get(..length)?.split_first()?;
        let request = match kind {
            INLINE => decode(body)?,
            IN_MEMFD => {
                let mut file = std::fs::File::from(descriptors.pop()?);
                let mut body = Vec::new();
                file.rewind().ok()?;
                file.read_to_end(&mut body).ok()?;
                decode(&body)?
            }
            _ => return None,
        };
        Some((request, descriptors))
    }

    /// Sends a reply. A host that can't take it is gone: the next [`Control::receive`] says so.
    pub(crate) fn send(&self, reply: &Reply) {
        let _ = self.hand_out(reply, &[]);
    }

    /// Sends a reply with descriptors. It fails with `ETOOMANYREFS` while too many are on their way through
    /// sockets of who has this real uid (unix(7)): the host has to hear of that in another reply.
    pub(crate) fn hand_out(&self, reply: &Reply, descriptors: &[OwnedFd]) -> nix::Result<()> {
        let body = encode(reply).ok_or(Errno::EINVAL)?;
        let fds: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let iov = [IoSlice::new(&[INLINE]), IoSlice::new(&body)];
        loop {
            let flags = MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<UnixAddr>(self.0.as_raw_fd(), &iov, rights, flags, None) {
                Err(Errno::EINTR) => {}
                sent => return sent.map(drop),
            }
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

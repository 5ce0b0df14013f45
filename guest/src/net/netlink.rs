//! Just enough netlink: requests in one packet, and the first error among the answers.
//! Sources: netlink(7), `linux/netlink.h`, `linux/netfilter/nfnetlink.h`.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
};

use super::Failure;

const HEADER_LEN: usize = 16;
const ALIGNMENT: usize = 4;

/// What is read of an answer.
const ANSWER: usize = 8192;

/// Somebody else may have sent some, where others have the socket as well.
const MAX_ANSWERS: usize = 64;

/// Requests that are sent together.
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// What each request is for, in order; its sequence number is the index.
    steps: Vec<&'static str>,
    /// Index and offset of the request whose acknowledgement ends the conversation.
    last: Option<(usize, usize)>,
}

impl Batch {
    pub(super) const fn new() -> Self {
        Self {
            bytes: Vec::new(),
            steps: Vec::new(),
            last: None,
        }
    }

    /// Appends a request: `header` is what the kind's family puts before the attributes.
    pub(super) fn request(
        &mut self,
        step: &'static str,
        (kind, flags): (u16, i32),
        header: &[u8],
        fill: impl FnOnce(&mut Attributes<'_>),
    ) {
        self.last = Some((self.steps.len(), self.bytes.len()));
        self.append(step, (kind, flags), header, fill);
    }

    /// A request that the kernel does not acknowledge: the brackets of a transaction.
    pub(super) fn bracket(&mut self, step: &'static str, kind: u16, header: &[u8]) {
        self.append(step, (kind, 0), header, |_| {});
    }

    fn append(
        &mut self,
        step: &'static str,
        (kind, flags): (u16, i32),
        header: &[u8],
        fill: impl FnOnce(&mut Attributes<'_>),
    ) {
        let start = self.bytes.len();
        let flags = truncated(flags | libc::NLM_F_REQUEST);
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        let sequence = u32::try_from(self.steps.len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(header);
        fill(&mut Attributes(&mut self.bytes));
        let length = u32::try_from(self.bytes.len() - start).unwrap_or(u32::MAX);
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        self.steps.push(step);
    }

    /// Sends everything over a socket of its own.
    pub(super) fn send(self, protocol: SockProtocol) -> Result<(), Failure> {
        self.send_over(&socket(protocol)?)
    }

    /// Sends everything. The kernel works through it before the send returns, so that all answers
    /// are there to be read: nothing here can wait.
    pub(super) fn send_over(mut self, socket: &OwnedFd) -> Result<(), Failure> {
        let Some((last, offset)) = self.last else {
            return Ok(());
        };
        // Errors are always reported; success only once, for the last request.
        let flags = u16::from_ne_bytes([self.bytes[offset + 6], self.bytes[offset + 7]]);
        let flags = flags | truncated(libc::NLM_F_ACK);
        self.bytes[offset + 6..offset + 8].copy_from_slice(&flags.to_ne_bytes());

        // What was not read of an earlier conversation.
        let mut buffer = [0; ANSWER];
        for _ in 0..MAX_ANSWERS {
            if recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).is_err() {
                break;
            }
        }
        let kernel = NetlinkAddr::new(0, 0);
        sendto(socket.as_raw_fd(), &self.bytes, &kernel, MsgFlags::empty())
            .map_err(|errno| ("send to netlink", errno))?;
        self.read_answers(socket, last)
    }

    fn read_answers(&self, socket: &OwnedFd, last: usize) -> Result<(), Failure> {
        // An answer repeats its request, which may not fit: only its beginning counts.
        let mut buffer = [0; ANSWER];
        for _ in 0..MAX_ANSWERS {
            let len = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)
                .map_err(|errno| ("read from netlink", errno))?;
            let mut rest = &buffer[..len];
            while let Some((answer, after)) = Answer::parse(rest) {
                rest = after;
                let sequence = answer.sequence as usize;
                if let Some(errno) = answer.error {
                    let step = self.steps.get(sequence).copied();
                    return Err((step.unwrap_or("netlink"), errno));
                }
                if sequence == last {
                    return Ok(());
                }
            }
        }
        Err(("read from netlink", Errno::EPROTO))
    }
}

pub(super) fn socket(protocol: SockProtocol) -> Result<OwnedFd, Failure> {
    nix::sys::socket::socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )
    .map_err(|errno| ("make a netlink socket", errno))
}

struct Answer {
    sequence: u32,
    error: Option<Errno>,
}

impl Answer {
    /// The first `NLMSG_ERROR` of `bytes`, and what follows it.
    fn parse(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let word = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let length = word(0)? as usize;
        let answer = Self {
            sequence: word(8)?,
            error: match word(HEADER_LEN)?.cast_signed() {
                0 => None,
                code => Some(Errno::from_raw(-code)),
            },
        };
        let next = length.next_multiple_of(ALIGNMENT).max(HEADER_LEN);
        Some((answer, bytes.get(next..).unwrap_or_default()))
    }
}

/// Attributes (`struct nlattr`) at the end of a message.
pub(super) struct Attributes<'a>(&'a mut Vec<u8>);

impl<'a> Attributes<'a> {
    pub(super) const fn at_end_of(message: &'a mut Vec<u8>) -> Self {
        Self(message)
    }

    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |bytes| bytes.extend_from_slice(value));
    }

    /// Network byte order, as nftables has its numbers.
    pub(super) fn be32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// Host byte order, as rtnetlink has them.
    pub(super) fn ne32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_ne_bytes());
    }

    pub(super) fn text(&mut self, kind: u16, value: &str) {
        self.attribute(kind, |bytes| {
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        });
    }

    pub(super) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes<'_>)) {
        let kind = kind | truncated(libc::NLA_F_NESTED);
        self.attribute(kind, |bytes| fill(&mut Attributes(bytes)));
    }

    /// A nested attribute whose content has been encoded before.
    pub(super) fn nested_bytes(&mut self, kind: u16, content: &[u8]) {
        self.nested(kind, |inner| inner.0.extend_from_slice(content));
    }

    fn attribute(&mut self, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        fill(self.0);
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        let padded = self.0.len().next_multiple_of(ALIGNMENT);
        self.0.resize(padded, 0);
    }
}

/// Flags are 16 bits on the wire; libc has them as `int`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "all flags are below 1 << 16"
)]
const fn truncated(flags: i32) -> u16 {
    flags as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_carry_their_length_and_are_padded_to_four_bytes() {
        let mut bytes = Vec::new();
        let mut attributes = Attributes(&mut bytes);
        attributes.nested(1, |inner| inner.bytes(2, &[7]));
        let expected = [
            &12_u16.to_ne_bytes()[..],
            &0x8001_u16.to_ne_bytes(),
            &5_u16.to_ne_bytes(),
            &2_u16.to_ne_bytes(),
            &[7, 0, 0, 0],
        ]
        .concat();
        assert_eq!(bytes, expected);
    }

    #[test]
    fn an_error_names_the_request_that_it_answers() {
        let mut batch = Batch::new();
        // RTM_DELLINK of a device that does not exist.
        batch.request("remove a link", (17, 0), &[0; 16], |attributes| {
            attributes.text(3, "agentvm-none");
        });
        let (step, errno) = batch.send(SockProtocol::NetlinkRoute).expect_err("no link");
        assert_eq!(step, "remove a link");
        // EPERM for who may not configure the network at all.
        assert!(matches!(errno, Errno::ENODEV | Errno::EPERM), "{errno}");
    }
}

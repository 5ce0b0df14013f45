//! A filter of system calls as a tree of decisions, and its translation to what the kernel runs.
//!
//! A balanced tree because the kernel walks through the filter for every number there is when it is
//! installed (`seccomp_cache_prepare`), to remember which calls are allowed whatever their arguments:
//! those cost nothing later. Hence also: no look at arguments that is not needed.

use std::collections::BTreeMap;

use agentvm_guest::protocol::SockFilter;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    End(Action),
    If {
        field: Field,
        test: Test,
        yes: Box<Self>,
        no: Box<Self>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Allow,
    /// The call is not made, and fails with this number; with 0 it has succeeded.
    Fail(i32),
    Kill,
}

/// Of `struct seccomp_data`, as far as one instruction can load it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    Number,
    Architecture,
    /// The lower half of an argument: all of it where the kernel takes 32 bits.
    Low(u32),
    High(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Test {
    Equal(u32),
    AtLeast(u32),
    AnyBit(u32),
}

pub(super) const ALLOW: Decision = Decision::End(Action::Allow);

pub(super) const fn fail(errno: i32) -> Decision {
    Decision::End(Action::Fail(errno))
}

pub(super) fn when(field: Field, test: Test, yes: Decision, no: Decision) -> Decision {
    Decision::If {
        field,
        test,
        yes: Box::new(yes),
        no: Box::new(no),
    }
}

pub(super) fn one_of(field: Field, values: &[u32], yes: &Decision, no: Decision) -> Decision {
    values.iter().rev().fold(no, |no, value| {
        when(field, Test::Equal(*value), yes.clone(), no)
    })
}

/// Whether an argument, a pointer, is null.
pub(super) fn null(argument: u32, yes: Decision, no: Decision) -> Decision {
    let high = when(Field::High(argument), Test::Equal(0), yes, no.clone());
    when(Field::Low(argument), Test::Equal(0), high, no)
}

/// A program that decides about `calls` as they say, about calls with other numbers as `others` says,
/// and kills who makes calls of another architecture: their numbers mean something else.
pub(super) fn program(calls: BTreeMap<u32, Decision>, others: &Decision) -> Vec<SockFilter> {
    let by_number = by_number(&ranges(calls, others));
    let kill = Decision::End(Action::Kill);
    let ours = Test::Equal(ARCHITECTURE);
    instructions(&when(Field::Architecture, ours, by_number, kill), None)
}

/// Where each run of numbers with one decision begins, and that decision.
fn ranges(calls: BTreeMap<u32, Decision>, others: &Decision) -> Vec<(u32, Decision)> {
    let mut ranges = vec![(0, others.clone())];
    let mut add = |first: u32, decision: Decision| {
        ranges.pop_if(|(start, _)| *start == first);
        if ranges.last().is_none_or(|(_, before)| *before != decision) {
            ranges.push((first, decision));
        }
    };
    for (number, decision) in calls {
        add(number, decision);
        add(number + 1, others.clone());
    }
    ranges
}

fn by_number(ranges: &[(u32, Decision)]) -> Decision {
    if let [(_, only)] = ranges {
        return only.clone();
    }
    let (below, from) = ranges.split_at(ranges.len() / 2);
    let first = Test::AtLeast(from[0].0);
    when(Field::Number, first, by_number(from), by_number(below))
}

/// `loaded`: what the instructions before have in the accumulator.
fn instructions(decision: &Decision, loaded: Option<Field>) -> Vec<SockFilter> {
    let (field, test, yes, no) = match decision {
        Decision::End(action) => return vec![instruction(RETURN, 0, 0, action.value())],
        Decision::If {
            field,
            test,
            yes,
            no,
        } => (*field, *test, yes, no),
    };
    let mut all = Vec::new();
    if loaded != Some(field) {
        all.push(instruction(LOAD, 0, 0, field.offset()));
    }
    let (yes, no) = (
        instructions(yes, Some(field)),
        instructions(no, Some(field)),
    );
    let (code, value) = test.jump();
    if let Ok(skipped) = u8::try_from(yes.len()) {
        all.push(instruction(code, 0, skipped, value));
    } else {
        // Too far for a conditional jump.
        let skipped = u32::try_from(yes.len()).unwrap_or(u32::MAX);
        all.extend([
            instruction(code, 1, 0, value),
            instruction(JUMP, 0, 0, skipped),
        ]);
    }
    all.extend(yes);
    all.extend(no);
    all
}

// `linux/bpf_common.h`: class, size and mode, or operation.
const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_IF_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const JUMP_IF_ANY_BIT: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// `AUDIT_ARCH_*` of `linux/audit.h`: the ELF machine, 64 bits, little endian.
const ARCHITECTURE: u32 = 0xc000_0000
    | if cfg!(target_arch = "x86_64") {
        62
    } else if cfg!(target_arch = "aarch64") {
        183
    } else {
        panic!("no list of system calls for this architecture")
    };

const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> SockFilter {
    SockFilter { code, jt, jf, k }
}

impl Action {
    const fn value(self) -> u32 {
        match self {
            Self::Allow => libc::SECCOMP_RET_ALLOW,
            Self::Fail(errno) => libc::SECCOMP_RET_ERRNO | errno.cast_unsigned(),
            Self::Kill => libc::SECCOMP_RET_KILL_PROCESS,
        }
    }
}

impl Field {
    const fn offset(self) -> u32 {
        match self {
            Self::Number => 0,
            Self::Architecture => 4,
            Self::Low(argument) => 16 + 8 * argument,
            Self::High(argument) => 20 + 8 * argument,
        }
    }
}

impl Test {
    const fn jump(self) -> (u16, u32) {
        match self {
            Self::Equal(value) => (JUMP_IF_EQUAL, value),
            Self::AtLeast(value) => (JUMP_IF_AT_LEAST, value),
            Self::AnyBit(value) => (JUMP_IF_ANY_BIT, value),
        }
    }
}

/// As the kernel runs a program.
#[cfg(test)]
pub(super) fn run(program: &[SockFilter], number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = vec![number, ARCHITECTURE, 0, 0];
    for argument in arguments {
        for half in [argument & u64::from(u32::MAX), argument >> 32] {
            data.push(u32::try_from(half).expect("a half"));
        }
    }
    let (mut accumulator, mut at) = (0, 0);
    loop {
        let SockFilter { code, jt, jf, k } = program[at];
        let jump = |condition| usize::from(if condition { jt } else { jf });
        at += 1 + match code {
            LOAD => {
                accumulator = data[k as usize / 4];
                0
            }
            JUMP => k as usize,
            JUMP_IF_EQUAL => jump(accumulator == k),
            JUMP_IF_AT_LEAST => jump(accumulator >= k),
            JUMP_IF_ANY_BIT => jump(accumulator & k != 0),
            RETURN => return k,
            code => panic!("no such instruction: {code:#x}"),
        };
    }
}

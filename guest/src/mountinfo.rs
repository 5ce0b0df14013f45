//! Fields of `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`), for both sides.

/// A path as it is, from a field in which space, tab, newline and backslash are `\` and three octal digits.
#[must_use]
pub fn unescape(field: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    loop {
        rest = match rest {
            [
                b'\\',
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] => {
                path.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                after
            }
            [byte, after @ ..] => {
                path.push(*byte);
                after
            }
            [] => return path,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::unescape;

    #[test]
    fn escaped_bytes_of_a_path_are_read_back() {
        assert_eq!(unescape(br"/a\040b\134c\011"), b"/a b\\c\t");
        assert_eq!(unescape(br"/a\04"), br"/a\04");
    }
}

//! The environment that every program in a VM starts from. Nothing of the host's is in it.

use super::{GuestPath, User};

/// Where programs are looked for unless the caller says otherwise; first of all, for `user`, where `npm`,
/// `pip` and `cargo` install them.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const OWN_PATH: &str = "/home/user/.local/bin:/home/user/.cargo/bin";

/// The `PATH` of `user`, unless the caller says otherwise.
#[must_use]
pub fn path(user: User) -> String {
    match user {
        User::User => format!("{OWN_PATH}:{PATH}"),
        User::Root => PATH.to_owned(),
    }
}

const OF_USER: [&str; 2] = ["NPM_CONFIG_GLOBALCONFIG", "XDG_RUNTIME_DIR"];

/// The defaults for `user` with `own` variables over them.
#[must_use]
pub fn merge(user: User, own: Vec<(String, String)>) -> Vec<(String, String)> {
    let (name, home) = match user {
        User::User => ("user", GuestPath::HOME),
        User::Root => ("root", "/root"),
    };
    let path = path(user);
    let mut merged: Vec<(String, String)> = [
        ("HOME", home),
        ("LANG", "C.UTF-8"),
        ("LOGNAME", name),
        // The base's /etc has it.
        ("NPM_CONFIG_GLOBALCONFIG", "/etc/agentvm/npmrc"),
        ("PATH", &path),
        ("SHELL", "/bin/sh"),
        ("TMPDIR", "/tmp"),
        ("USER", name),
        ("XDG_RUNTIME_DIR", "/run/user/1000"),
    ]
    .into_iter()
    .filter(|(name, _)| !OF_USER.contains(name) || user == User::User)
    .filter(|(name, _)| !own.iter().any(|(own, _)| own == name))
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .collect();
    merged.extend(own);
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_variables_replace_defaults() {
        let merged = merge(
            User::User,
            vec![("HOME".to_owned(), "/elsewhere".to_owned())],
        );
        let homes: Vec<_> = merged.iter().filter(|(name, _)| name == "HOME").collect();
        assert_eq!(homes, [&("HOME".to_owned(), "/elsewhere".to_owned())]);
        assert!(merged.iter().any(|(name, _)| name == "PATH"));
    }
}

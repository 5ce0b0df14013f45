//! The environment that every program in a VM starts from. Nothing of the host's is in it.

use std::collections::HashMap;

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

const LANG: &str = "C.UTF-8";

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
        ("LANG", LANG),
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

/// What an image gives every program, below what the caller has set in `env`, whose defaults it replaces.
/// Who the user is, is the VM's to say.
pub fn add_images(env: &mut Vec<(String, String)>, image: &[(String, String)]) {
    const THE_VMS: [&str; 6] = [
        "HOME",
        "LOGNAME",
        "SHELL",
        "TMPDIR",
        "USER",
        "XDG_RUNTIME_DIR",
    ];
    let places = env
        .iter()
        .enumerate()
        .map(|(at, (name, _))| (name.clone(), at));
    let mut places: HashMap<_, _> = places.collect();
    for (name, value) in image {
        if THE_VMS.contains(&&**name) {
            continue;
        }
        let own = places.get(name).and_then(|at| env.get_mut(*at));
        match own.map(|(_, own)| own) {
            None => {
                places.insert(name.clone(), env.len());
                env.push((name.clone(), value.clone()));
            }
            Some(own) if name == "LANG" && own == LANG => own.clone_from(value),
            // The store's Node may follow it.
            Some(own) if name == "PATH" => {
                if let Some(rest) = own.strip_prefix(&path(User::User)) {
                    *own = format!("{OWN_PATH}:{value}{rest}");
                } else if let Some(rest) = own.strip_prefix(PATH) {
                    *own = format!("{value}{rest}");
                }
            }
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_replaces_defaults_and_nothing_that_was_set() {
        let image = [
            ("PATH", "/image"),
            ("HOME", "/root"),
            ("A", "image"),
            ("B", "image"),
            ("LANG", "de"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let own = |path: &str| {
            vec![
                ("PATH".to_owned(), path.to_owned()),
                ("A".to_owned(), "own".to_owned()),
            ]
        };
        for (path, merged_path) in [
            (format!("{PATH}:/node"), "/image:/node".to_owned()),
            (path(User::User), format!("{OWN_PATH}:/image")),
            ("/own".to_owned(), "/own".to_owned()),
        ] {
            let mut env = merge(User::User, own(&path));
            add_images(&mut env, &image);
            let value = |of: &str| {
                let mut found = env.iter().filter(|(name, _)| name == of);
                let value = found.next().map(|(_, value)| &**value);
                assert!(found.next().is_none(), "{of} twice");
                value
            };
            assert_eq!(value("PATH"), Some(&*merged_path));
            assert_eq!(value("HOME"), Some("/home/user"));
            assert_eq!(value("A"), Some("own"));
            assert_eq!(value("B"), Some("image"));
            assert_eq!(value("LANG"), Some("de"));
        }
    }

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

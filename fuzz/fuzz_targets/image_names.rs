//! Names of images come from callers, challenges from registries: a name says the same when it is written
//! in full, and credentials go to no address that somebody between could read.

#![no_main]

use agentvm::images::Reference;
use agentvm::images::fuzzed::Challenge;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(reference) = Reference::parse(text) {
        let whole = reference.to_string();
        assert_eq!(Reference::parse(&whole), Ok(reference), "{whole}");
        assert!(
            !whole.contains([' ', '?', '#', '%', '\\'])
                && !whole.split('/').any(|part| part == ".."),
            "{whole}"
        );
    }
    if let Some(Challenge::Bearer { realm, service }) = Challenge::parse(text)
        && let Ok(url) = Challenge::authority(&realm, service.as_deref(), "repository:a:pull")
    {
        let host = url.host_str().expect("a host");
        let is_here = ["localhost", "[::1]"].contains(&host) || host.starts_with("127.");
        assert!(
            url.scheme() == "https" || (url.scheme() == "http" && is_here),
            "{url}"
        );
        assert!(url.query_pairs().any(|(name, _)| name == "scope"));
    }
});

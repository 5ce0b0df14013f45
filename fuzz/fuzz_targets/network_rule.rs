//! Rules of the network are written by people: whatever the text, it is a rule that is shown as it was
//! written, or an error that says why not.

#![no_main]

use agentvm::net::Rule;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match Rule::parse(text) {
        Ok(rule) => {
            assert_eq!(rule.to_string(), text);
            assert_eq!(Rule::parse(&rule.to_string()), Ok(rule));
        }
        Err(problem) => assert!(!problem.is_empty()),
    }
});

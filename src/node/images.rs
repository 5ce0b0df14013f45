//! Images from JavaScript.

use std::path::Path;

use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::{Value, json};

use crate::images::{Progress, Reference, Source, Step};

/// `None`: no image of its own, though the client has one.
#[derive(Debug)]
pub(super) struct RawImage(pub(super) Option<Source>);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawDirectory {
    oci_layout: Option<String>,
    tag: Option<String>,
    rootfs: Option<String>,
}

impl<'de> Deserialize<'de> for RawImage {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let image = match value {
            Value::Bool(false) => return Ok(Self(None)),
            Value::Object(_) => serde_json::from_value(value)
                .map_err(|error| error.to_string())
                .and_then(directory),
            Value::String(name) => {
                Reference::parse(&name).map(|reference| Source::Registry { reference })
            }
            _ => Err(
                "must be the name of an image, { ociLayout, tag? } or { rootfs }, or false"
                    .to_owned(),
            ),
        };
        image
            .map(|source| Self(Some(source)))
            .map_err(D::Error::custom)
    }
}

fn directory(raw: RawDirectory) -> Result<Source, String> {
    let (name, path) = match (&raw.oci_layout, &raw.rootfs, &raw.tag) {
        (Some(path), None, _) => ("ociLayout", path),
        (None, Some(path), None) => ("rootfs", path),
        (None, Some(_), Some(_)) => return Err("a \"tag\" is of an \"ociLayout\"".to_owned()),
        _ => return Err("must have either \"ociLayout\" or \"rootfs\"".to_owned()),
    };
    if path.is_empty() || path.contains('\0') {
        return Err(format!("{name} must be a path"));
    }
    let path = Path::new(path);
    Ok(match name {
        "rootfs" => Source::rootfs(path),
        _ => Source::oci_layout(path, raw.tag),
    })
}

pub(super) fn image_progress_json(progress: &Progress) -> Value {
    let Progress {
        image,
        step,
        bytes,
        total,
    } = progress;
    let megabytes = |bytes: u64| bytes / 1_000_000;
    let message = match step {
        Step::Resolving => format!("{image}: asking the registry"),
        Step::Downloading => format!("{image}: {} of {} MB", megabytes(*bytes), megabytes(*total)),
        Step::Unpacking => format!("{image}: unpacking"),
    };
    json!({
        "image": image,
        "step": step.as_str(),
        "message": message,
        "bytes": bytes,
        "totalBytes": total,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<RawImage, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn an_image_is_a_layout_or_a_root_file_system_or_none() {
        let image = |json| parse(json).expect(json).0;
        let path = Path::new("/i");
        let layout = Source::oci_layout(path, Some("v1".to_owned()));
        assert_eq!(image(r#"{"ociLayout":"/i","tag":"v1"}"#), Some(layout));
        assert_eq!(image(r#"{"rootfs":"/i"}"#), Some(Source::rootfs(path)));
        assert_eq!(image("false"), None);
    }

    #[test]
    fn what_is_no_image_is_refused_with_what_would_be_one() {
        for (json, problem) in [
            ("{}", "must have either"),
            (r#"{"rootfs":"/a","ociLayout":"/a"}"#, "must have either"),
            (r#"{"rootfs":"/a","tag":"b"}"#, "a \"tag\" is of"),
            (r#"{"rootfs":""}"#, "rootfs must be a path"),
            (r#"{"rootfs":1}"#, "invalid type"),
            (r#"{"layout":"/a"}"#, "unknown field"),
            ("true", "must be the name of an image"),
            (r#""""#, "\"\" is no name of an image"),
        ] {
            let error = parse(json).expect_err(json);
            assert!(error.starts_with(problem), "{error}");
        }
    }
}

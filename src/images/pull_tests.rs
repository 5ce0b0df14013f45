//! Pulls from a registry that misbehaves as it is told.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// What a registry has, and what it does to its clients.
#[derive(Default)]
struct Registry {
    /// By path below `/v2/`.
    documents: HashMap<String, Vec<u8>>,
    /// Wants this token, which its authority gives.
    token: Option<&'static str>,
    /// Its authority gives none.
    refuses: bool,
    /// Sends no more than this of a blob at once.
    breaks_off_after: Option<usize>,
    /// Every request, with the byte that it begins at.
    requests: Vec<(String, usize)>,
}

/// Serves it on loopback, and returns its address.
async fn serve(registry: Registry) -> (String, Arc<Mutex<Registry>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("bound").to_string();
    let registry = Arc::new(Mutex::new(registry));
    let (of, own) = (Arc::clone(&registry), address.clone());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if stream.read_exact(&mut byte).await.is_err() {
                    break;
                }
                request.extend_from_slice(&byte);
            }
            let answer = answer(&of, &own, &String::from_utf8_lossy(&request));
            // A client may go away.
            drop(stream.write_all(&answer).await);
        }
    });
    (address, registry)
}

fn answer(registry: &Mutex<Registry>, address: &str, request: &str) -> Vec<u8> {
    let mut registry = registry.lock().expect("not poisoned");
    let target = request.split(' ').nth(1).expect("a target");
    let header = |name: &str| {
        let lines = request.lines();
        let mut named = lines.filter_map(|line| line.split_once(": "));
        let found = named.find(|(own, _)| own.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_owned())
    };
    let plain = |status: &str, more: &str, body: &[u8]| {
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n"
        );
        [head.as_bytes(), body].concat()
    };
    if target.starts_with("/token?") {
        assert_eq!(
            target,
            "/token?service=of+tests&scope=repository%3Aa%2Fb%3Apull"
        );
        return match registry.token {
            Some(token) if !registry.refuses => plain(
                "200 OK",
                "",
                json!({ "token": token }).to_string().as_bytes(),
            ),
            _ => plain("401 Unauthorized", "", b""),
        };
    }
    if let Some(token) = registry.token
        && header("authorization") != Some(format!("Bearer {token}"))
    {
        let challenge = format!(
            "WWW-Authenticate: Bearer realm=\"http://{address}/token\",service=\"of tests\"\r\n"
        );
        return plain("401 Unauthorized", &challenge, b"");
    }
    let path = target.trim_start_matches("/v2/").to_owned();
    let from = header("range").map_or(0, |range| {
        let bytes = range.trim_start_matches("bytes=").trim_end_matches('-');
        bytes.parse().expect("a number")
    });
    registry.requests.push((path.clone(), from));
    let Some(document) = registry.documents.get(&path) else {
        return plain("404 Not Found", "", b"");
    };
    let rest = &document[from..];
    let status = if from > 0 {
        "206 Partial Content"
    } else {
        "200 OK"
    };
    let mut whole = plain(status, "", rest);
    if let Some(most) = registry.breaks_off_after
        && path.contains("/blobs/")
        && rest.len() > most
    {
        whole.truncate(whole.len() - (rest.len() - most));
    }
    whole
}

fn hex(content: &[u8]) -> String {
    Sha256::digest(content)
        .iter()
        .fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
}

const NAME: &str = "a/b";

/// A registry with the image `a/b:v1`, of one layer with one file.
fn with_image(architecture: &str) -> (Registry, Vec<u8>) {
    let mut registry = Registry::default();
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(2000);
    layer
        .append_data(&mut header, "file", &[b'x'; 2000][..])
        .expect("an entry");
    let layer = layer.into_inner().expect("an archive");
    let mut blob = |kind: &str, content: &[u8]| -> Value {
        let digest = format!("sha256:{}", hex(content));
        let path = format!("{NAME}/blobs/{digest}");
        registry.documents.insert(path, content.to_vec());
        json!({ "mediaType": kind, "digest": digest, "size": content.len() })
    };
    let packed = blob("application/vnd.oci.image.layer.v1.tar", &layer);
    let config = json!({
        "os": "linux", "architecture": architecture,
        "rootfs": { "type": "layers", "diff_ids": [packed["digest"]] },
    });
    let config = blob(
        "application/vnd.oci.image.config.v1+json",
        config.to_string().as_bytes(),
    );
    let manifest = json!({ "config": config, "layers": [packed] }).to_string();
    for name in [
        "v1".to_owned(),
        format!("sha256:{}", hex(manifest.as_bytes())),
    ] {
        let path = format!("{NAME}/manifests/{name}");
        registry.documents.insert(path, manifest.clone().into());
    }
    (registry, layer)
}

fn architecture() -> String {
    let platform = Platform::of_this_machine().to_string();
    platform.trim_start_matches("linux/").to_owned()
}

fn has(registry: &Mutex<Registry>, path: &str, content: Vec<u8>) {
    let mut registry = registry.lock().expect("lock");
    registry.documents.insert(path.to_owned(), content);
}

fn blob_of(content: &[u8]) -> String {
    format!("{NAME}/blobs/sha256:{}", hex(content))
}

/// An address where nobody listens.
async fn nobody() -> String {
    let nobody = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    nobody.local_addr().expect("bound").to_string()
}

struct Store {
    directory: tempfile::TempDir,
}

impl Store {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        Self { directory }
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("images")
    }

    async fn open(&self, address: &str, name: &str, id: Option<String>) -> Result<Image> {
        let images = Images::new(self.root(), Ownership::Caller, Limits::default());
        let reference = Reference::parse(&format!("{address}/{NAME}{name}")).expect("a name");
        images
            .open(Source::Registry { reference }, None, id, &|_| {})
            .await
    }

    async fn code(&self, address: &str, name: &str) -> String {
        let error = self.open(address, name, None).await.expect_err("refused");
        crate::error::Error::from(error).code.as_str().to_owned()
    }

    fn blobs(&self) -> usize {
        let blobs = std::fs::read_dir(self.root().join("blobs/sha256"));
        blobs.map_or(0, Iterator::count)
    }
}

#[tokio::test]
async fn an_image_is_pulled_once_and_its_blobs_go_when_it_is_unpacked() {
    let (registry, _) = with_image(&architecture());
    let (address, registry) = serve(registry).await;
    let store = Store::new();
    let image = store.open(&address, ":v1", None).await.expect("an image");
    let file = std::fs::read(image.rootfs.join("file")).expect("there");
    assert_eq!(file, [b'x'; 2000]);
    assert_eq!(store.blobs(), 0);

    registry.lock().expect("lock").requests.clear();
    let again = store.open(&address, ":v1", None).await.expect("an image");
    assert_eq!(again.id, image.id);
    let asked = registry.lock().expect("lock").requests.clone();
    assert_eq!(asked, [(format!("{NAME}/manifests/v1"), 0)]);

    // What a VM was made with needs no registry.
    registry.lock().expect("lock").documents.clear();
    let id = Some(image.id.clone());
    assert_eq!(
        store.open(&address, ":v1", id).await.expect("there").id,
        image.id
    );
    let digest = format!("@{}", image.id);
    assert_eq!(store.code(&address, &digest).await, "IMAGE_NOT_FOUND");
}

#[tokio::test]
async fn a_token_is_fetched_from_the_authority_that_the_registry_names() {
    let (mut registry, _) = with_image(&architecture());
    registry.token = Some("t0ken");
    let (address, registry) = serve(registry).await;
    let store = Store::new();
    registry.lock().expect("lock").refuses = true;
    assert_eq!(store.code(&address, ":v1").await, "IMAGE_DENIED");
    registry.lock().expect("lock").refuses = false;
    store.open(&address, ":v1", None).await.expect("an image");
}

#[tokio::test]
async fn a_registry_of_this_host_is_asked_without_a_proxy() {
    let (address, _registry) = serve(with_image(&architecture()).0).await;
    let reference = Reference::parse(&format!("{address}/{NAME}:v1")).expect("a name");
    let proxy = reqwest::Proxy::all(format!("http://{}", nobody().await)).expect("a proxy");
    let client = reqwest::Client::builder().proxy(proxy);
    let registry = registry::Registry::with(&reference, client).expect("a client");
    registry.manifest("v1").await.expect("a manifest");
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_gone_on_with() {
    let (mut registry, layer) = with_image(&architecture());
    registry.breaks_off_after = Some(1000);
    let (address, registry) = serve(registry).await;
    let store = Store::new();
    store.open(&address, ":v1", None).await.expect("an image");
    let requests = registry.lock().expect("lock").requests.clone();
    let blob = blob_of(&layer);
    let of_layer: Vec<_> = requests.iter().filter(|(path, _)| *path == blob).collect();
    let begun: Vec<_> = of_layer.iter().map(|(_, from)| *from).collect();
    assert_eq!(begun, (0..layer.len()).step_by(1000).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_registry_that_dies_in_the_middle_leaves_a_beginning_for_the_next_pull() {
    let (mut registry, layer) = with_image(&architecture());
    let path = blob_of(&layer);
    // It has the first part only.
    registry
        .documents
        .insert(path.clone(), layer[..1500].to_vec());
    let (address, registry) = serve(registry).await;
    let store = Store::new();
    assert_eq!(store.code(&address, ":v1").await, "IMAGE_PULL_FAILED");

    has(&registry, &path, layer);
    registry.lock().expect("lock").requests.clear();
    store.open(&address, ":v1", None).await.expect("an image");
    let requests = registry.lock().expect("lock").requests.clone();
    assert!(requests.contains(&(path, 1500)), "{requests:?}");
}

#[tokio::test]
async fn what_another_registry_has_sent_is_not_gone_on_from() {
    let (mut hostile, layer) = with_image(&architecture());
    let path = blob_of(&layer);
    hostile.documents.insert(path.clone(), vec![b'y'; 1500]);
    let (hostile, _registry) = serve(hostile).await;
    let (address, registry) = serve(with_image(&architecture()).0).await;
    let store = Store::new();
    assert_eq!(store.code(&hostile, ":v1").await, "IMAGE_PULL_FAILED");
    store.open(&address, ":v1", None).await.expect("an image");
    let requests = registry.lock().expect("lock").requests.clone();
    let of_layer: Vec<_> = requests.iter().filter(|(of, _)| *of == path).collect();
    assert_eq!(of_layer, [&(path.clone(), 0)]);
}

#[tokio::test]
async fn a_beginning_that_does_not_verify_is_begun_anew_once() {
    let (mut registry, layer) = with_image(&architecture());
    let path = blob_of(&layer);
    let wrong = vec![b'y'; layer.len()];
    registry
        .documents
        .insert(path.clone(), wrong[..1500].into());
    let (address, registry) = serve(registry).await;
    let store = Store::new();
    assert_eq!(store.code(&address, ":v1").await, "IMAGE_PULL_FAILED");
    has(&registry, &path, layer.clone());
    store.open(&address, ":v1", None).await.expect("an image");

    let store = Store::new();
    has(&registry, &path, wrong[..1500].into());
    assert_eq!(store.code(&address, ":v1").await, "IMAGE_PULL_FAILED");
    has(&registry, &path, wrong);
    registry.lock().expect("lock").requests.clear();
    assert_eq!(store.code(&address, ":v1").await, "IMAGE_INVALID");
    let requests = registry.lock().expect("lock").requests.clone();
    let of_layer = requests.into_iter().filter(|(of, _)| *of == path);
    let begun: Vec<_> = of_layer.map(|(_, from)| from).collect();
    assert_eq!(begun, [1500, 0]);
}

#[tokio::test]
async fn what_is_not_what_was_named_is_refused() {
    let (mut registry, layer) = with_image(&architecture());
    let other = vec![b'y'; layer.len()];
    registry.documents.insert(blob_of(&layer), other);
    let (address, registry) = serve(registry).await;
    let store = Store::new();
    assert_eq!(store.code(&address, ":v1").await, "IMAGE_INVALID");
    // Nothing of it is gone on from.
    let path = blob_of(&layer);
    let long = [&layer[..], b"more"].concat();
    registry
        .lock()
        .expect("lock")
        .documents
        .insert(path.clone(), long);
    assert_eq!(store.code(&address, ":v1").await, "IMAGE_INVALID");

    let digest = format!("sha256:{}", "0".repeat(64));
    let manifest = format!("{NAME}/manifests/{digest}");
    has(&registry, &path, layer);
    has(&registry, &manifest, b"{}".to_vec());
    let named = format!("@{digest}");
    assert_eq!(store.code(&address, &named).await, "IMAGE_INVALID");
}

#[tokio::test]
async fn an_error_says_which_host_it_is_about_and_what_to_do() {
    let (mut registry, layer) = with_image(&architecture());
    registry.token = Some("t0ken");
    registry.refuses = true;
    let (address, registry) = serve(registry).await;
    let store = Store::new();
    let problem = async |address: &str, name: &str| {
        let error = store.open(address, name, None).await.expect_err("refused");
        let error = error.to_string();
        let of_image = error.strip_prefix(&format!(
            "the image {address}/{NAME}:v1: it is not usable: "
        ));
        let error = of_image.unwrap_or(&error).to_owned();
        let reference = format!("{address}/{NAME}{name}");
        let elsewhere = error.replace(&reference, "the image");
        assert!(elsewhere.contains(address), "{error}");
        error
    };
    let refused = problem(&address, ":v1").await;
    assert!(refused.contains("docker login"), "{refused}");
    registry.lock().expect("lock").token = None;
    let missing = problem(&address, ":v2").await;
    assert!(missing.contains("name and tag"), "{missing}");
    for (wrong, what) in [
        (layer[..1500].to_vec(), "goes on from there"),
        (vec![b'y'; layer.len()], "tell who runs it"),
        ([&layer[..], b"more"].concat(), "tell who runs it"),
    ] {
        has(&registry, &blob_of(&layer), wrong);
        let problem = problem(&address, ":v1").await;
        assert!(problem.contains(what), "{problem}");
    }
    let unreachable = problem(&nobody().await, ":v1").await;
    assert!(unreachable.contains("HTTPS_PROXY"), "{unreachable}");
}

#[tokio::test]
async fn what_is_not_there_or_for_another_machine_has_a_code() {
    let (registry, layer) = with_image("s390x");
    let (address, registry) = serve(registry).await;
    let store = Store::new();
    assert_eq!(store.code(&address, ":v1").await, "IMAGE_UNSUPPORTED");
    let requests = registry.lock().expect("lock").requests.clone();
    assert!(!requests.contains(&(blob_of(&layer), 0)), "{requests:?}");
    assert_eq!(store.code(&address, ":v2").await, "IMAGE_NOT_FOUND");
    let address = nobody().await;
    assert_eq!(store.code(&address, ":v1").await, "IMAGE_PULL_FAILED");
}

#[tokio::test]
async fn a_configuration_of_other_layers_or_without_end_is_refused_before_there_is_a_layer() {
    type Change = fn(&mut Value);
    let twice: Change = |manifest| {
        let layers = manifest["layers"].as_array_mut().expect("layers");
        layers.push(layers[0].clone());
    };
    let large: Change = |manifest| manifest["config"]["size"] = json!(MAX_DOCUMENT + 1);
    for (change, code) in [(twice, "IMAGE_INVALID"), (large, "IMAGE_TOO_LARGE")] {
        let (mut registry, layer) = with_image(&architecture());
        let path = format!("{NAME}/manifests/v1");
        let mut manifest = serde_json::from_slice(&registry.documents[&path]).expect("JSON");
        change(&mut manifest);
        registry.documents.insert(path, manifest.to_string().into());
        let (address, registry) = serve(registry).await;
        assert_eq!(Store::new().code(&address, ":v1").await, code);
        let requests = registry.lock().expect("lock").requests.clone();
        assert!(!requests.contains(&(blob_of(&layer), 0)), "{requests:?}");
    }
}

#[tokio::test]
async fn a_manifest_without_end_is_not_read_to_it() {
    let (mut registry, _) = with_image(&architecture());
    let path = format!("{NAME}/manifests/v1");
    registry.documents.insert(
        path,
        vec![b' '; usize::try_from(MAX_DOCUMENT).expect("small") + 1],
    );
    let (address, _registry) = serve(registry).await;
    assert_eq!(Store::new().code(&address, ":v1").await, "IMAGE_TOO_LARGE");
}

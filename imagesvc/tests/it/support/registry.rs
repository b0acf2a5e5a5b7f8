//! Debian's `docker-registry`, the reference implementation, and a pusher.

use std::{
    fs::File,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Once,
    time::Duration,
};

use imagesvc::Digest;
use tempfile::TempDir;

use super::{closed_port, eventually, image::TestImage};

pub(crate) struct Registry {
    child: Child,
    port: u16,
    dir: TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Registry {
    /// Serves `storage`; `extra` is more of its YAML configuration, `tls` of
    /// its `http` section.
    pub(crate) async fn start(storage: &Path, extra: &str, tls: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = closed_port();
        let config = format!(
            "version: 0.1\nlog: {{level: info, accesslog: {{disabled: true}}}}\n\
             storage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\n\
             http:\n  addr: 127.0.0.1:{port}\n  secret: test\n{tls}\n{extra}\n",
            storage.display()
        );
        let path = dir.path().join("config.yml");
        std::fs::write(&path, config).unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("docker-registry of Debian's package of that name");
        let registry = Self { child, port, dir };
        // It logs that it does.
        eventually(registry.dir.path(), "the registry listens", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        })
        .await;
        registry
    }

    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

/// The TLS client wants a crypto provider even for plain HTTP.
fn client() -> reqwest::Client {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        rustls::crypto::ring::default_provider()
            .install_default()
            .unwrap();
    });
    reqwest::Client::builder()
        .timeout(Duration::from_secs(20))
        .build()
        .unwrap()
}

/// Stores an image under `repository:tag` of a registry without
/// authentication.
pub(crate) async fn push(host: &str, repository: &str, tag: &str, image: &TestImage) {
    for (digest, bytes) in image.blobs() {
        push_blob(host, repository, &digest, bytes).await;
    }
    push_manifest(host, repository, tag, image.media_type, &image.manifest).await;
}

async fn push_blob(host: &str, repository: &str, digest: &Digest, bytes: &[u8]) {
    let client = client();
    let url = format!("http://{host}/v2/{repository}/blobs/uploads/");
    let begun = client.post(url).send().await.unwrap();
    assert_eq!(begun.status(), 202);
    let location = begun.headers()["location"].to_str().unwrap().to_owned();
    let done = client
        .put(location)
        .query(&[("digest", digest.as_str())])
        .header("content-type", "application/octet-stream")
        .body(bytes.to_vec())
        .send()
        .await
        .unwrap();
    assert_eq!(done.status(), 201);
}

pub(crate) async fn push_manifest(
    host: &str,
    repository: &str,
    reference: &str,
    media_type: &str,
    manifest: &[u8],
) {
    let done = client()
        .put(format!(
            "http://{host}/v2/{repository}/manifests/{reference}"
        ))
        .header("content-type", media_type)
        .body(manifest.to_vec())
        .send()
        .await
        .unwrap();
    let status = done.status();
    assert_eq!(status, 201, "{}", done.text().await.unwrap());
}

/// Runs a command that must succeed.
pub(crate) fn run(program: &str, args: &[&str]) -> Vec<u8> {
    let output = Command::new(program).args(args).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {errors}");
    output.stdout
}

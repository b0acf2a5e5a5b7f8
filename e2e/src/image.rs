//! Images: layers with a configuration and a manifest, in either format that
//! registries hold.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use crate::artifacts;
use crate::layer::{Compression, Layer, LayerBuilder, digest};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Oci,
    DockerSchema2,
}

#[derive(Clone)]
pub struct Image {
    pub layers: Vec<Layer>,
    /// The `config` member of the image configuration: Env, Cmd, User, ...
    pub config: Value,
    pub format: Format,
}

/// A manifest or index as it is pushed.
pub struct Manifest {
    pub media_type: &'static str,
    pub bytes: Vec<u8>,
}

impl Manifest {
    #[must_use]
    pub fn digest(&self) -> String {
        digest(&self.bytes)
    }
}

impl Image {
    #[must_use]
    pub fn new(layers: Vec<Layer>, config: Value) -> Self {
        Self {
            layers,
            config,
            format: Format::Oci,
        }
    }

    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// The image configuration (OCI image spec, config.md).
    #[must_use]
    pub fn config_bytes(&self) -> Vec<u8> {
        let diff_ids: Vec<_> = self
            .layers
            .iter()
            .map(|layer| layer.diff_id.as_str())
            .collect();
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        config.to_string().into_bytes()
    }

    #[must_use]
    pub fn manifest(&self) -> Manifest {
        let config = self.config_bytes();
        let (media_type, config_type) = match self.format {
            Format::Oci => (OCI_MANIFEST, "application/vnd.oci.image.config.v1+json"),
            Format::DockerSchema2 => (
                DOCKER_MANIFEST,
                "application/vnd.docker.container.image.v1+json",
            ),
        };
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|layer| {
                json!({
                    "mediaType": layer_media_type(self.format, layer.compression),
                    "digest": layer.digest,
                    "size": layer.blob.len(),
                })
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": { "mediaType": config_type, "digest": digest(&config), "size": config.len() },
            "layers": layers,
        });
        Manifest {
            media_type,
            bytes: manifest.to_string().into_bytes(),
        }
    }

    /// What CRI calls the image's id: the digest of its configuration.
    #[must_use]
    pub fn id(&self) -> String {
        digest(&self.config_bytes())
    }
}

/// An index (OCI image spec, image-index.md) over manifests of platforms.
#[must_use]
pub fn index(manifests: &[(&str, &Manifest)]) -> Manifest {
    let manifests: Vec<_> = manifests
        .iter()
        .map(|(architecture, manifest)| {
            json!({
                "mediaType": manifest.media_type,
                "digest": manifest.digest(),
                "size": manifest.bytes.len(),
                "platform": { "os": "linux", "architecture": architecture },
            })
        })
        .collect();
    let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests });
    Manifest {
        media_type: OCI_INDEX,
        bytes: index.to_string().into_bytes(),
    }
}

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

fn layer_media_type(format: Format, compression: Compression) -> &'static str {
    match (format, compression) {
        (Format::Oci, Compression::Plain) => "application/vnd.oci.image.layer.v1.tar",
        (Format::Oci, Compression::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
        (Format::Oci, Compression::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
        // Docker's schema knows gzip only; the plain type is in use regardless.
        (Format::DockerSchema2, Compression::Plain) => {
            "application/vnd.docker.image.rootfs.diff.tar"
        }
        (Format::DockerSchema2, _) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
    }
}

/// GOARCH of this machine, as images name platforms.
#[must_use]
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Debian's busybox with its applets, users and groups: what most tests run.
/// Two layers, so that every test stacks some.
pub fn busybox() -> Result<Image> {
    let layers = vec![
        busybox_layer(Compression::Gzip)?,
        accounts_layer(Compression::Zstd)?,
    ];
    Ok(Image::new(layers, busybox_config()))
}

#[must_use]
pub fn busybox_config() -> Value {
    json!({
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "FROM_IMAGE=yes"],
        "Cmd": ["sh"],
        "WorkingDir": "/",
    })
}

pub fn busybox_layer(compression: Compression) -> Result<Layer> {
    let mut layer = LayerBuilder::default().package(&artifacts::deb("busybox-static")?)?;
    for dir in [
        "etc",
        "proc",
        "sys",
        "dev",
        "root",
        "run",
        "var",
        "usr/local",
    ] {
        layer = layer.dir(dir, 0o755)?;
    }
    layer = layer.dir("tmp", 0o1777)?;
    for applet in APPLETS {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    layer.build(compression)
}

/// Names of the applets that tests call.
const APPLETS: &[&str] = &[
    "[",
    "awk",
    "base64",
    "basename",
    "cat",
    "chmod",
    "chown",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "dirname",
    "dmesg",
    "du",
    "echo",
    "env",
    "expr",
    "false",
    "find",
    "free",
    "grep",
    "groups",
    "gunzip",
    "gzip",
    "head",
    "hostname",
    "httpd",
    "id",
    "ifconfig",
    "ip",
    "kill",
    "killall",
    "less",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mknod",
    "mount",
    "mv",
    "nc",
    "nslookup",
    "od",
    "pidof",
    "ping",
    "poweroff",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "reboot",
    "rm",
    "rmdir",
    "route",
    "sed",
    "seq",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "stty",
    "sync",
    "tail",
    "tar",
    "taskset",
    "tee",
    "test",
    "time",
    "timeout",
    "top",
    "touch",
    "tr",
    "true",
    "tty",
    "umount",
    "uname",
    "uniq",
    "uptime",
    "vi",
    "wc",
    "wget",
    "which",
    "whoami",
    "xargs",
    "xxd",
    "yes",
    "zcat",
];

pub fn accounts_layer(compression: Compression) -> Result<Layer> {
    let passwd = "root:x:0:0:root:/root:/bin/sh\n\
                  alice:x:1000:1000:Alice:/home/alice:/bin/sh\n\
                  nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n";
    let group = "root:x:0:\nstaff:x:50:alice\nalice:x:1000:\naudio:x:29:\nnogroup:x:65534:\n";
    LayerBuilder::default()
        .file("etc/passwd", 0o644, passwd.as_bytes())?
        .file("etc/group", 0o644, group.as_bytes())?
        .dir("home", 0o755)?
        .owned_file("home/alice/greeting", 0o600, 1000, b"hello from alice\n")?
        .build(compression)
}

/// The usual image with locks and watches on files, and the C library they take.
pub fn with_tools() -> Result<Image> {
    let programs = ["usr/bin/flock", "usr/bin/inotifywait"];
    let is_wanted = |path: &Path| {
        let is_program = programs.iter().any(|program| path.ends_with(program));
        is_program || path.to_string_lossy().contains("libinotifytools.so")
    };
    let layer = LayerBuilder::default()
        .package_files(&artifacts::deb("libc6")?, |path| {
            path.starts_with("lib") || path.starts_with("lib64")
        })?
        .package_files(&artifacts::deb("util-linux")?, is_wanted)?
        .package_files(&artifacts::deb("inotify-tools")?, is_wanted)?
        .package_files(&artifacts::deb("libinotifytools0")?, is_wanted)?
        .build(Compression::Zstd)?;
    let mut image = busybox()?;
    image.layers.push(layer);
    Ok(image)
}

/// An image whose only process waits to be ended: containerd's pod sandbox.
pub fn pause() -> Result<Image> {
    let config = json!({ "Entrypoint": ["/bin/sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done"] });
    Ok(Image::new(vec![busybox_layer(Compression::Gzip)?], config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_names_its_layers_by_their_digests() {
        let layer = LayerBuilder::default()
            .file("a", 0o644, b"x")
            .unwrap()
            .build(Compression::Zstd)
            .unwrap();
        let image = Image::new(vec![layer.clone()], json!({}));
        let manifest: Value = serde_json::from_slice(&image.manifest().bytes).unwrap();
        assert_eq!(manifest["layers"][0]["digest"], layer.digest.as_str());
        assert_eq!(manifest["config"]["digest"], image.id().as_str());
    }
}

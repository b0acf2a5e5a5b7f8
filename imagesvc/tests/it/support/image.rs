//! Images made on the spot.

use std::io::Write;

use imagesvc::Digest;
use serde_json::json;

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

#[derive(Clone)]
pub(crate) struct Layer {
    pub(crate) bytes: Vec<u8>,
    pub(crate) diff_id: Digest,
    packing: Packing,
}

impl Layer {
    pub(crate) fn new(packing: Packing, files: &[(&str, &[u8])]) -> Self {
        let mut archive = tar::Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            archive.append_data(&mut header, path, *content).unwrap();
        }
        Self::of_archive(packing, &archive.into_inner().unwrap())
    }

    pub(crate) fn of_archive(packing: Packing, archive: &[u8]) -> Self {
        let bytes = match packing {
            Packing::Plain => archive.to_vec(),
            Packing::Gzip => {
                let level = flate2::Compression::fast();
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
                encoder.write_all(archive).unwrap();
                encoder.finish().unwrap()
            }
            Packing::Zstd => zstd::encode_all(archive, 1).unwrap(),
        };
        Self {
            bytes,
            diff_id: Digest::of(archive),
            packing,
        }
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }
}

/// Bytes that do not compress.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

#[derive(Clone)]
pub(crate) struct TestImage {
    pub(crate) manifest: Vec<u8>,
    pub(crate) media_type: &'static str,
    pub(crate) config: Vec<u8>,
    pub(crate) layers: Vec<Layer>,
}

pub(crate) fn host_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

impl TestImage {
    pub(crate) fn new(layers: Vec<Layer>) -> Self {
        let diff_ids = layers.iter().map(|l| l.diff_id.to_string()).collect();
        Self::with(layers, diff_ids, host_arch(), OCI_MANIFEST)
    }

    pub(crate) fn with(
        layers: Vec<Layer>,
        diff_ids: Vec<String>,
        architecture: &str,
        media_type: &'static str,
    ) -> Self {
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": {"User": "1000:1000", "Cmd": ["/bin/sh"], "Env": ["A=b"], "Volumes": null},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = serde_json::to_vec(&config).unwrap();
        let docker = media_type == DOCKER_MANIFEST;
        let layer_type = |packing| match (docker, packing) {
            (true, _) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (false, Packing::Plain) => "application/vnd.oci.image.layer.v1.tar",
            (false, Packing::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (false, Packing::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
        };
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": {
                "mediaType": if docker { DOCKER_CONFIG } else { OCI_CONFIG },
                "digest": Digest::of(&config).to_string(),
                "size": config.len(),
            },
            "layers": layers.iter().map(|layer| json!({
                "mediaType": layer_type(layer.packing),
                "digest": layer.digest().to_string(),
                "size": layer.bytes.len(),
            })).collect::<Vec<_>>(),
        });
        Self {
            manifest: serde_json::to_vec(&manifest).unwrap(),
            media_type,
            config,
            layers,
        }
    }

    /// One layer of noise.
    pub(crate) fn of_noise(len: usize, seed: u64) -> Self {
        Self::new(vec![Layer::new(
            Packing::Gzip,
            &[("data", &noise(len, seed))],
        )])
    }

    pub(crate) fn id(&self) -> String {
        Digest::of(&self.config).to_string()
    }

    pub(crate) fn digest(&self) -> String {
        Digest::of(&self.manifest).to_string()
    }

    pub(crate) fn blobs(&self) -> impl Iterator<Item = (Digest, &[u8])> {
        let layers = self.layers.iter().map(|l| (l.digest(), &l.bytes[..]));
        layers.chain([(Digest::of(&self.config), &self.config[..])])
    }
}

/// An index of images with their platforms' variants.
pub(crate) fn index(images: &[(&TestImage, &str, Option<&str>)]) -> Vec<u8> {
    let entries = images.iter().map(|(image, architecture, variant)| {
        let mut platform = json!({"os": "linux", "architecture": architecture});
        if let Some(variant) = variant {
            platform["variant"] = json!(variant);
        }
        json!({
            "mediaType": image.media_type,
            "digest": image.digest(),
            "size": image.manifest.len(),
            "platform": platform,
        })
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": entries.collect::<Vec<_>>(),
    });
    serde_json::to_vec(&index).unwrap()
}
